"""The CUDA backend: Triton's kernels and CUDA graphs."""
