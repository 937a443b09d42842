"""The device side of `rope.py`: a program norms and rotates some heads of one token, and caches those of k and v."""

import triton
import triton.language as tl

from .rows import row_scale, to_code


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
def _value_norm(first, second, is_v, eps, DIM: tl.constexpr):
    """RMSNorm of each v head, without a weight; q and k pass."""
    squares = tl.sum(first * first + second * second, axis=1)
    factor = tl.where(is_v, tl.rsqrt(squares / DIM + eps), 1.0)[:, None]
    return first * factor, second * factor


@triton.jit
def rope_kernel(
    qkv_ptr,  # [T, H + 2 KH, DIM]; q is written. KH 0: [T, H, DIM], and nothing is cached
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
    V_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
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
    if INTERLEAVED:
        at_first = 2 * pair
        at_second = 2 * pair + 1
    elif ROTARY == DIM:  # said apart, so that loads are wide
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
    if V_NORM:
        first, second = _value_norm(first, second, is_v, eps, DIM)
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
