"""TGI's API, for clients that were written for text-generation-inference: plain texts, token by token."""
