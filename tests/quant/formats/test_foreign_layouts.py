"""Marlin, bitsandbytes and HQQ, against decoders that go one element at a time as the formats are described."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import nibble
from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.formats import awq, bitsandbytes, gptq, hqq
from nibble.quant.formats.base import BadTensor
from nibble.quant.scheme import LayerScheme, QuantScheme

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}
BLOCK0 = "model.layers.0."


def marlin_pack(codes, scales):
    """codes [in][out], scales [groups][out]: which word and nibble does each code go to?

    Thread t of a warp holds, of each 16 x 16 tile, rows 2(t%4) + {0, 1, 8, 9} of columns t//4 and t//4 + 8. It reads
    128 bits: one word for each of four tiles that lie side by side, in which its eight codes, column after column, go
    to nibbles 0, 4, 1, 5, 2, 6, 3, 7.
    """
    in_features, out_features = codes.shape
    words = torch.zeros(in_features // 16, out_features * 2, dtype=torch.int64)
    for k in range(in_features):
        for n in range(out_features):
            row, column = k % 16, n % 16
            thread = column % 8 * 4 + row % 8 // 2
            element = column // 8 * 4 + row // 8 * 2 + row % 2
            four, tile = n // 16 // 4, n // 16 % 4
            word = four * 128 + thread * 4 + tile
            words[k // 16, word] |= int(codes[k, n]) << 4 * [0, 4, 1, 5, 2, 6, 3, 7][element]
    stored = torch.empty_like(scales)
    run = 64 if len(scales) > 1 else 32
    for n in range(out_features):
        base, c = n // run * run, n % run
        # an 8 x 8 square transposed; or pairs of columns that are 8 apart, side by side
        at = c % 8 * 8 + c // 8 if run == 64 else c % 8 // 2 * 8 + c // 8 * 2 + c % 2
        stored[:, base + at] = scales[:, n]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), stored


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("reader", "names"), [(awq, ("qweight", "scales")), (gptq, ("B", "s"))])
def test_marlin(reader, names, groups):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (96, 128), generator=generator)
    scales = torch.rand(groups, 128, generator=generator).half()
    layer = LayerScheme("int", 4, 96 // groups if groups > 1 else -1, True)
    weight = reader.read(dict(zip(names, marlin_pack(codes, scales), strict=True)), layer, "marlin")
    want = (codes.float() - 8) * scales.float().repeat_interleave(96 // groups, 0)
    assert torch.equal(weight.dequantize(), want.T)


def test_marlin_is_known_by_its_config_and_never_written():
    for config in (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True},
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "version": "marlin",
            "zero_point": False,
        },
    ):
        assert QuantScheme.from_config(config).format == "marlin"
    with pytest.raises(BadTensor, match="multiple of 128"):
        awq.read(
            {"qweight": torch.zeros(2, 64, dtype=torch.int32), "scales": torch.ones(1, 32).half()},
            LayerScheme("int", 4, -1, True),
            "marlin",
        )


def to_nf4(weight, nested):
    """bitsandbytes' tensors for a weight, and the weight that they stand for, one element at a time."""
    table = torch.tensor(
        [
            -1.0,
            -0.6962,
            -0.5251,
            -0.3949,
            -0.2844,
            -0.1848,
            -0.0911,
            0.0,
            0.0796,
            0.1609,
            0.2461,
            0.3379,
            0.4407,
            0.5626,
            0.7230,
            1.0,
        ]
    )
    flat = weight.float().flatten().tolist()
    absmax = [max(map(abs, flat[i : i + 64])) for i in range(0, len(flat), 64)]
    tensors, fields = (
        {"weight.quant_map": table},
        {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)},
    )
    if nested:
        steps, offset = torch.linspace(-1, 1, 256), sum(absmax) / len(absmax)
        spans = [
            max(abs(a - offset) for a in absmax[i : i + 256]) for i in range(0, len(absmax), 256)
        ]
        codes = [
            min(
                range(256),
                key=lambda c, i=i: abs(float(steps[c]) * spans[i // 256] + offset - absmax[i]),
            )
            for i in range(len(absmax))
        ]
        absmax = [float(steps[c]) * spans[i // 256] + offset for i, c in enumerate(codes)]
        tensors |= {
            "weight.absmax": torch.tensor(codes, dtype=torch.uint8),
            "weight.nested_quant_map": steps,
            "weight.nested_absmax": torch.tensor(spans),
        }
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = torch.tensor(absmax)
    codes = [
        min(range(16), key=lambda c, i=i: abs(float(table[c]) * absmax[i // 64] - flat[i]))
        for i in range(len(flat))
    ]
    tensors["weight"] = torch.tensor(
        [[codes[i] << 4 | codes[i + 1]] for i in range(0, len(codes), 2)], dtype=torch.uint8
    )
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(fields).encode()), dtype=torch.uint8
    )
    dense = torch.tensor([float(table[c]) * absmax[i // 64] for i, c in enumerate(codes)])
    return tensors, dense.reshape(weight.shape)


def quantized_by_bitsandbytes(dense, modules):
    """Rewrites a dense folder; modules: name -> its new tensors."""
    tensors = load_file(dense / "model.safetensors")
    for module, replacing in modules.items():
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in replacing.items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    (dense / "config.json").write_text(json.dumps(config))


def test_bitsandbytes_comes_dense_and_converts(dense, tmp_path, caplog):
    original, up, down, gate = (
        open_checkpoint(dense),
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.gate_proj",
    )
    plain, want_plain = to_nf4(original.dense(BLOCK0 + up), nested=False)
    nested, want_nested = to_nf4(original.dense(BLOCK0 + down), nested=True)
    rows = torch.randint(-127, 128, (96, 64), dtype=torch.int8)
    int8 = {
        "weight": rows,
        "SCB": torch.rand(96) + 0.5,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    quantized_by_bitsandbytes(
        dense, {BLOCK0 + up: plain, BLOCK0 + down: nested, BLOCK0 + gate: int8}
    )
    checkpoint = open_checkpoint(dense)
    assert "dequantized as they are read" in caplog.text
    assert checkpoint.names() == original.names() and checkpoint.scheme is None
    assert checkpoint.modules() == original.modules()
    assert (
        checkpoint.shape(f"{BLOCK0}{down}.weight") == (64, 96)
        and checkpoint.nbytes == original.nbytes
    )
    for name, want in ((up, want_plain), (down, want_nested)):
        got = checkpoint.linear(BLOCK0 + name)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-6)
    want = torch.tensor(
        [[int(rows[o, k]) * float(int8["SCB"][o]) / 127 for k in range(64)] for o in range(96)]
    )
    torch.testing.assert_close(
        checkpoint.linear(BLOCK0 + gate).float(), want, rtol=2**-8, atol=1e-6
    )
    out = open_checkpoint(convert(dense, tmp_path / "out", "fp8", **FAST))
    torch.testing.assert_close(out.dense(BLOCK0 + up), want_plain, rtol=0.07, atol=1e-2)


@pytest.mark.parametrize(("change", "problem"), [
    ({"weight.absmax": torch.ones(5)}, r"absmax.*has shape \[5\], want \[96\]"),
    ({"weight.quant_map": torch.full((16,), float("nan"))}, "quant_map.*NaN"),
    ({"weight": torch.zeros(7, 1, dtype=torch.uint8)}, r"weight.*has shape \[7\]"),
    ({bitsandbytes.STATES[0]: torch.tensor(list(b"not json"), dtype=torch.uint8)}, "no quantization state"),
    ({bitsandbytes.STATES[0]: torch.tensor(list(b'{"shape": [64], "dtype": "bfloat16", "blocksize": 64}'),
                                           dtype=torch.uint8)}, r"shape \[64\]")])  # fmt: skip
def test_damaged_bitsandbytes(dense, change, problem):
    tensors, _ = to_nf4(open_checkpoint(dense).dense(BLOCK0 + "mlp.up_proj"), nested=False)
    quantized_by_bitsandbytes(dense, {BLOCK0 + "mlp.up_proj": tensors | change})
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(dense).linear(BLOCK0 + "mlp.up_proj")


HQQ_PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
HQQ_CONFIG = {
    "quant_method": "hqq",
    "skip_modules": ["lm_head"],
    "quant_config": {
        "weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1},
        "scale_quant_params": None,
        "zero_quant_params": None,
    },
}


def to_hqq(codes, scales, zeros, bits, axis):
    """HQQ's tensors for codes [out, in] in groups of consecutive elements, and the weight that they stand for."""
    out_features, in_features = codes.shape
    flat, groups = codes.flatten().tolist(), len(scales)
    group = len(flat) // groups
    rows, columns = (groups, group) if axis == 1 else (group, groups)
    per = 10 if bits == 3 else 8 // bits
    packed = [[0] * columns for _ in range(-(-rows // per))]
    dense = torch.empty(len(flat))
    for i, code in enumerate(flat):
        row, column = i // columns, i % columns
        packed[row % len(packed)][column] |= code << bits * (per - 1 - row // len(packed))
        at = row if axis == 1 else column
        dense[i] = (code - float(zeros[at])) * float(scales[at])
    shape = (groups, 1) if axis == 1 else (1, groups)
    tensors = {
        "W_q": torch.tensor(packed).to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scales.view(shape),
        "zero": zeros.view(shape),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "shape": torch.tensor([out_features, in_features]),
        "packing": torch.tensor([ord(c) for c in HQQ_PACKING[bits]], dtype=torch.uint8),
        "nbits": torch.tensor(bits, dtype=torch.int32),
    }
    return tensors, dense.view(out_features, in_features)


def hqq_weight(bits, axis, groups, out_features=24, in_features=64):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator)
    scales = torch.rand(groups, generator=generator) + 0.5
    return to_hqq(codes, scales, torch.rand(groups, generator=generator) * 2**bits, bits, axis)


@pytest.mark.parametrize("bits", HQQ_PACKING)
@pytest.mark.parametrize(("axis", "groups"), [(1, 48), (1, 24), (0, 48), (1, 16)])
def test_hqq(bits, axis, groups):
    tensors, want = hqq_weight(bits, axis, groups)
    weight = hqq.read(tensors, LayerScheme("int", bits, 24 * 64 // groups, False))
    if axis == 1 and groups != 16 and bits > 1:
        assert weight.block == (1, 24 * 64 // groups)
        weight = weight.dequantize()
    torch.testing.assert_close(weight, want, rtol=1e-5, atol=1e-4)


def test_hqq_checkpoint(dense):
    original = open_checkpoint(dense)
    tensors, want = hqq_weight(4, 1, 96, 96, 64)
    quantized_by_bitsandbytes(dense, {BLOCK0 + "mlp.up_proj": tensors})
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"quantization_config": HQQ_CONFIG}))
    checkpoint = open_checkpoint(dense)
    assert checkpoint.scheme.method == "hqq" and checkpoint.modules() == original.modules()
    torch.testing.assert_close(
        checkpoint.linear(BLOCK0 + "mlp.up_proj").dequantize(), want, rtol=1e-5, atol=1e-4
    )


def test_hqq_scheme():
    scheme = QuantScheme.from_config(HQQ_CONFIG)
    assert scheme.layer("model.layers.0.mlp.up_proj") == LayerScheme("int", 4, 64, False)
    assert scheme.layer("lm_head") is None
    mixed = {
        "self_attn.q_proj": HQQ_CONFIG["quant_config"],
        "mlp.up_proj": {"weight_quant_params": {"nbits": 2, "group_size": None, "axis": 1}},
    }
    scheme = QuantScheme.from_config(HQQ_CONFIG | {"quant_config": mixed})
    assert scheme.layer("model.layers.3.self_attn.q_proj").bits == 4
    assert scheme.layer("model.layers.3.mlp.up_proj") == LayerScheme("int", 2, -1, False)
    assert scheme.layer("model.layers.3.mlp.down_proj") is None
    with pytest.raises(UnsupportedError, match="scale_quant_params"):
        QuantScheme.from_config(HQQ_CONFIG | {"quant_config": HQQ_CONFIG["quant_config"] |
                                              {"scale_quant_params": {"nbits": 8}}})  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), [
    ({"packing": torch.tensor(list(b"9bit_u8"), dtype=torch.uint8)}, "packing.*is '9bit_u8'"),
    ({"shape": torch.tensor([24, 65])}, "scale.*not that of groups along axis 1"),
    ({"shape": torch.tensor([24, 64, 1])}, "shape.*want 2 integers"),
    ({"zero": torch.zeros(47, 1)}, r"zero.*has shape \[47, 1\]"),
    ({"W_q": torch.zeros(23, 32, dtype=torch.uint8)}, r"W_q.*has shape \[23, 32\], want \[24, 32\]"),
    ({"axis": torch.tensor(2)}, "axis 2"), ({"shape": torch.tensor([0, 0])}, "shape")])  # fmt: skip
def test_damaged_hqq(change, problem):
    with pytest.raises(BadTensor, match=problem):
        hqq.read(hqq_weight(4, 1, 48)[0] | change, LayerScheme("int", 4, 32, False))
