"""AWQ and GPTQ against decoders written from the formats' descriptions, one element at a time."""

import numpy as np
import pytest
import torch

from nibble.quant.formats import awq, gptq
from nibble.quant.formats.base import BadTensor
from nibble.quant.packing import pack
from nibble.quant.scheme import LayerScheme
from nibble.quant.weight import QuantizedWeight


def field(words, e, bits):
    """Element e of a dense little-endian bitstream over int32 words."""
    stream = int.from_bytes(np.asarray(words, np.int32).tobytes(), "little")
    return (stream >> (bits * e)) & (2**bits - 1)


def weight(out_features, in_features, bits, group, asym=True, seed=0, perm=False, lowest_zero=1):
    rng = torch.Generator().manual_seed(seed)
    shape = (out_features, -(-in_features // group))
    return QuantizedWeight(
        codes=torch.randint(
            0, 2**bits, (out_features, in_features), generator=rng, dtype=torch.uint8
        ),
        scales=(torch.randn(shape, generator=rng) * 0.1).half(),  # either sign: both occur
        zeros=torch.randint(lowest_zero, 2**bits, shape, generator=rng, dtype=torch.uint8)
        if asym
        else None,
        perm=torch.randperm(in_features, generator=rng) if perm else None,
        bits=bits,
        block=(1, group),
    )


def same(a, b):
    return a.block == b.block and torch.equal(a.dequantize(), b.dequantize())


def decode_awq_gemm(t, group):
    in_features, out_features = t["qweight"].shape[0], t["qweight"].shape[1] * 8
    shift = [0, 4, 1, 5, 2, 6, 3, 7]
    dense = np.zeros((out_features, in_features), np.float32)
    for o in range(out_features):
        for k in range(in_features):
            q = (int(t["qweight"][k, o // 8]) >> (4 * shift[o % 8])) & 15
            z = (int(t["qzeros"][k // group, o // 8]) >> (4 * shift[o % 8])) & 15
            dense[o, k] = np.float32(q - z) * np.float32(t["scales"][k // group, o])
    return torch.from_numpy(dense)


def decode_gptq(t, bits, v1):
    in_features, out_features = len(t["g_idx"]), t["qweight"].shape[1]
    qweight, qzeros = t["qweight"].numpy(), t["qzeros"].numpy()
    dense = np.zeros((out_features, in_features), np.float32)
    for o in range(out_features):
        for k in range(in_features):
            g = int(t["g_idx"][k])
            z = field(qzeros[g], o, bits) + v1
            dense[o, k] = np.float32(field(qweight[:, o], k, bits) - z) * np.float32(
                t["scales"][g, o]
            )
    return torch.from_numpy(dense)


@pytest.mark.parametrize(
    "out_features, in_features, group", [(16, 64, 32), (8, 48, 16), (24, 36, 36)]
)
@pytest.mark.parametrize("asym", [True, False])
def test_awq_gemm(out_features, in_features, group, asym):
    source = weight(out_features, in_features, 4, group, asym, lowest_zero=0)
    tensors = awq.write(source)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "qweight": (torch.int32, (in_features, out_features // 8)),
        "qzeros": (torch.int32, (in_features // group, out_features // 8)),
        "scales": (torch.float16, (in_features // group, out_features)),
    }
    assert torch.equal(decode_awq_gemm(tensors, group), source.dequantize())
    assert same(awq.read(tensors, LayerScheme("int", 4, group, False)), source)


def test_awq_group_comes_from_the_shapes_where_the_config_does_not_fit():
    source = weight(8, 96, 4, 32)
    assert awq.read(awq.write(source), LayerScheme("int", 4, 128, False)).group_size == 32


def test_awq_gemv_padding_is_cut_off():
    source = weight(8, 64, 4, 32)
    zeros, scales = torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.float16)
    zeros[:, :2], scales[:, :2] = source.zeros, source.scales
    tensors = {"qweight": pack(source.codes, 4), "qzeros": pack(zeros, 4), "scales": scales}
    assert same(awq.read(tensors, LayerScheme("int", 4, 32, False), "gemv"), source)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("perm", [False, True])
def test_gptq_all_bits_both_versions_and_act_order(bits, fmt, perm):
    source = weight(32, 96, bits, 64, perm=perm)  # the last group holds half as many columns
    tensors = gptq.write(source, fmt)
    assert tensors["qweight"].shape == (96 * bits // 32, 32) and tensors["qzeros"].shape == (
        2,
        32 * bits // 32,
    )
    assert tensors["g_idx"].dtype == torch.int32
    assert torch.equal(decode_gptq(tensors, bits, fmt == "gptq"), source.dequantize())
    again = gptq.read(tensors, LayerScheme("int", bits, 64, False, desc_act=perm), fmt)
    assert same(again, source) and (again.perm is not None) == perm


@pytest.mark.parametrize(
    "bits, v1, v2",
    [(4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080), (2, 0x55555555, 0xAAAAAAAA)],
)
def test_gptq_symmetric_zero_words(bits, v1, v2):
    source = weight(32, 32, bits, 32, asym=False)
    assert (gptq.write(source, "gptq")["qzeros"] == v1).all()
    assert (gptq.write(source, "gptq_v2")["qzeros"].long() & 0xFFFFFFFF == v2).all()
    assert same(gptq.read(gptq.write(source), LayerScheme("int", bits, 32, True)), source)


def test_gptq_without_g_idx_and_with_a_group_unlike_the_config():
    source = weight(32, 96, 4, 32)
    tensors = gptq.write(source)
    del tensors["g_idx"]
    assert same(gptq.read(tensors, LayerScheme("int", 4, 128, False)), source)


def test_gptq_v1_zero_of_an_underflow_is_read_as_zero():
    """AutoGPTQ and its readers: z = 0 is stored as 15 and read back as (15 + 1) & 15."""
    source = weight(8, 32, 4, 32)
    tensors = gptq.write(source)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    assert (gptq.read(tensors, LayerScheme("int", 4, 32, False)).zeros == 0).all()


def test_what_a_format_cannot_hold_is_refused():
    source = weight(8, 32, 4, 32)
    source.zeros[3, 0] = 0
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq.write(source)
    assert same(
        gptq.read(gptq.write(source, "gptq_v2"), LayerScheme("int", 4, 32, False), "gptq_v2"),
        source,
    )
    with pytest.raises(ValueError, match="whole 32-bit words"):
        gptq.write(weight(8, 36, 4, 36))
    with pytest.raises(ValueError, match="8 bits"):
        awq.write(weight(8, 32, 8, 32))
    with pytest.raises(ValueError, match="column order"):
        awq.write(weight(8, 32, 4, 32, perm=True))
    with pytest.raises(ValueError, match="multiple of the group"):
        awq.write(weight(8, 48, 4, 32))
    source = weight(8, 32, 4, 32)
    source.scales = source.scales.float() * 1.0001
    with pytest.raises(ValueError, match="float16"):
        awq.write(source)


def broken(tensors, suffix, change):
    return tensors | {suffix: change(tensors[suffix].clone())}


@pytest.mark.parametrize(
    "suffix, change, problem",
    [
        ("qweight", lambda t: t[:, :-1], "scales has shape"),
        ("qweight", lambda t: t.float(), "dtype"),
        ("qzeros", lambda t: t[:1], r"qzeros has shape \[1, 1\], want \[2, 1\]"),
        ("scales", lambda t: t[:, :-1], r"scales has shape \[2, 7\], want \[2, 8\]"),
        ("scales", lambda t: t.index_fill(0, torch.tensor(1), float("nan")), "NaN"),
        ("scales", lambda t: t.index_fill(0, torch.tensor(0), float("-inf")), "infinity"),
    ],
)
def test_damaged_awq(suffix, change, problem):
    tensors = broken(awq.write(weight(8, 64, 4, 32)), suffix, change)
    with pytest.raises(BadTensor, match=problem):
        awq.read(tensors, LayerScheme("int", 4, 32, False))


@pytest.mark.parametrize(
    "suffix, change, problem",
    [
        ("qweight", lambda t: t[:-1], r"qweight has shape \[7, 8\], want \[8, 8\]"),
        ("qzeros", lambda t: t.repeat(1, 2), "qzeros has shape"),
        ("scales", lambda t: t[:1], "g_idx names group 1, but there are 1"),
        ("scales", lambda t: t * float("inf"), "infinity"),
        ("g_idx", lambda t: t.index_fill(0, torch.tensor(5), 2), "names group 2"),
        ("g_idx", lambda t: t.index_fill(0, torch.tensor(5), -1), "names group -1"),
        ("g_idx", lambda t: t.index_fill(0, torch.tensor(5), 1), "unequal sizes"),
    ],
)
def test_damaged_gptq(suffix, change, problem):
    tensors = broken(gptq.write(weight(8, 64, 4, 32)), suffix, change)
    with pytest.raises(BadTensor, match=problem):
        gptq.read(tensors, LayerScheme("int", 4, 32, False))


def test_a_missing_tensor_is_named():
    tensors = awq.write(weight(8, 64, 4, 32))
    del tensors["scales"]
    with pytest.raises(BadTensor, match="scales is missing"):
        awq.read(tensors, LayerScheme("int", 4, 32, False))
