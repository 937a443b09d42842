"""The CPU backend: one call into the C++ kernels."""
