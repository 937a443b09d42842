"""Triton products with FP8 (e4m3) weights: by FP8 activations (w8a8.py), or by 16-bit ones (w8a16.py)."""
