"""What computes a model: torch's operators, the C++ kernels or Triton's."""
