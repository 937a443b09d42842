"""What the loops are told of a format: two @triton.jit functions, handed in as constants (a `Decode` of layout.py).

    code(packed, zero, PLANE, BITS, BF16) -> (even, odd)
        plane PLANE of the int32 words `packed`, minus `zero` (float32, broadcast): even and odd features, exact, in
        float16 or (BF16) bfloat16
    scale(scales, group, n, groups, padded_out, BITS) -> (scale, zero, minimum)
        of outputs n in `group`, float32: w = (code - zero) * scale + minimum

Here is the `code` of integers, which AWQ, GPTQ and GGUF share. It is two instructions for two weights, in PTX because
Triton has no packed halves; the interpreter, which runs no PTX, takes the plain path beside it (`INTERPRETED`).
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
_FP16_TIMES = tl.constexpr("{ .reg .b32 t; fma.rn.f16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t; }")
_BF16_TIMES = tl.constexpr("{ .reg .b32 t; fma.rn.bf16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t; }")
_PAIR = tl.constexpr("=h,=h,r,r,r,r,r")


@triton.constexpr_function
def planes_per_group(planes, group):
    """How many planes in a row share a scale, at any tile: the partial sum is scaled after as many."""
    if group == 0 or group % (32 * planes) == 0:
        return planes
    return group // 32 if group >= 32 and planes % (group // 32) == 0 else 1


@triton.jit
def integers(packed, zero, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Codes of 2, 3, 4 or 8 bits.

    A mantissa holds 10 bits (float16) or 7 (bfloat16) under the magic exponent, so as many planes need no shift of
    their own; a plane that lies higher in the mantissa is brought down by the multiplication.
    """
    if BF16 and BITS == 8:
        return _bytes(packed, zero, PLANE)
    else:
        return _narrow(packed, zero, PLANE, BITS, BF16)


@triton.jit
def _narrow(packed, zero, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    FIT: tl.constexpr = (7 if BF16 else 10) // BITS
    LOW: tl.constexpr = (PLANE % FIT) * BITS
    MASK: tl.constexpr = (((1 << BITS) - 1) << LOW) * 0x10001
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    OFFSET: tl.constexpr = (128.0 if BF16 else 1024.0) / (1 << LOW)
    SHIFT: tl.constexpr = (PLANE // FIT) * FIT * BITS
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    shifted = packed >> SHIFT
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
def _bytes(packed, zero, PLANE: tl.constexpr):
    """8 bits do not fit a bfloat16 mantissa: 2**23 + q in float32, then rounded (exactly: |q - zero| < 256)."""
    even = (((packed >> (8 * PLANE)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (
        8388608.0 + zero
    )
    odd = (((packed >> (8 * PLANE + 16)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (
        8388608.0 + zero
    )
    return even.to(tl.bfloat16), odd.to(tl.bfloat16)


@triton.jit
def times(pair, FACTOR: tl.constexpr, BF16: tl.constexpr):
    """Both 16-bit floats of `pair` times FACTOR's, in one instruction: (low, high). No interpreter runs it."""
    if BF16:
        low, high = tl.inline_asm_elementwise(
            _BF16_TIMES,
            "=h,=h,r,r,r",
            [pair, FACTOR, -2147450880],  # plus -0 and -0, 0x80008000
            (tl.bfloat16, tl.bfloat16),
            True,
            1,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _FP16_TIMES,
            "=h,=h,r,r,r",
            [pair, FACTOR, -2147450880],
            (tl.float16, tl.float16),
            True,
            1,
        )
    return low, high
