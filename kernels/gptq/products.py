"""The Triton kernels that read `ShuffledWeight`: GEMV, GEMM and dequantization. y [M, N] = x [M, K] W^T (+ bias), with
integer codes or (FP8) e4m3 ones.

Every product may be split along K (`SPLIT_K`): each part writes float32 partial sums to a workspace, and the part that
arrives last adds them up in order. There are no atomic additions of values, so a result does not depend on timing.

Integers q - zero enter the tensor cores exactly; the scale multiplies the float32 sum of its group. The decoding is two
instructions for two weights, in PTX because Triton has no packed halves; the interpreter, which runs no PTX, takes the
plain path beside it (`INTERPRETED`).
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_FP16 = tl.constexpr(
    "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xEA; fma.rn.f16x2 t, t, $5, $6; mov.b32 {$0, $1}, t; }"
)
_BF16 = tl.constexpr(
    "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xEA; fma.rn.bf16x2 t, t, $5, $6; mov.b32 {$0, $1}, t; }"
)
_FP16_E4M3 = tl.constexpr("{ .reg .b32 t; fma.rn.f16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t; }")
_BF16_E4M3 = tl.constexpr("{ .reg .b32 t; fma.rn.bf16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t; }")
_PAIR = tl.constexpr("=h,=h,r,r,r,r,r")


@triton.constexpr_function
def _planes_per_group(planes, group):
    """How many planes in a row share a scale, at any tile: the partial sum is scaled after as many."""
    if group == 0 or group % (32 * planes) == 0:
        return planes
    return group // 32 if group >= 32 and planes % (group // 32) == 0 else 1


@triton.jit
def decode(
    words, zero, PLANE: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, BF16: tl.constexpr
):
    """Plane PLANE of int32 `words`, minus `zero` (float32, broadcast): (even features, odd features), exact.

    A mantissa holds 10 bits (float16) or 7 (bfloat16) under the magic exponent, so as many planes need no shift of
    their own; a plane that lies higher in the mantissa is brought down by the multiplication.
    """
    if FP8:
        return _decode_e4m3(words, PLANE, BF16)
    elif BF16 and BITS == 8:
        return _decode_bytes(words, zero, PLANE)
    else:
        return _decode_packed(words, zero, PLANE, BITS, BF16)


@triton.jit
def _decode_packed(words, zero, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    FIT: tl.constexpr = (7 if BF16 else 10) // BITS
    LOW: tl.constexpr = (PLANE % FIT) * BITS
    MASK: tl.constexpr = (((1 << BITS) - 1) << LOW) * 0x10001
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    OFFSET: tl.constexpr = (128.0 if BF16 else 1024.0) / (1 << LOW)
    SHIFT: tl.constexpr = (PLANE // FIT) * FIT * BITS
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    shifted = words >> SHIFT
    if INTERPRETED:
        pair = (shifted & MASK) | MAGIC
        even = pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) / (1 << LOW) - (
            OFFSET + zero
        )
        odd = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) / (1 << LOW) - (
            OFFSET + zero
        )
        return even.to(DTYPE), odd.to(DTYPE)
    FACTOR: tl.constexpr = (((127 - LOW) << 7) if BF16 else ((15 - LOW) << 10)) * 0x10001
    half = (-(OFFSET + zero)).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    addend = half | (half << 16)
    if BF16:
        even, odd = tl.inline_asm_elementwise(
            _BF16,
            _PAIR,
            [shifted, MASK, MAGIC, FACTOR, addend],
            (tl.bfloat16, tl.bfloat16),
            True,
            1,
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            _FP16, _PAIR, [shifted, MASK, MAGIC, FACTOR, addend], (tl.float16, tl.float16), True, 1
        )
    return even, odd


@triton.jit
def _decode_bytes(words, zero, PLANE: tl.constexpr):
    """8 bits do not fit a bfloat16 mantissa: 2**23 + q in float32, then rounded (exactly: |q - zero| < 256)."""
    even = (((words >> (8 * PLANE)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (
        8388608.0 + zero
    )
    odd = (((words >> (8 * PLANE + 16)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (
        8388608.0 + zero
    )
    return even.to(tl.bfloat16), odd.to(tl.bfloat16)


@triton.jit
def _decode_e4m3(words, PLANE: tl.constexpr, BF16: tl.constexpr):
    """Sign, exponent and mantissa moved to where a 16-bit float has them; a power of two makes up for the bias. Exact,
    subnormals too; the code for NaN becomes 480."""
    high = words << (8 - 8 * PLANE)
    moved = (high >> 4) & 0x07F007F0 if BF16 else (high >> 1) & 0x3F803F80
    pair = (high & -2147450880) | moved  # the signs, 0x80008000
    if INTERPRETED:
        DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        FACTOR: tl.constexpr = 2.0**120 if BF16 else 256.0
        even = pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) * FACTOR
        odd = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) * FACTOR
        return even.to(DTYPE), odd.to(DTYPE)
    if BF16:
        even, odd = tl.inline_asm_elementwise(
            _BF16_E4M3,
            "=h,=h,r,r,r",
            [pair, 0x7B807B80, -2147450880],
            (tl.bfloat16, tl.bfloat16),
            True,
            1,
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            _FP16_E4M3,
            "=h,=h,r,r,r",
            [pair, 0x5C005C00, -2147450880],
            (tl.float16, tl.float16),
            True,
            1,
        )
    return even, odd


@triton.jit
def _group_scale(
    scales,
    group,
    n,
    groups,
    stride,
    FP8: tl.constexpr,
    MINS: tl.constexpr,
    BF16_SCALE: tl.constexpr,
):
    """(scale, zero, minimum) of `group` for outputs n, float32."""
    if FP8:
        scale = tl.load(scales + group * stride + n)
        return scale, tl.zeros_like(scale), tl.zeros_like(scale)
    elif MINS:
        scale = tl.load(scales + group * stride + n)
        return scale, tl.zeros_like(scale), tl.load(scales + (groups + group) * stride + n)
    else:
        packed = tl.load(scales + group * stride + n)
        if BF16_SCALE:
            scale = (packed & -65536).to(tl.float32, bitcast=True)
        else:
            scale = (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, (packed & 0xFF).to(tl.float32), tl.zeros_like(scale)


@triton.jit
def mma(a, b, acc):
    """acc + a b; the interpreter has no bfloat16 products."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def finish(
    acc,
    y,
    bias,
    partials,
    locks,
    m,
    n,
    M,
    N,
    tile,
    split,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Write acc [BM, BN]; of a split product, whoever comes last adds up all parts in order and writes that."""
    inside = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    last = True
    if SPLIT_K > 1:
        tl.store(partials + split * M * N + at, acc, mask=inside)
        tl.debug_barrier()  # every thread's part is written before one of them announces it
        last = tl.atomic_add(locks + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if SPLIT_K > 1:
            acc = tl.zeros_like(acc)
            for part in range(SPLIT_K):
                acc += tl.load(
                    partials + part * M * N + at, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(locks + tile, 0)
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gemm(
    x,  # [M, K] float16 or bfloat16, contiguous
    words,
    scales,  # ShuffledWeight's
    bias,  # [N] like x
    y,  # [M, N] like x
    partials,  # float32 [SPLIT_K, M, N]
    locks,
    M,
    N,
    K,
    stride,
    tiles,
    groups,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    MINS: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Tensor-core product, one tile of K a trip. SWAP computes y^T = W x^T: on cc 90 the decoded weight is then the
    operand that a warp-group MMA takes from registers, and few rows need no padding to 64. Grid (M tiles * N tiles,
    SPLIT_K), M fastest: the tiles that read the same weights run together."""
    PLANES: tl.constexpr = 16 // BITS
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    PER_GROUP: tl.constexpr = _planes_per_group(PLANES, GROUP)
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    m_tiles = tl.cdiv(M, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    m = (tile % m_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // m_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_at = words + n[:, None] * 16 + tl.arange(0, 16)[None, :]
    feature = tl.arange(0, 32)
    row = x + m[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for trip in range(split, tiles, SPLIT_K):
        held = tl.load(weight_at + trip * stride * 16, eviction_policy="evict_first")
        held = (
            held.reshape(BLOCK_N, 4, 4).permute(2, 1, 0).reshape(16, BLOCK_N)
        )  # rows in a plane's order
        part = tl.zeros_like(acc)
        for plane in tl.static_range(PLANES):
            first = trip * (32 * PLANES) + plane * 32
            k = first + feature
            live = (m[:, None] < M) if EVEN_K else (m[:, None] < M) & (k[None, :] < K)
            a = tl.load(row + k[None, :], mask=live, other=0.0)
            for half in tl.static_range(HALVES):
                if plane % PER_GROUP == 0:
                    group = 0 if GROUP == 0 else (first + 16 * half) // GROUP
                    scale, zero, minimum = _group_scale(
                        scales, group, n, groups, stride, FP8, MINS, BF16_SCALE
                    )
                    part = tl.zeros_like(acc)
                    total = tl.zeros((BLOCK_M,), tl.float32)
                used = (
                    a
                    if HALVES == 1
                    else tl.where((feature // 16 == half)[None, :], a, 0.0).to(a.dtype)
                )
                if MINS:
                    total += tl.sum(used.to(tl.float32), 1)
                even, odd = decode(held, zero[None, :], plane, BITS, FP8, BF16)
                b = tl.join(even, odd).permute(0, 2, 1).reshape(32, BLOCK_N)
                part = mma(tl.trans(b), tl.trans(used), part) if SWAP else mma(used, b, part)
                if (plane + 1) % PER_GROUP == 0:
                    if SWAP:
                        acc += part * scale[:, None]
                        if MINS:
                            acc += minimum[:, None] * total[None, :]
                    else:
                        acc += part * scale[None, :]
                        if MINS:
                            acc += total[:, None] * minimum[None, :]
    if SWAP:
        acc = tl.trans(acc)
    finish(acc, y, bias, partials, locks, m, n, M, N, tile, split, SPLIT_K, HAS_BIAS)


@triton.jit
def _pair(x, at, K, EVEN_K: tl.constexpr):
    """x[2 at] and x[2 at + 1] as float32: one load where a row holds an even number of features."""
    if EVEN_K:
        pair = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + at)
        if x.dtype.element_ty == tl.bfloat16:
            return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(
                tl.float32, bitcast=True
            )
        return (
            pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
            (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    else:
        return (
            tl.load(x + 2 * at, mask=2 * at < K, other=0.0).to(tl.float32),
            tl.load(x + 2 * at + 1, mask=2 * at + 1 < K, other=0.0).to(tl.float32),
        )


@triton.jit
def gemv(
    x,
    words,
    scales,
    bias,
    y,
    partials,
    locks,
    M,
    N,
    K,
    stride,
    tiles,
    groups,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    MINS: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Without tensor cores: float32 FMA on whole words, one reduction over the words at the end. Arguments as gemm's. A
    thread's loads are 128 bits of weights. Grid (N tiles * M, SPLIT_K), M fastest: a row's weights are the next's."""
    PLANES: tl.constexpr = 16 // BITS
    PER_GROUP: tl.constexpr = _planes_per_group(PLANES, GROUP)
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tile % M
    n = (tile // M) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, 16)
    pair = 4 * (word % 4) + word // 4
    weight_at = words + n[:, None] * 16 + word[None, :]
    acc = tl.zeros((BLOCK_N, 16), tl.float32)
    for trip in range(split, tiles, SPLIT_K):
        held = tl.load(weight_at + trip * stride * 16, eviction_policy="evict_first")
        for plane in tl.static_range(PLANES):
            first = trip * (32 * PLANES) + plane * 32
            at = (trip * (16 * PLANES) + plane * 16 + pair)[None, :]
            if plane % PER_GROUP == 0:
                group = at // 8 if GROUP == 16 else 0 if GROUP == 0 else first // GROUP
                scale, zero, minimum = _group_scale(
                    scales, group, n[:, None], groups, stride, FP8, MINS, BF16_SCALE
                )
                part = tl.zeros_like(acc)
            x_even, x_odd = _pair(x + row * K, at, K, EVEN_K)
            even, odd = decode(
                held, zero, plane, BITS, FP8, False
            )  # float16 holds the integers of either dtype
            part += x_even * even.to(tl.float32)
            part += x_odd * odd.to(tl.float32)
            if (plane + 1) % PER_GROUP == 0:
                acc += part * scale
            if MINS:
                acc += (x_even + x_odd) * minimum
    finish(
        tl.sum(acc, 1)[None, :],
        y,
        bias,
        partials,
        locks,
        row + tl.arange(0, 1),
        n,
        M,
        N,
        tile,
        split,
        SPLIT_K,
        HAS_BIAS,
    )


@triton.jit
def dequantize(
    words,
    scales,
    dense,  # [N, K] float16 or bfloat16
    N,
    K,
    stride,
    groups,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    MINS: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dense weight, columns in canonical order. Grid (N tiles, tiles of K)."""
    PLANES: tl.constexpr = 16 // BITS
    DTYPE: tl.constexpr = dense.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    trip = tl.program_id(1)
    held = tl.load(
        words + trip * stride * 16 + n[:, None] * 16 + tl.arange(0, 16)[None, :],
        eviction_policy="evict_first",
    )
    held = held.reshape(BLOCK_N, 4, 4).permute(0, 2, 1).reshape(BLOCK_N, 16)
    feature = tl.arange(0, 32)
    for plane in tl.static_range(PLANES):
        k = trip * (32 * PLANES) + plane * 32 + feature
        group = tl.zeros_like(k) if GROUP == 0 else k // GROUP
        scale, zero, minimum = _group_scale(
            scales, group[None, :], n[:, None], groups, stride, FP8, MINS, BF16_SCALE
        )
        even, odd = decode(held, tl.zeros((1, 1), tl.float32), plane, BITS, FP8, False)
        q = tl.join(even, odd).reshape(BLOCK_N, 32).to(tl.float32)
        value = (q - zero) * scale + minimum
        tl.store(
            dense + n[:, None].to(tl.int64) * K + k[None, :],
            value.to(DTYPE),
            mask=(n[:, None] < N) & (k[None, :] < K),
        )
