"""Triton products with 2-, 3-, 4- and 8-bit integer weights (GPTQ, GGUF, and what AWQ shares)."""
