"""Triton products with GPTQ weights: 2, 3, 4 or 8 bits, symmetric or with zero points, act-order too."""
