"""GGUF blocks -> QuantizedWeight. Layouts: ggml-common.h, `block_q4_0` and following; values: gguf-py `quants.py`.

A row of a tensor is a run of blocks; each block holds its own scales. All numbers are little endian.

    type  bytes/weights  fields                                    value                  canonical form
    Q4_0      18/32      d fp16 | qs[16]                           d (q - 8)              4 bits, symmetric
    Q4_1      20/32      d m fp16 | qs[16]                         d q + m                4 bits, mins
    Q5_0      22/32      d fp16 | qh[4] | qs[16]                   d (q - 16)             5 bits, symmetric
    Q5_1      24/32      d m fp16 | qh[4] | qs[16]                 d q + m                5 bits, mins
    Q8_0      34/32      d fp16 | int8[32]                         d q                    8 bits, codes q + 128
    MXFP4     17/32      e uint8 | qs[16]                          2^(e - 127) E2M1[q]    16 values (formats/fp4.py)
    Q2_K      84/256     scales[16] | qs[64] | d dmin fp16         d sc q - dmin mn       2 bits, mins, groups of 16
    Q3_K     110/256     hmask[32] | qs[64] | scales[12] | d fp16  d sc (q - 4)           3 bits, symm., groups of 16
    Q4_K     144/256     d dmin fp16 | scales[12] | qs[128]        d sc q - dmin mn       4 bits, mins, groups of 32
    Q5_K     176/256     d dmin fp16 | scales[12] | qh[32] | qs    d sc q - dmin mn       5 bits, mins, groups of 32
    Q6_K     210/256     ql[128] | qh[64] | int8 sc[16] | d fp16   d sc (q - 32)          6 bits, symm., groups of 16

In qs[16], byte j holds element j in its low nibble and element j+16 in its high one; bit j of qh is bit 4 of element j.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...weight import QuantizedWeight
from ..fp4 import E2M1
from .container import BLOCK

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {
    "Q4_0": 4,
    "Q4_1": 4,
    "Q5_0": 5,
    "Q5_1": 5,
    "Q8_0": 8,
    "MXFP4": 4,
    "Q2_K": 2,
    "Q3_K": 3,
    "Q4_K": 4,
    "Q5_K": 5,
    "Q6_K": 6,
}
GROUP = {kind: 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32 for kind in BITS}
TABLES = ("MXFP4",)  # whose codes are numbers of a table
SYMMETRIC = ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")

Decoded = tuple[
    np.ndarray, np.ndarray, np.ndarray | None
]  # codes [n, w] uint8, scales [n, g], mins [n, g] or None


def read_dense(rows: np.ndarray, kind: str) -> Tensor:
    """Bytes uint8 [rows, row_bytes] of an F32, F16 or BF16 tensor -> [rows, columns] in that dtype."""
    return torch.from_numpy(np.array(rows)).view(DENSE[kind])


def read_blocks(rows: np.ndarray, kind: str) -> QuantizedWeight:
    """Bytes uint8 [rows, row_bytes] of a quantized tensor -> QuantizedWeight [rows, columns].

    Scales keep float16 where the block stores them so, and are float32 where they are products (Q4_K, Q5_K, Q6_K).
    """
    n_rows = rows.shape[0]
    weights, size = BLOCK[kind]
    codes, scales, mins = _DECODERS[kind](np.ascontiguousarray(rows).reshape(-1, size))
    group = weights // scales.shape[1]
    table = E2M1 if kind in TABLES else None
    return QuantizedWeight(
        kind="int" if table is None else "table",
        table=table,
        codes=torch.from_numpy(codes.reshape(n_rows, -1)),
        scales=torch.from_numpy(scales.reshape(n_rows, -1)),
        mins=None if mins is None else torch.from_numpy(mins.reshape(n_rows, -1)),
        bits=BITS[kind],
        block=(1, group),
    )


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view(np.float16)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bit(qh: np.ndarray) -> np.ndarray:
    return np.unpackbits(qh, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: np.ndarray) -> Decoded:
    return _nibbles(b[:, 2:]), _half(b, 0), None


def _q4_1(b: np.ndarray) -> Decoded:
    return _nibbles(b[:, 4:]), _half(b, 0), _half(b, 2).astype(np.float32)


def _q5_0(b: np.ndarray) -> Decoded:
    return _nibbles(b[:, 6:]) | _fifth_bit(b[:, 2:6]), _half(b, 0), None


def _q5_1(b: np.ndarray) -> Decoded:
    return _nibbles(b[:, 8:]) | _fifth_bit(b[:, 4:8]), _half(b, 0), _half(b, 2).astype(np.float32)


def _q8_0(b: np.ndarray) -> Decoded:
    return b[:, 2:] ^ 0x80, _half(b, 0), None  # int8 q as the unsigned q + 128


def _scales_and_mins(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first 16 bytes of a Q4_K or Q5_K block -> d*sc and -dmin*mn, float32 [n, 8].

    Six-bit fields in s[12]: sc0-3 low six bits of s0-3, mn0-3 of s4-7; sc4-7 and mn4-7 have their low nibbles in the
    low and high nibbles of s8-11 and their two top bits on top of s0-3 and s4-7.
    """
    s = b[:, 4:16]
    sc = np.concatenate([s[:, 0:4] & 63, (s[:, 8:12] & 15) | (s[:, 0:4] >> 6 << 4)], axis=1)
    mn = np.concatenate([s[:, 4:8] & 63, (s[:, 8:12] >> 4) | (s[:, 4:8] >> 6 << 4)], axis=1)
    d, dmin = _half(b, 0).astype(np.float32), _half(b, 2).astype(np.float32)
    return d * sc.astype(np.float32), -(dmin * mn.astype(np.float32))


def _k_nibbles(qs: np.ndarray) -> np.ndarray:
    """Four chunks of 32 bytes; the low nibbles of chunk c are sub-block 2c, the high ones 2c+1."""
    chunks = qs.reshape(-1, 4, 1, 32)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(-1, 256)


def _crumbs(qs: np.ndarray) -> np.ndarray:
    """Two halves of 32 bytes; the two-bit fields at shift 2s of a half are its run s of 32 elements. -> [n, 256]"""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return (qs.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)


def _q2_k(b: np.ndarray) -> Decoded:
    sc, mn = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    d, dmin = _half(b, 80).astype(np.float32), _half(b, 82).astype(np.float32)
    return _crumbs(b[:, 16:80]), d * sc, -(dmin * mn)


def _q3_k(b: np.ndarray) -> Decoded:
    """Six-bit scales less 32: low nibbles in s0-7 (low, then high), two top bits in s8-11 at shifts 0, 2, 4, 6.
    Bit j of hmask[l] is bit 2 of element 32 j + l."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = (b[:, None, :32] >> shifts & 1).reshape(-1, 256) << np.uint8(2)
    s = b[:, 96:108]
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    top = np.concatenate([s[:, 8:] >> np.uint8(shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    sc = (low | top << np.uint8(4)).astype(np.float32) - 32
    return _crumbs(b[:, 32:96]) | high, _half(b, 108).astype(np.float32) * sc, None


def _q4_k(b: np.ndarray) -> Decoded:
    return _k_nibbles(b[:, 16:]), *_scales_and_mins(b)


def _q5_k(b: np.ndarray) -> Decoded:
    shifts = np.arange(8, dtype=np.uint8).reshape(
        1, 8, 1
    )  # bit s of qh[l] belongs to sub-block s, element l
    high = (b[:, None, 16:48] >> shifts & 1) << np.uint8(4)
    return _k_nibbles(b[:, 48:]) | high.reshape(-1, 256), *_scales_and_mins(b)


def _mxfp4(b: np.ndarray) -> Decoded:
    """Scales are of halves, as the table is; an exponent of 255 is NaN."""
    exponents = b[:, :1].astype(np.float32)
    scales = np.where(exponents < 255, np.exp2(exponents - 128), np.float32("nan"))
    return _nibbles(b[:, 1:]), scales.astype(np.float32), None


def _q6_k(b: np.ndarray) -> Decoded:
    """Two halves of 128 elements: 64 bytes of low nibbles, 32 bytes of two-bit tops for four runs of 32."""
    ql = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << np.uint8(4)
    sc = b[:, 192:208].copy().view(np.int8).astype(np.float32)
    return (low | high).reshape(-1, 256), _half(b, 208).astype(np.float32) * sc, None


_DECODERS: dict[str, Callable[[np.ndarray], Decoded]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
