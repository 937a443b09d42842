"""How to multiply by a quantized weight. Kernels declare what they can do; `select.py` chooses."""
