"""GGUF: the container, its blocks, and a model and a tokenizer in it."""
