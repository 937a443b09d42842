"""Triton products with minima (Q4_1, Q4_K, HQQ), and with scales that 16 bits do not hold (Q3_K)."""
