"""How to serve many requests at once: paged KV cache, continuous batching, one loop."""
