"""What a quantized weight is (scheme, weight, packing, formats) and how to make one well (algorithms, pipeline)."""
