"""Marlin and bitsandbytes, against decoders that go one element at a time as the formats are described."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.errors import CheckpointError, UnsupportedError
from nibble.quant.formats import awq, bitsandbytes, gptq
from nibble.quant.formats.base import BadTensor
from nibble.quant.pipeline import convert
from nibble.quant.scheme import LayerScheme, QuantScheme

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
    for config in ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
                   {"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True},
                   {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "marlin", "zero_point": False}):
        assert QuantScheme.from_config(config).format == "marlin"
    with pytest.raises(BadTensor, match="multiple of 128"):
        awq.read({"qweight": torch.zeros(2, 64, dtype=torch.int32), "scales": torch.ones(1, 32).half()},
                 LayerScheme("int", 4, -1, True), "marlin")


def to_nf4(weight, nested):
    """bitsandbytes' tensors for a weight, and the weight that they stand for, one element at a time."""
    table = torch.tensor([-1.0, -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0.0, .0796, .1609, .2461, .3379, .4407,
                          .5626, .7230, 1.0])
    flat = weight.float().flatten().tolist()
    absmax = [max(map(abs, flat[i:i + 64])) for i in range(0, len(flat), 64)]
    tensors, fields = {"weight.quant_map": table}, {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16",
                                                     "shape": list(weight.shape)}
    if nested:
        steps, offset = torch.linspace(-1, 1, 256), sum(absmax) / len(absmax)
        spans = [max(abs(a - offset) for a in absmax[i:i + 256]) for i in range(0, len(absmax), 256)]
        codes = [min(range(256), key=lambda c, i=i: abs(float(steps[c]) * spans[i // 256] + offset - absmax[i]))
                 for i in range(len(absmax))]
        absmax = [float(steps[c]) * spans[i // 256] + offset for i, c in enumerate(codes)]
        tensors |= {"weight.absmax": torch.tensor(codes, dtype=torch.uint8), "weight.nested_quant_map": steps,
                    "weight.nested_absmax": torch.tensor(spans)}
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = torch.tensor(absmax)
    codes = [min(range(16), key=lambda c, i=i: abs(float(table[c]) * absmax[i // 64] - flat[i]))
             for i in range(len(flat))]
    tensors["weight"] = torch.tensor([[codes[i] << 4 | codes[i + 1]] for i in range(0, len(codes), 2)],
                                     dtype=torch.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(fields).encode()),
                                                                   dtype=torch.uint8)
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
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (dense / "config.json").write_text(json.dumps(config))


def test_bitsandbytes_comes_dense_and_converts(dense, tmp_path, caplog):
    original, up, down, gate = open_checkpoint(dense), "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"
    plain, want_plain = to_nf4(original.dense(BLOCK0 + up), nested=False)
    nested, want_nested = to_nf4(original.dense(BLOCK0 + down), nested=True)
    rows = torch.randint(-127, 128, (96, 64), dtype=torch.int8)
    int8 = {"weight": rows, "SCB": torch.rand(96) + 0.5, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    quantized_by_bitsandbytes(dense, {BLOCK0 + up: plain, BLOCK0 + down: nested, BLOCK0 + gate: int8})
    checkpoint = open_checkpoint(dense)
    assert "dequantized as they are read" in caplog.text
    assert checkpoint.names() == original.names() and checkpoint.scheme is None
    assert checkpoint.modules() == original.modules()
    assert checkpoint.shape(f"{BLOCK0}{down}.weight") == (64, 96) and checkpoint.nbytes == original.nbytes
    for name, want in ((up, want_plain), (down, want_nested)):
        got = checkpoint.linear(BLOCK0 + name)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-6)
    want = torch.tensor([[int(rows[o, k]) * float(int8["SCB"][o]) / 127 for k in range(64)] for o in range(96)])
    torch.testing.assert_close(checkpoint.linear(BLOCK0 + gate).float(), want, rtol=2**-8, atol=1e-6)
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


def test_hqq_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="hqq"):
        QuantScheme.from_config({"quant_method": "hqq", "quant_config": {}})
