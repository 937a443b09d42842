"""Triton products with AWQ weights: 4 bits, a zero point for each group, input columns in their own order."""
