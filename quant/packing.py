"""Bit packing of unsigned codes into int32 words: each order is stated once, here.

Dense little-endian bitstream ("natural" order): code e occupies bits [bits*e, bits*(e+1)) of the stream, and word w
holds stream bits [32w, 32w+32). For 2, 4 and 8 bits every word holds 32/bits whole codes; for 3 bits 32 codes take
3 words and two codes straddle a word border. GPTQ packs qweight along `in` and qzeros along `out` so;
compressed-tensors packs along `in` so.

AWQ GEMM order: as natural 4-bit, but nibble i of a word holds output 8c + AWQ_ORDER[i].
"""

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of word c holds output 8c + AWQ_ORDER[i]
AWQ_SHIFT_OF = tuple(
    AWQ_ORDER.index(j) for j in range(8)
)  # output 8c+j sits in nibble AWQ_SHIFT_OF[j]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] (any integer dtype, 0 <= code < 2**bits) -> int32 words [rows, n*bits/32], natural order.

    Raises ValueError if n*bits is no multiple of 32.
    """
    rows, n = codes.shape
    if n * bits % 32:
        raise ValueError(f"{n} codes of {bits} bits do not fill whole 32-bit words")
    per_unit = 32 if bits == 3 else 32 // bits  # codes in the smallest run of whole words
    words_per_unit = per_unit * bits // 32
    unit = codes.reshape(rows, -1, per_unit).to(torch.int64)
    words = torch.zeros(rows, unit.shape[1], words_per_unit, dtype=torch.int64, device=codes.device)
    for e in range(per_unit):
        word, shift = divmod(e * bits, 32)
        words[:, :, word] |= (unit[:, :, e] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, :, word + 1] |= unit[:, :, e] >> (32 - shift)
    return _to_int32(words.reshape(rows, -1))


def unpack(words: Tensor, bits: int, n: int | None = None) -> Tensor:
    """int32 words [rows, w] -> uint8 codes [rows, n] (default: all that fit), natural order. Inverse of `pack`."""
    rows = words.shape[0]
    per_unit = 32 if bits == 3 else 32 // bits
    words_per_unit = per_unit * bits // 32
    unit = (words.to(torch.int64) & 0xFFFFFFFF).reshape(rows, -1, words_per_unit)
    codes = torch.empty(rows, unit.shape[1], per_unit, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for e in range(per_unit):
        word, shift = divmod(e * bits, 32)
        value = unit[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (unit[:, :, word + 1] << (32 - shift))
        codes[:, :, e] = (value & mask).to(torch.uint8)
    codes = codes.reshape(rows, -1)
    return codes if n is None else codes[:, :n]


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit codes [rows, n], n % 8 == 0 -> int32 [rows, n/8] in AWQ GEMM nibble order."""
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    return pack(codes.reshape(codes.shape[0], -1, 8)[:, :, order].reshape(codes.shape), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [rows, w] in AWQ GEMM nibble order -> uint8 codes [rows, 8w]. Inverse of `pack_awq`."""
    where = torch.tensor(AWQ_SHIFT_OF, device=words.device)
    codes = unpack(words, 4)
    return codes.reshape(codes.shape[0], -1, 8)[:, :, where].reshape(codes.shape)


def _to_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
