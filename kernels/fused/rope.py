"""Between the qkv product and attention: q and k norms, rotation, and K and V into their pages, in one launch.

    qkv [T, H + 2 KH, D] = [ q heads | k heads | v heads ]      q: rotated in place
                                          \\-- k: rotated --> keys   [KH, blocks, block_size, D]  (+ key_scales)
                                           \\- v: as it is -> values [KH, blocks, block_size, D]  (+ value_scales)

A program takes one token and HEADS heads of one kind. Each thread holds both numbers of the pairs it rotates, so that q
can be rotated in place: pair p of a head is

    p < R/2     (p, p + R/2), rotated: neox order, as Hugging Face checkpoints have it
    p >= R/2    (p + R/2, p + D/2), which lie behind a partial rotary dimension R and pass through

Cosines and sines come as the engine's tables, so every scaling of frequencies is the same kernel. The cache's layout
and scales are those of `kernels/attention`. Slots are block * block_size + offset; a negative one (padding of a CUDA
graph's batch) writes nothing. Su et al. 2021, arXiv 2104.09864.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import FLOATS, bytes_of, native_fp8, need, need_rows, row_scale, to_code, warps

CACHE_CODES = {
    torch.float16: "none",
    torch.bfloat16: "none",
    torch.float32: "none",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
PROGRAM = 1024  # numbers in one program


@triton.jit
def _store_head(
    first,
    second,
    at_first,
    at_second,
    inside,
    pages_ptr,
    scales_ptr,
    head,
    block,
    offset,
    stride_h,
    stride_b,
    stride_o,
    scale_stride_b,
    scale_stride_o,
    scale_stride_h,
    head_inside,
    CODE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """[HEADS, PAIRS] halves of K or V to their page, quantized as the cache is."""
    head = head.to(tl.int64)
    pages = pages_ptr + head[:, None] * stride_h + block * stride_b + offset * stride_o
    if CODE == "none":
        tl.store(pages + at_first, first.to(pages_ptr.dtype.element_ty), mask=inside)
        tl.store(pages + at_second, second.to(pages_ptr.dtype.element_ty), mask=inside)
    else:
        if PER_HEAD:
            scale = row_scale(
                tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL),
                1,
                CODE,
            )
            scales = (
                scales_ptr
                + block * scale_stride_b
                + offset * scale_stride_o
                + head * scale_stride_h
            )
            tl.store(scales, scale, mask=head_inside)
            inverse = (1.0 / scale)[:, None]
        else:
            inverse = 1.0 / tl.load(scales_ptr)
        tl.store(pages + at_first, to_code(first * inverse, CODE, NATIVE_FP8), mask=inside)
        tl.store(pages + at_second, to_code(second * inverse, CODE, NATIVE_FP8), mask=inside)


@triton.jit
def _head_norm(
    first,
    second,
    q_weight_ptr,
    k_weight_ptr,
    at_first,
    at_second,
    in_q,
    in_k,
    in_v,
    eps,
    OFFSET: tl.constexpr,
    DIM: tl.constexpr,
):
    """RMSNorm of each q and k head with its kind's weight; v passes."""
    weight_first = tl.load(k_weight_ptr + at_first, mask=in_k, other=0.0).to(tl.float32)
    weight_first += tl.load(q_weight_ptr + at_first, mask=in_q, other=0.0).to(tl.float32)
    weight_second = tl.load(k_weight_ptr + at_second, mask=in_k, other=0.0).to(tl.float32)
    weight_second += tl.load(q_weight_ptr + at_second, mask=in_q, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    factor = tl.rsqrt(squares / DIM + eps)[:, None]
    normed_first = first * factor * (weight_first + OFFSET)[None, :]
    normed_second = second * factor * (weight_second + OFFSET)[None, :]
    return tl.where(in_v[None, :], first, normed_first), tl.where(
        in_v[None, :], second, normed_second
    )


@triton.jit
def _rope_kernel(
    qkv_ptr,  # [T, H + 2 KH, DIM]; q is written
    cos_ptr,
    sin_ptr,  # [positions, ROTARY / 2]
    position_ptr,
    slot_ptr,  # int64 [T]
    q_weight_ptr,
    k_weight_ptr,  # [DIM]; None: no norm
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    qkv_stride,
    table_stride,
    block_size,
    eps,
    k_stride_h,
    k_stride_b,
    k_stride_o,
    v_stride_h,
    v_stride_b,
    v_stride_o,
    ks_stride_b,
    ks_stride_o,
    ks_stride_h,
    vs_stride_b,
    vs_stride_o,
    vs_stride_h,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    CODE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    is_q = part < q_parts
    is_v = part >= q_parts + kv_parts
    first_head = tl.where(is_q, 0, tl.where(is_v, Q_HEADS + KV_HEADS, Q_HEADS))
    part_of_kind = tl.where(is_q, part, tl.where(is_v, part - q_parts - kv_parts, part - q_parts))
    head = part_of_kind * HEADS + tl.arange(0, HEADS)
    head_inside = head < tl.where(is_q, Q_HEADS, KV_HEADS)

    pair = tl.arange(0, PAIRS)
    pair_inside = pair < DIM // 2
    if ROTARY == DIM:  # said apart, so that loads are wide
        at_first = pair
        at_second = pair + DIM // 2
    else:
        rotated = pair < ROTARY // 2
        at_first = tl.where(rotated, pair, pair + ROTARY // 2)
        at_second = at_first + tl.where(rotated, ROTARY // 2, (DIM - ROTARY) // 2)
    inside = head_inside[:, None] & pair_inside[None, :]

    row = qkv_ptr + token * qkv_stride + (first_head + head)[:, None] * DIM
    first = tl.load(row + at_first[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + at_second[None, :], mask=inside, other=0.0).to(tl.float32)
    if q_weight_ptr is not None:
        first, second = _head_norm(
            first,
            second,
            q_weight_ptr,
            k_weight_ptr,
            at_first,
            at_second,
            pair < tl.where(is_q, DIM // 2, 0),
            pair < tl.where(is_q, 0, DIM // 2),
            pair < tl.where(is_v, DIM // 2, 0),
            eps,
            OFFSET,
            DIM,
        )
    table = tl.load(position_ptr + token) * table_stride + pair
    turn = pair < tl.where(is_v, 0, ROTARY // 2)
    cos = tl.load(cos_ptr + table, mask=turn, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=turn, other=0.0).to(tl.float32)[None, :]
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin

    if is_q:
        tl.store(row + at_first[None, :], turned_first.to(qkv_ptr.dtype.element_ty), mask=inside)
        tl.store(row + at_second[None, :], turned_second.to(qkv_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_ptr + token)
        if slot >= 0:
            block = slot // block_size
            offset = slot % block_size
            if is_v:
                _store_head(
                    turned_first,
                    turned_second,
                    at_first[None, :],
                    at_second[None, :],
                    inside,
                    values_ptr,
                    value_scales_ptr,
                    head,
                    block,
                    offset,
                    v_stride_h,
                    v_stride_b,
                    v_stride_o,
                    vs_stride_b,
                    vs_stride_o,
                    vs_stride_h,
                    head_inside,
                    CODE,
                    PER_HEAD,
                    NATIVE_FP8,
                )
            else:
                _store_head(
                    turned_first,
                    turned_second,
                    at_first[None, :],
                    at_second[None, :],
                    inside,
                    keys_ptr,
                    key_scales_ptr,
                    head,
                    block,
                    offset,
                    k_stride_h,
                    k_stride_b,
                    k_stride_o,
                    ks_stride_b,
                    ks_stride_o,
                    ks_stride_h,
                    head_inside,
                    CODE,
                    PER_HEAD,
                    NATIVE_FP8,
                )


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's cache as `kernels/attention` lays it out.

    keys, values [KH, num_blocks, block_size, D], strides free but for the last; scales None (16 bits), float32 [1]
    (FP8 per tensor) or float32 [num_blocks, block_size, KH] (FP8 and INT8 per token and head).
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def per_head(self) -> bool:
        return self.key_scales is not None and self.key_scales.dim() == 3

    def check(self, kernel: str) -> None:
        """Raise UnsupportedError if these tensors are not such a cache."""
        need_rows(kernel, "keys", self.keys, tuple(CACHE_CODES), None, None, None, None)
        need_rows(kernel, "values", self.values, (self.keys.dtype,), *self.keys.shape)
        heads, blocks, size, _ = self.keys.shape
        quantized = CACHE_CODES[self.keys.dtype] != "none"
        for name, scales in (("key_scales", self.key_scales), ("value_scales", self.value_scales)):
            need(
                (scales is not None) == quantized,
                kernel,
                f"a {self.keys.dtype} cache {'needs' if quantized else 'has no'} {name}",
            )
            if scales is not None:
                shapes = (
                    ([blocks, size, heads], [1])
                    if self.keys.dtype != torch.int8
                    else ([blocks, size, heads],)
                )
                need(
                    list(scales.shape) in shapes and scales.dtype == torch.float32,
                    kernel,
                    f"{name} is {scales.dtype} {list(scales.shape)}, want float32 {' or '.join(map(str, shapes))}",
                )
        if quantized and self.key_scales is not None and self.value_scales is not None:
            need(
                self.key_scales.dim() == self.value_scales.dim(),
                kernel,
                "key_scales and value_scales differ in kind",
            )


def rope_and_cache(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: Pages,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> None:
    """Rotate q in place; write rotated k, and v, to their pages.

    qkv [T, num_heads + 2 KH, D] of 16 bits or float32, a token's heads contiguous. cos, sin [positions, R / 2], R <= D,
    in any float dtype. positions, slots int64 [T]; slot -1: nothing is cached. q_weight, k_weight [D]: every head is
    normalized first, with factor offset + weight. The k heads of qkv stay as they were: attention reads the pages.
    Raises UnsupportedError naming the argument that does not fit.
    """
    tokens, dim, kv_heads = _check(
        qkv, num_heads, cos, sin, positions, slots, pages, q_weight, k_weight
    )
    if not tokens:
        return
    pairs = triton.next_power_of_2(dim // 2)
    heads = max(1, min(triton.next_power_of_2(max(num_heads, kv_heads)), PROGRAM // (2 * pairs)))
    grid = (tokens, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(kv_heads, heads))
    none = (0, 0, 0)
    scale_strides = [
        s.stride() if s is not None and s.dim() == 3 else none
        for s in (pages.key_scales, pages.value_scales)
    ]
    _rope_kernel[grid](
        qkv,
        cos,
        sin,
        positions,
        slots,
        q_weight,
        k_weight,
        bytes_of(pages.keys),
        bytes_of(pages.values),
        pages.key_scales,
        pages.value_scales,
        qkv.stride(0),
        cos.stride(0),
        pages.keys.shape[2],
        eps,
        *pages.keys.stride()[:3],
        *pages.values.stride()[:3],
        *scale_strides[0],
        *scale_strides[1],
        Q_HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTARY=2 * cos.shape[1],
        HEADS=heads,
        PAIRS=pairs,
        OFFSET=offset,
        CODE=CACHE_CODES[pages.keys.dtype],
        PER_HEAD=pages.per_head,
        NATIVE_FP8=native_fp8(qkv),
        num_warps=warps(2 * heads * pairs),
    )


def _check(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: Pages,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[int, int, int]:
    """Raise UnsupportedError, or return (tokens, head_dim, kv heads)."""
    name = "rope_and_cache"
    need_rows(name, "qkv", qkv, FLOATS, None, None, None)
    tokens, all_heads, dim = qkv.shape
    kv_heads = (all_heads - num_heads) // 2
    need(
        num_heads > 0 and kv_heads > 0 and all_heads == num_heads + 2 * kv_heads,
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
    pages.check(name)
    need(
        pages.keys.shape[0] == kv_heads and pages.keys.shape[3] == dim,
        name,
        f"keys has shape {list(pages.keys.shape)}, want [{kv_heads}, any, any, {dim}]",
    )
    need((q_weight is None) == (k_weight is None), name, "q_weight and k_weight come together")
    for weight_name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            need_rows(name, weight_name, weight, FLOATS, dim)
    return tokens, dim, kv_heads
