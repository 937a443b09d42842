"""FP8 and compressed-tensors; the compressed-tensors package is the oracle for its own format."""

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from nibble.quant.formats import compressed_tensors as ct
from nibble.quant.formats import fp8
from nibble.quant.formats.base import BadTensor
from nibble.quant.scheme import LayerScheme
from nibble.quant.weight import QuantizedWeight


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def their_scheme(bits, group, symmetric):
    strategy = "channel" if group == -1 else "group"
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy=strategy,
        group_size=None if group == -1 else group,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def their_state(dense, bits, group, symmetric):
    n_groups = 1 if group == -1 else dense.shape[1] // group
    state = {
        "weight": dense,
        "weight_scale": random(dense.shape[0], n_groups, seed=1).abs().bfloat16() / 8 + 0.01,
    }
    if not symmetric:
        points = torch.arange(dense.shape[0] * n_groups).reshape(dense.shape[0], n_groups)
        state["weight_zero_point"] = (points % 2**bits - 2 ** (bits - 1)).to(torch.int8)
    return state


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized_is_the_packages(bits, group, symmetric):
    scheme = their_scheme(bits, group, symmetric)
    packed = PackedQuantizationCompressor.compress(
        their_state(random(20, 96).bfloat16(), bits, group, symmetric), scheme
    )
    theirs = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    layer = LayerScheme("int", bits, group, symmetric)
    weight = ct.read(packed, layer)
    assert weight.scales.dtype == torch.bfloat16 and weight.group_size == (
        96 if group == -1 else group
    )
    assert torch.equal(weight.dequantize(torch.bfloat16), theirs)
    ours = ct.write(weight)
    assert ours.keys() == packed.keys() and all(torch.equal(ours[n], packed[n]) for n in ours)


def test_int_quantized_is_the_packages():
    scheme = their_scheme(8, -1, True)
    stored = IntQuantizationCompressor.compress(
        their_state(random(6, 64).bfloat16(), 8, -1, True), scheme
    )
    theirs = IntQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
    weight = ct.read(stored, LayerScheme("int", 8, -1, True, strategy="channel"))
    assert torch.equal(weight.dequantize(torch.bfloat16), theirs)
    assert torch.equal(ct.write(weight, "int-quantized")["weight"], stored["weight"])


def blockwise(codes, scale, block):
    """Element by element, as DeepSeek's weight_dequant says."""
    dense = torch.empty(codes.shape)
    for o in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            dense[o, k] = codes[o, k].float() * scale[o // block[0], k // block[1]]
    return dense


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize(
    "shape, block",
    [((), (12, 20)), ((1,), (12, 20)), ((12,), (1, 20)), ((12, 1), (1, 20)), ((2, 3), (8, 8))],
)
def test_fp8_scales_of_every_shape(suffix, shape, block):
    codes = random(12, 20).to(torch.float8_e4m3fn)
    scale = random(*shape, seed=2) if shape else torch.tensor(0.25)
    tensors = {"weight": codes, suffix: scale}
    layer = LayerScheme("fp8", 8, -1, True, block=(8, 8), strategy="block")
    for reader in (fp8, ct):
        if reader is ct and suffix == "weight_scale_inv":
            continue
        weight = reader.read(tensors, layer)
        grid = (
            scale.reshape(1, 1)
            if scale.numel() == 1
            else scale.reshape(12, 1)
            if scale.shape[0] == 12
            else scale
        )
        assert weight.block == block and torch.equal(
            weight.dequantize(), blockwise(codes, grid, block)
        )


def fp8_weight(block):
    grid = (-(-12 // block[0]), -(-20 // block[1]))
    return QuantizedWeight(
        codes=random(12, 20).to(torch.float8_e4m3fn),
        scales=random(*grid),
        kind="fp8",
        bits=8,
        block=block,
    )


def test_fp8_round_trips():
    for block, writer, scale in [
        ((12, 20), fp8, "weight_scale"),
        ((8, 8), fp8, "weight_scale_inv"),
        ((1, 20), ct, "weight_scale"),
        ((12, 20), ct, "weight_scale"),
    ]:
        source = fp8_weight(block)
        tensors = writer.write(source, "float-quantized")
        again = writer.read(tensors, LayerScheme("fp8", 8, -1, True, block=(8, 8)))
        assert tensors.keys() == {"weight", scale} and torch.equal(
            again.dequantize(), source.dequantize()
        )
    with pytest.raises(ValueError, match="channel"):
        fp8.write(fp8_weight((1, 20)))


def test_static_input_scale_is_kept():
    tensors = {
        "weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor(1.0),
        "input_scale": torch.tensor(0.5),
    }
    layer = LayerScheme("fp8", 8, -1, True, strategy="tensor", act_quant="tensor")
    weight = fp8.read(tensors, layer)
    assert weight.input_scale.tolist() == [0.5] and weight.act_quant == "tensor"


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"weight_scale": torch.ones(3)}, "weight_scale has shape"),
        ({"weight_scale": torch.full((12, 1), float("nan"))}, "NaN"),
        (
            {"weight": torch.full((12, 20), float("nan")).to(torch.float8_e4m3fn)},
            "weight holds NaN",
        ),
        ({"input_scale": torch.ones(2)}, "input_scale has shape"),
    ],
)
def test_damaged_fp8(change, problem):
    tensors = {
        "weight": random(12, 20).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(12, 1),
    } | change
    with pytest.raises(BadTensor, match=problem):
        ct.read(tensors, LayerScheme("fp8", 8, -1, True, strategy="channel"))


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"weight_shape": torch.tensor([20, 97])},
            r"weight_packed has shape \[20, 12\], want \[20, 13\]",
        ),
        ({"weight_scale": torch.ones(19, 3)}, "weight_scale has shape"),
        ({"weight_scale": torch.ones(20, 7)}, "7 groups"),
        (
            {"weight_zero_point": torch.zeros(2, 3, dtype=torch.int32)},
            "weight_zero_point has shape",
        ),
        ({"weight_g_idx": torch.full((96,), 9, dtype=torch.int32)}, "weight_g_idx names group 9"),
    ],
)
def test_damaged_pack_quantized(change, problem):
    state = their_state(random(20, 96).bfloat16(), 4, 32, True)
    tensors = PackedQuantizationCompressor.compress(state, their_scheme(4, 32, True)) | change
    with pytest.raises(BadTensor, match=problem):
        ct.read(tensors, LayerScheme("int", 4, 32, True))
