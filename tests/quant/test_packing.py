"""Packing against a decoder that reads the words as one long little-endian integer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.quant.packing import pack, pack_awq, unpack, unpack_awq


def bitstream(words, bits, n):
    """Codes of one row of int32 words: code e is bits [bits*e, bits*e + bits) of the stream."""
    number = int.from_bytes(
        b"".join(int(w).to_bytes(4, "little", signed=True) for w in words), "little"
    )
    return [(number >> (bits * e)) & (2**bits - 1) for e in range(n)]


@settings(deadline=None, max_examples=20)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    units=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pack_is_a_dense_bitstream_and_unpack_its_inverse(bits, rows, units, seed):
    n = units * 32
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, n * bits // 32)
    for row in range(rows):
        assert bitstream(words[row], bits, n) == codes[row].tolist()
    assert torch.equal(unpack(words, bits), codes.to(torch.uint8))
    assert torch.equal(unpack(words, bits, n - 5), codes[:, : n - 5].to(torch.uint8))


def test_three_bit_words_are_auto_gptqs():
    """AutoGPTQ: word 0 ends with the low two bits of e10, word 1 begins with its top bit; e21 is split 1 + 2."""
    codes = torch.zeros(1, 32, dtype=torch.int64)
    codes[0, 10], codes[0, 21] = 0b101, 0b110
    assert pack(codes, 3)[0].tolist() == [0b01 << 30, 1, 0b11]


def test_awq_nibble_order():
    """Nibble i of a word holds output [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    words = pack_awq(torch.arange(8).reshape(1, 8))
    assert [(int(words[0, 0]) >> 4 * i) & 15 for i in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]
    codes = torch.randint(0, 16, (3, 24), dtype=torch.uint8)
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack(torch.zeros(1, 7, dtype=torch.int64), 4)
