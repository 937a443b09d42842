"""FP4 weights against what compressed-tensors and transformers make of the same bytes."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.formats import compressed_tensors, modelopt
from nibble.quant.formats.base import BadTensor
from nibble.quant.scheme import LayerScheme, QuantScheme

FP4 = LayerScheme("fp4", 4, 16, True)
OUT, IN = 6, 64


def packed() -> torch.Tensor:
    """Every pair of codes is somewhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (OUT, IN // 2), dtype=torch.uint8, generator=generator)


def nvfp4_scales() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(OUT, IN // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)


def test_nvfp4_global_scales_divide_in_compressed_tensors_and_multiply_in_modelopt() -> None:
    values = unpack_fp4_from_uint8(packed(), OUT, IN, torch.float32)
    scale = nvfp4_scales().float().repeat_interleave(16, 1)
    tensors = {"weight_packed": packed(), "weight_scale": nvfp4_scales()}
    divided = compressed_tensors.read(tensors | {"weight_global_scale": torch.tensor([7.0])}, FP4)
    torch.testing.assert_close(divided.dequantize(), values * scale / 7)
    tensors = {"weight": packed(), "weight_scale": nvfp4_scales()}
    multiplied = modelopt.read(tensors | {"weight_scale_2": torch.tensor(7.0)}, FP4)
    torch.testing.assert_close(multiplied.dequantize(), values * scale * 7)
    assert divided.block == multiplied.block == (1, 16)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    exponents = torch.arange(OUT * IN // 32, dtype=torch.uint8).view(OUT, -1) + 115
    tensors = {"weight_packed": packed(), "weight_scale": exponents}
    weight = compressed_tensors.read(tensors, LayerScheme("fp4", 4, 32, True))
    blocks = packed().view(1, OUT, IN // 32, 16)  # experts, which it hands on transposed
    want = convert_moe_packed_tensors(blocks, exponents[None], dtype=torch.float32)[0].T
    torch.testing.assert_close(weight.dequantize(), want)
    assert weight.block == (1, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_global_scale": None}, "weight_scale_2 is missing"),
        ({"weight_global_scale": torch.tensor([0.0])}, "weight_global_scale has shape"),
        ({"weight_global_scale": torch.tensor([float("nan")])}, "holds NaN"),
        ({"weight_scale": torch.full((OUT, 2), 255, dtype=torch.uint8)}, "holds NaN or infinity"),
        ({"weight_scale": nvfp4_scales()[:4]}, "weight_scale has shape"),
        ({"weight_scale": nvfp4_scales()[:, :3]}, "3 groups, which do not divide 64"),
    ],
)
def test_damaged_tensors_are_named(change: dict, said: str) -> None:
    tensors = {"weight_packed": packed(), "weight_scale": nvfp4_scales()}
    tensors["weight_global_scale"] = torch.tensor([7.0])
    tensors = {name: t for name, t in (tensors | change).items() if t is not None}
    with pytest.raises(BadTensor, match=said):
        compressed_tensors.read(tensors, FP4)


def ct_group(num_bits: int, strategy: str, group_size: int | None, targets: list[str]) -> dict:
    weights = {"num_bits": num_bits, "type": "float", "strategy": strategy, "symmetric": True}
    return {"targets": targets, "weights": weights | {"group_size": group_size}}


def test_configs_of_one_and_of_several_kinds() -> None:
    group = ct_group(4, "tensor_group", 16, ["Linear"])
    nvfp4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    scheme = QuantScheme.from_config(nvfp4 | {"config_groups": {"group_0": group}})
    assert scheme.layer("model.layers.0.mlp.up_proj") == FP4
    mixed = {"group_0": group, "group_1": ct_group(8, "channel", None, ["re:.*down_proj"])}
    scheme = QuantScheme.from_config(
        nvfp4 | {"format": "mixed-precision", "config_groups": mixed, "ignore": ["lm_head"]}
    )
    assert scheme.layer("model.layers.0.mlp.up_proj") == FP4
    assert scheme.layer("model.layers.0.mlp.down_proj").describe() == "fp8 channel"
    layers = {"model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    layers["model.layers.0.mlp.down_proj"] = {"quant_algo": "FP8"}
    keys = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    scheme = QuantScheme.from_config({"quant_method": "modelopt", "quantization": keys})
    assert scheme.layer("model.layers.0.mlp.up_proj") == FP4
    assert scheme.layer("model.layers.0.mlp.down_proj").kind == "fp8"
    assert scheme.layer("model.layers.0.mlp.gate_proj") is None
    with pytest.raises(UnsupportedError, match="W4A8_AWQ"):
        QuantScheme.from_config({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"})


def test_a_damaged_tensor_of_a_checkpoint_is_named_with_its_file(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    tensors = {f"{module}.weight": packed(), f"{module}.weight_scale": nvfp4_scales()}
    save_file(tensors, tmp_path / "model.safetensors")
    keys = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": keys}))
    with pytest.raises(CheckpointError, match=rf"{module}.weight_scale_2.*is missing"):
        open_checkpoint(tmp_path).linear(module)
    tensors[f"{module}.weight_scale_2"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).linear(module).kind == "table"
    assert len(load_file(tmp_path / "model.safetensors")) == 3
