"""Mixtures of experts in Triton: routing, alignment, products with the chosen experts' weights."""
