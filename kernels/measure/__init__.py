"""Timing kernels, and listing what is to be compiled."""
