"""What lies in the cache, as numbers a tensor core takes.

16-bit values are taken as they are, float8_e4m3fn by the card's own conversion (cc 8.9 and later). What has none, in
one to two instructions a code, four codes arriving in one register:

    int8    c + 128 in the low byte of 0x6400 is the float16 1024 + 128 + c; minus 1152 is c.
    uint8   the bits of an e4m3fn value: s eeee mmm moved to s 0eeee mmm0000000 is the float16 value / 256, subnormals
            included (exponent biases 7 and 15). The factor goes to the scale: E4M3_FACTOR.

Both are exact, also from float16 on to bfloat16. The interpreter knows no assembly, so each has a plain form.
"""

import triton
import triton.language as tl

E4M3_FACTOR = tl.constexpr(256.0)


@triton.jit
def decode(codes, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """codes: a tile of any cache type -> the same tile in COMPUTE (float16, bfloat16; float32 in the interpreter)."""
    if codes.dtype == tl.int8:
        return _int8(codes, ASM).to(COMPUTE)
    elif codes.dtype == tl.uint8:
        return _e4m3(codes, ASM).to(COMPUTE)
    else:
        return codes.to(COMPUTE)


@triton.jit
def _int8(codes, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 u, magic, bias;
                xor.b32 u, $2, 0x80808080;
                mov.b32 magic, 0x64646464;
                mov.b32 bias, 0x64806480;
                prmt.b32 $0, u, magic, 0x4140;
                prmt.b32 $1, u, magic, 0x4342;
                sub.f16x2 $0, $0, bias;
                sub.f16x2 $1, $1, bias;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return codes.to(tl.float16)


@triton.jit
def _e4m3(bits, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 s;
                prmt.b32 $0, $2, 0, 0x1404;
                prmt.b32 $1, $2, 0, 0x3424;
                shr.b32 s, $0, 1;
                and.b32 s, s, 0x3f803f80;
                lop3.b32 $0, $0, 0x80008000, s, 0xea;
                shr.b32 s, $1, 1;
                and.b32 s, s, 0x3f803f80;
                lop3.b32 $1, $1, 0x80008000, s, 0xea;
            }
            """,
            "=&r,=&r,r",
            [bits],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        wide = bits.to(tl.uint16)
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
