"""Paged attention in Triton: prefill in chunks, split-KV decode, over a cache in 16 bits, FP8 or INT8.

The cache of one layer is two tensors and, where it is quantized, their scales. Sizes are logical, strides are free:
only head_dim must lie side by side. The engine's cache [2, num_kv_heads, num_blocks, block_size, head_dim] is passed
as its two halves.

    keys, values              [num_kv_heads, num_blocks, block_size, head_dim]
                              float16, bfloat16, float8_e4m3fn or int8
    key_scales, value_scales  none (16 bits),
                              float32 [1]: per tensor, FP8 only, or
                              float32 [num_blocks, block_size, num_kv_heads]: per token and head, FP8 and INT8

    value = code * scale.  INT8: scale = max|x| / 127, code = round(x / scale) in -127..127
                           FP8:  scale = max|x| / 448 (e4m3fn, finite: codes 0x7f and 0xff are never written)
    A token of zeros has a scale of (nearly) 0, not 1: the largest value scale sets the unit weights are rounded in.

Per-token-head scales are indexed [block, offset, kv head], as above, but `paged.allocate_scales` lays them out in
memory like the keys, a kv head's blocks after one another, so that the scales of a block of one head are one piece:

    memory    kv head 0: [block 0: s s s s ...][block 1: s s s s ...] ...   kv head 1: ...
    strides   block: block_size,  offset: 1,  kv head: num_blocks * block_size

`block_tables` int32 [num_seqs, max_blocks]: position p of sequence s lies in block block_tables[s, p // block_size] at
offset p % block_size. Entries behind a sequence's last token are never followed.
"""
