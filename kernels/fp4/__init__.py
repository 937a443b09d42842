"""Triton products with FP4 (E2M1) weights: MXFP4 and NVFP4."""
