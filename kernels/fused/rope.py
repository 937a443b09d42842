"""Between the qkv product and attention: q and k norms, rotation, and K and V into their pages, in one launch.

    qkv [T, H + 2 KH, D] = [ q heads | k heads | v heads ]      q: rotated in place
                                          \\-- k: rotated --> keys   [KH, blocks, block_size, D]  (+ key_scales)
                                           \\- v: as it is -> values [KH, blocks, block_size, D]  (+ value_scales)

A program takes one token and HEADS heads of one kind. Each thread holds both numbers of the pairs it rotates, so that q
can be rotated in place: pair p of a head is

    p < R/2     (p, p + R/2), rotated: neox order, as most Hugging Face checkpoints have it
    p >= R/2    (p + R/2, p + D/2), which lie behind a partial rotary dimension R and pass through
    (2p, 2p + 1) of either kind, interleaved

Cosines and sines come as the engine's tables, so every scaling of frequencies is the same kernel. The cache's layout
and scales are those of `kernels/attention`. Slots are block * block_size + offset; a negative one (padding of a CUDA
graph's batch) writes nothing. Su et al. 2021, arXiv 2104.09864.
"""

import torch
import triton
from torch import Tensor

from ..attention.cache import PagedCache
from .rope_kernels import rope_kernel
from .rows import FLOATS, bytes_of, native_fp8, need, need_rows, warps

CACHE_CODES = {
    torch.float16: "none",
    torch.bfloat16: "none",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
PROGRAM = 1024  # numbers in one program


def rope_and_cache(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: PagedCache,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    v_norm: bool = False,
    interleaved: bool = False,
) -> None:
    """Rotate q in place; write rotated k, and v, to the cache.

    qkv [T, num_heads + 2 KH, D] of 16 bits or float32, a token's heads contiguous; or [T, num_heads, D], and nothing is
    cached. cos, sin [positions, R / 2], R <= D, in any float dtype. positions, slots int64 [T]; slot -1: nothing is
    cached. q_weight, k_weight [D]: every head is normalized first, with factor offset + weight; v_norm: every v head,
    with factor 1. The k heads of qkv stay as they were: attention reads the cache. Raises KernelArgumentError naming
    the argument that does not fit.
    """
    tokens, dim, kv_heads = _check(
        qkv, num_heads, cos, sin, positions, slots, cache, q_weight, k_weight
    )
    if not tokens:
        return
    pairs = triton.next_power_of_2(dim // 2)
    heads = max(1, min(triton.next_power_of_2(max(num_heads, kv_heads)), PROGRAM // (2 * pairs)))
    grid = (tokens, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(kv_heads, heads))
    none = (0, 0, 0)
    scale_strides = [
        s.stride() if s is not None and s.dim() == 3 else none
        for s in (cache.key_scales, cache.value_scales)
    ]
    rope_kernel[grid](
        qkv,
        cos,
        sin,
        positions,
        slots,
        q_weight,
        k_weight if kv_heads else q_weight,
        bytes_of(cache.keys),
        bytes_of(cache.values),
        cache.key_scales,
        cache.value_scales,
        qkv.stride(0),
        cos.stride(0),
        cache.keys.shape[2],
        eps,
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        *scale_strides[0],
        *scale_strides[1],
        Q_HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTARY=2 * cos.shape[1],
        HEADS=heads,
        PAIRS=pairs,
        OFFSET=offset,
        CODE=CACHE_CODES[cache.keys.dtype],
        PER_HEAD=cache.scales == "token",
        NATIVE_FP8=native_fp8(qkv),
        V_NORM=v_norm,
        INTERLEAVED=interleaved,
        num_warps=warps(2 * heads * pairs),
    )


def _check(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: PagedCache,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[int, int, int]:
    """Raise KernelArgumentError, or return (tokens, head_dim, kv heads)."""
    name = "rope_and_cache"
    need_rows(name, "qkv", qkv, FLOATS, None, None, None)
    tokens, all_heads, dim = qkv.shape
    kv_heads = (all_heads - num_heads) // 2
    need(
        num_heads > 0 and kv_heads >= 0 and all_heads == num_heads + 2 * kv_heads,
        name,
        f"{all_heads} heads are not {num_heads} of q and as many of k as of v",
    )
    need(qkv.stride(1) == dim, name, "the heads of a token in qkv are not contiguous")
    need(
        dim % 2 == 0 and 0 < 2 * cos.shape[-1] <= dim,
        name,
        f"a head of {dim} cannot have a rotary dimension of {2 * cos.shape[-1]}",
    )
    need_rows(name, "cos", cos, FLOATS, None, None)
    need_rows(name, "sin", sin, FLOATS, *cos.shape)
    need(cos.stride() == sin.stride(), name, "cos and sin lie differently in memory")
    need_rows(name, "positions", positions, (torch.int64,), tokens)
    need_rows(name, "slots", slots, (torch.int64,), tokens)
    need(
        kv_heads in (0, cache.keys.shape[0]) and cache.keys.shape[3] == dim,
        name,
        f"keys has shape {list(cache.keys.shape)}, want [{kv_heads}, any, any, {dim}]",
    )
    need(
        (q_weight is None) == (k_weight is None) or not kv_heads,
        name,
        "q_weight and k_weight come together",
    )
    for weight_name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            need_rows(name, weight_name, weight, FLOATS, dim)
    return tokens, dim, kv_heads
