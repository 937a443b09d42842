"""Layouts that other tools write and Nibble reads: each against a packer or decoder written from its description."""

import json
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nibble
from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.formats import awq, fp8
from nibble.quant.scheme import LayerScheme, QuantScheme

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}


@pytest.fixture
def dense(make_gguf, tmp_path):
    dequantize_checkpoint(open_checkpoint(make_gguf("llama")), tmp_path / "dense")
    return tmp_path / "dense"


def pack_gemv_fast(codes):
    """AutoAWQ's gemv_fast, one code at a time: where does the code of row o, column k go?"""
    out_features, in_features = codes.shape
    words = np.zeros((out_features // 4, in_features), np.uint16)
    for o in range(out_features):
        for k in range(in_features):
            a, b, c = k % 32 // 8, k % 8 // 2, k % 2  # element 8a + 2b + c goes to 8b + 2a + c,
            eighth, h = b, 2 * a + c  # and within eight, evens go first
            column = k // 32 * 32 + 8 * eighth + (h // 2 if h % 2 == 0 else 4 + h // 2)
            nibble = o % 4 * 64 + column % 64  # in the run of 4 rows x 64 columns
            words[o // 4, column // 64 * 64 + nibble // 4] |= int(codes[o, k]) << 4 * (nibble % 4)
    return torch.from_numpy(words.view(np.int16))


@pytest.mark.parametrize("name", ["qzeros", "scaled_zeros"])
def test_awq_gemv_fast(name):
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 192), generator=rng, dtype=torch.uint8)
    scales = torch.rand(3, 8, generator=rng).half()
    zeros = torch.randint(0, 16, (3, 8), generator=rng)
    padded = torch.zeros(16, 8, dtype=torch.float16)
    tensors = {"qweight": pack_gemv_fast(codes), "scales": padded.clone(), name: padded.clone()}
    tensors["scales"][:3], tensors[name][:3] = scales, -(scales.float() * zeros).half()
    weight = awq.read(tensors, LayerScheme("int", 4, 64, False), "gemv_fast")
    want = codes.float() * scales.T.float().repeat_interleave(64, 1) + tensors[name][
        :3
    ].T.float().repeat_interleave(64, 1)
    assert torch.equal(weight.dequantize(), want)


def test_gemv_fast_is_known_by_its_version():
    scheme = QuantScheme.from_config(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv_fast"}
    )
    assert scheme.format == "gemv_fast"
    with pytest.raises(UnsupportedError, match="exllama"):
        QuantScheme.from_config(
            {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "exllama"}
        )


def test_old_autogptq_file_names(dense, tmp_path):
    """gptq_model-4bit-128g.safetensors and quantize_config.json, nothing in config.json."""
    out = convert(dense, tmp_path / "out", "gptq", group_size=32, **FAST)
    want = open_checkpoint(out).dense("model.layers.0.mlp.up_proj")
    config = json.loads((out / "config.json").read_text())
    side = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    kept = {key: side[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (out / "quantize_config.json").write_text(json.dumps(kept))
    (out / "model.safetensors").rename(out / "gptq_model-4bit-128g.safetensors")
    assert torch.equal(open_checkpoint(out).dense("model.layers.0.mlp.up_proj"), want)


def block_quantized(weight, rows, columns):
    """FP8 codes and the scale of each block, rounding in float32."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_modelopt_fp8(dense, tmp_path, algorithm):
    tensors = load_file(dense / "model.safetensors")
    wanted, module = {}, "model.layers.1.mlp.down_proj"
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        size = {"FP8": weight.shape, "FP8_PB_WO": (128, 128)}.get(algorithm, (1, weight.shape[1]))
        codes, scales = block_quantized(weight, *size)
        wanted[name] = (
            codes.float()
            * scales.repeat_interleave(size[0], 0)[: len(weight)].repeat_interleave(size[1], 1)[
                :, : weight.shape[1]
            ]
        )
        shaped = {"FP8": scales.flatten()[0], "FP8_PB_WO": scales[:, None, :, None]}.get(
            algorithm, scales[:, 0]
        )
        tensors |= {name: codes, f"{name}_scale": shaped}
        if algorithm == "FP8":
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)
    save_file({n: t.contiguous() for n, t in tensors.items()}, dense / "model.safetensors")
    (dense / "hf_quant_config.json").write_text(
        json.dumps(
            {
                "producer": {"name": "modelopt"},
                "quantization": {
                    "quant_algo": algorithm,
                    "kv_cache_quant_algo": "FP8",
                    "exclude_modules": ["lm_head*"],
                },
            }
        )
    )
    checkpoint = open_checkpoint(dense)
    for name, want in wanted.items():
        assert torch.equal(checkpoint.dense(name.removesuffix(".weight"), torch.float32), want)
    assert checkpoint.scheme.kv_cache == "fp8" and checkpoint.scheme.layer("lm_head") is None
    weight = checkpoint.linear(module)
    assert (weight.input_scale is not None) == (algorithm == "FP8")
    assert (
        weight.act_quant
        == {"FP8": "tensor", "FP8_PB_WO": "none", "FP8_PER_CHANNEL_PER_TOKEN": "token"}[algorithm]
    )


def test_modelopt_that_is_not_read_is_named():
    with pytest.raises(UnsupportedError, match="W4A8_AWQ"):
        QuantScheme.from_config({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"})


def test_fp8_block_scales_of_another_shape_are_refused():
    tensors = {
        "weight": torch.zeros(64, 64).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(2, 1, 1, 1),
    }
    with pytest.raises(ValueError, match="weight_scale has shape"):
        fp8.read(tensors, LayerScheme("fp8", 8, 128, True, block=(128, 128), strategy="block"))


def test_kv_cache_scheme_is_read_and_written():
    scheme = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "kv_cache_scheme": scheme,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            }
        },
    }
    read = QuantScheme.from_config(config)
    assert read.kv_cache == "fp8" and read.to_config()["kv_cache_scheme"] == scheme
    assert QuantScheme.from_config(config | {"kv_cache_scheme": None}).kv_cache is None


def split_gguf(file, folder, cut=6):
    """A GGUF file as llama-gguf-split leaves it: all metadata in the first part, the tensors spread over both."""
    reader = gguf.GGUFReader(file)
    for number, tensors in enumerate((reader.tensors[:cut], reader.tensors[cut:])):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05d}-of-00002.gguf", "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                writer.add_key_value(
                    key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
                )
        for key, value in (
            ("split.no", number),
            ("split.count", 2),
            ("split.tensors.count", len(reader.tensors)),
        ):
            writer.add_uint16(key, value)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()
    return folder


def test_a_split_gguf_is_one_model(make_gguf, tmp_path):
    whole = open_checkpoint(make_gguf("llama"))
    (tmp_path / "split").mkdir()
    folder = split_gguf(tmp_path / "llama.gguf", tmp_path / "split")
    for place in (folder, folder / "m-00001-of-00002.gguf", folder / "m-00002-of-00002.gguf"):
        checkpoint = open_checkpoint(place)
        assert checkpoint.names() == whole.names() and checkpoint.config == whole.config
        for module in whole.modules():
            if "norm" not in module:
                assert torch.equal(checkpoint.dense(module), whole.dense(module))
    (folder / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match="part 2 of 2 is missing"):
        open_checkpoint(folder)
    (folder / "m-00001-of-00002.gguf").rename(folder / "first.gguf")
    with pytest.raises(CheckpointError, match="not named so"):
        open_checkpoint(folder / "first.gguf")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_k_quants_that_gguf_py_cannot_write_are_read_in_place(kind):
    """The tensor types are in the table; their blocks are checked in test_gguf_blocks."""
    from nibble.quant.formats.gguf.container import _TENSOR_TYPES

    assert _TENSOR_TYPES[gguf.GGMLQuantizationType[kind].value] == kind
