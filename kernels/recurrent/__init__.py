"""Mixers that carry a state from token to token, in Triton: convolutions, the gated delta rule, Mamba-2's state space.

    states of a layer  [slots, ...] float32     a running request has a slot, a snapshot another (batch.py)

    convolution.causal_conv      x through a few taps, from the inputs in the request's slot on
    delta_rule.gated_delta_rule  S = decay S;  S = S + k (beta (v - S^T k))^T;  o = S^T q
    state_space.state_space      S = decay S + B (dt x)^T;  y = S^T C + D x
    gated_norm.gated_norm        RMSNorm of what heads give, times silu(gate), or of that product

A program of the two recurrences takes some columns of one head's S through all of a request's tokens: they know nothing
of the others. S is read once and written once for each slot that wants it, and stays in registers between. So a decode
step reads and writes each state once, and what a request computes does not depend on how its prompt is cut up, nor on
who else is in the batch.

Arithmetic is float32. Grids depend on shapes alone, slots are read on the device, and a negative one is never written:
every launch can stand in a CUDA graph.
"""
