"""The small kernels between the products, in Triton: norms, rotary embedding and KV write, activation functions.

They are bound by memory and by launches, so each fuses all that touches the same row. A layer is nine launches, ten
where attention is split; those marked * are this room's:

    *norm.rms_norm         h = norm(residual += x)  (+ Gemma's second norm)
     qkv product
    *rope.rope_and_cache   q, k norms, rotation, K and V to their pages  (+ quantization)
     attention, its reduction
     o product
    *norm.rms_norm
     gate_up product
    *activation.gated      act(gate) * up
     down product

and a step ends with the final norm, lm_head, and what kernels/sampling launches. A product whose format quantizes
activations (W8A8) may launch that quantization before it.

Arithmetic is float32 inside, rounded once when written. Grids depend on shapes alone; what varies between steps (slots,
positions, sampling parameters) is read on the device, so every launch can stand in a CUDA graph.

Quantized rows, of the KV cache and of W8A8's activations: code = round(x / scale), scale = max|x| / 127 (int8) or
max|x| / 448 (float8_e4m3fn), float32, and not below 2**-100, so that a row of zeros divides by no zero. A row that
holds NaN or infinity has such a scale: it comes out of the product, and the engine fails the one request it belongs to.
"""
