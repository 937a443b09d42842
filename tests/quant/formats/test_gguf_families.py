"""GGUF files of families whose tensors llama.cpp's converter stacks, splits or reorders: what is served of them is what
transformers computes with the weights that they were made of. Names are gguf-py's."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.weight import QuantizedWeight, in_column_order

from ...engine import models

IDS = [9 + 37 * i % 180 for i in range(40)]
ARCHS = {
    "qwen3-moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "gpt-oss": gguf.MODEL_ARCH.GPT_OSS,
    "qwen3.5": gguf.MODEL_ARCH.QWEN35,
    "qwen3.5-moe": gguf.MODEL_ARCH.QWEN35MOE,
}
CHANGES = {"qwen3-moe": {"decoder_sparse_step": 1}, "gpt-oss": {"swiglu_limit": 7.0}}


def converted(name: str, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF names and tensors, as llama.cpp has them."""
    names = gguf.get_tensor_name_map(ARCHS[name], model.config.num_hidden_layers)
    for full, tensor in model.state_dict().items():
        module, _, ending = full.rpartition(".")
        if ".experts." in full:
            if name == "qwen3.5-moe" and "gate_up" in full:  # as newer files may have it
                yield f"blk.{full.split('.')[2]}.ffn_gate_up_exps.weight", tensor
            else:
                yield from stacks(full, tensor, interleaved=name == "gpt-oss")
            continue
        if full.endswith("sinks"):
            full, module, ending = f"{full}.weight", full, "weight"
        if full.endswith("A_log"):
            yield names.get_name(full), by_key_head(model.config, -tensor.exp(), 0, 1)
            continue
        if full.endswith("dt_bias"):
            module, ending = module + ".dt_proj", "bias"
        if name.startswith("qwen3.5"):
            tensor = qwen35(model.config, full, tensor)
        yield f"{names.get_name(module)}.{ending}", tensor


def stacks(
    full: str, tensor: torch.Tensor, interleaved: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gates and ups apart, [experts, out, in] each."""
    block, ending = full.split(".")[2], "bias" if full.endswith("_bias") else "weight"
    tensor = tensor.mT if interleaved and ending == "weight" else tensor
    if "down_proj" in full:
        yield f"blk.{block}.ffn_down_exps.{ending}", tensor
        return
    half = tensor.shape[1] // 2
    gate = tensor[:, ::2] if interleaved else tensor[:, :half]
    up = tensor[:, 1::2] if interleaved else tensor[:, half:]
    yield f"blk.{block}.ffn_gate_exps.{ending}", gate
    yield f"blk.{block}.ffn_up_exps.{ending}", up


def qwen35(config, full: str, tensor: torch.Tensor) -> torch.Tensor:
    values, dim = config.linear_num_value_heads, config.linear_value_head_dim
    if full.endswith("norm.weight") and "linear_attn" not in full:
        return tensor + 1
    if full.endswith("conv1d.weight"):
        tensor = tensor[:, 0]
    if full.endswith(("conv1d.weight", "in_proj_qkv.weight")):
        keys, own = tensor.split((len(tensor) - values * dim, values * dim))
        return torch.cat((keys, by_key_head(config, own, 0, dim)))
    if full.endswith("in_proj_z.weight"):
        return by_key_head(config, tensor, 0, dim)
    if full.endswith(("in_proj_a.weight", "in_proj_b.weight", "dt_bias")):
        return by_key_head(config, tensor, 0, 1)
    if full.endswith("linear_attn.out_proj.weight"):
        return by_key_head(config, tensor, 1, dim)
    return tensor[0] if full.endswith("shared_expert_gate.weight") else tensor


def by_key_head(config, tensor: torch.Tensor, axis: int, dim: int) -> torch.Tensor:
    """The first value head of every key head, then the second of every one."""
    heads = tensor.split(dim, axis)
    each = config.linear_num_value_heads // config.linear_num_key_heads
    return torch.cat([head for first in range(each) for head in heads[first::each]], axis)


def metadata(name: str, writer: gguf.GGUFWriter, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(dim)
    if hasattr(config, "intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    if count := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if name != "olmoe" and count:
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        writer.add_expert_feed_forward_length(width)
    if name == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
    if name.startswith("qwen3.5"):
        writer.add_rope_dimension_count(dim // 4)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    if name == "qwen3.5-moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def write(
    name: str, path: Path, config, arrays: dict[str, np.ndarray], kind: Kind, drafting: int = 0
) -> Path:
    """Matrices that can be in blocks of `kind`, the rest in float32."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHS[name]])
    metadata(name, writer, config)
    if drafting:
        writer.add_nextn_predict_layers(drafting)
    for key, array in arrays.items():
        if is_matrix(key, array) and kind != Kind.F32:
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def is_matrix(key: str, array: np.ndarray) -> bool:
    kept = ("ffn_gate_inp", "conv1d", "norm", "bias", "sinks")
    return array.ndim > 1 and array.shape[-1] % 32 == 0 and not any(part in key for part in kept)


def arrays_of(name: str, folder: Path):
    model = models.build(name, folder, **CHANGES.get(name, {}))
    return model, {
        key: tensor.contiguous().float().numpy() for key, tensor in converted(name, model)
    }


@pytest.mark.parametrize("name", ARCHS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, arrays = arrays_of(name, tmp_path / "hf")
    path = write(name, tmp_path / "m.gguf", model.config, arrays, Kind.F32)
    with torch.no_grad():
        want = model(torch.tensor([IDS])).logits[0]
    config = EngineConfig(
        model=str(path), dtype="float32", prepared_cache=None, kv_cache_memory=1 << 22
    )
    assert (Runner(config).logits(IDS) - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.MXFP4])
@pytest.mark.parametrize("name", ARCHS)
def test_quantized_tensors_are_those_of_the_dequantized_file(
    name: str, kind: Kind, tmp_path: Path
) -> None:
    model, arrays = arrays_of(name, tmp_path / "hf")
    path = write(name, tmp_path / "quantized.gguf", model.config, arrays, kind)
    for key, array in arrays.items():
        if is_matrix(key, array):
            arrays[key] = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
    plain = open_checkpoint(write(name, tmp_path / "plain.gguf", model.config, arrays, Kind.F32))
    quantized = open_checkpoint(path)
    assert quantized.names() == plain.names() and quantized.config == plain.config
    for tensor in plain.names():
        want = plain.tensor(tensor)
        assert torch.allclose(quantized.tensor(tensor).float(), want, atol=1e-6), tensor
        module = tensor.removesuffix(".weight")
        if module in quantized.modules() and quantized.is_quantized(module):
            weight = quantized.linear(module)
            assert isinstance(weight, QuantizedWeight)
            assert torch.allclose(weight.dequantize(), want, atol=1e-6), tensor
    assert plain.scheme is None and quantized.scheme.describe() == f"gguf {kind.name}"


def test_layers_that_draft_tokens_are_left_out(tmp_path: Path) -> None:
    model, arrays = arrays_of("qwen3.5", tmp_path / "hf")
    model.config.num_hidden_layers += 1
    arrays["blk.4.nextn.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    arrays["blk.4.attn_norm.weight"] = np.zeros(64, np.float32)
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="is no part of a qwen35 model"):
        open_checkpoint(write("qwen3.5", path, model.config, arrays, Kind.F32))
    checkpoint = open_checkpoint(write("qwen3.5", path, model.config, arrays, Kind.F32, drafting=1))
    assert checkpoint.config["num_hidden_layers"] == 4
    assert not any("layers.4." in name for name in checkpoint.names())


def test_experts_of_a_family_that_has_none_are_refused(tmp_path: Path) -> None:
    model, arrays = arrays_of("qwen3.5", tmp_path / "hf")
    model.config.num_experts, model.config.num_experts_per_tok = 4, 2
    model.config.moe_intermediate_size = 32
    path = write("qwen3.5", tmp_path / "m.gguf", model.config, arrays, Kind.F32)
    with pytest.raises(UnsupportedError, match="a qwen35 model with experts is not supported"):
        open_checkpoint(path)


def test_columns_that_share_a_scale_stay_together() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64)
    weight = QuantizedWeight(codes, torch.tensor([[1.0, 2.0]]), bits=8, block=(1, 32))
    order = torch.cat((torch.arange(32, 64), torch.arange(32)))
    moved = in_column_order(weight, order)
    assert torch.equal(moved.dequantize(), weight.dequantize()[:, order])
    with pytest.raises(ValueError, match="groups of 32 columns"):
        in_column_order(weight, torch.arange(64).roll(16))
