"""Triton products with FP8 (e4m3) weights."""
