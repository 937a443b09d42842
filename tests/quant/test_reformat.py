"""`nibble convert --to`: the same values in another format, or a refusal that says why. transformers' dense weights and
gguf-py's decoder are the reference."""

import json
from functools import partial

import gguf
import numpy as np
import pytest
import torch

import nibble
from nibble.errors import UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.reformat import Grid, reformat
from nibble.quant.weight import QuantizedWeight

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}
Q = gguf.GGMLQuantizationType
LINEARS = [f"model.layers.{i}.{n}" for i in range(2) for n in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj")]  # fmt: skip


@pytest.fixture
def dense(make_gguf, tmp_path):
    dequantize_checkpoint(open_checkpoint(make_gguf("llama")), tmp_path / "dense")
    return tmp_path / "dense"


def same_values(a, b):
    first, second = open_checkpoint(a), open_checkpoint(b)
    for module in LINEARS:
        assert isinstance(second.linear(module), QuantizedWeight)
        assert torch.equal(
            first.dense(module, torch.float32), second.dense(module, torch.float32)
        ), module
    return second


@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_q4_0_becomes_any_4_bit_format(make_gguf, tmp_path, target):
    file = make_gguf("llama", Q.Q4_0)
    done = reformat(file, tmp_path / "out", target)
    assert done.kept == 14 and not done.requantized
    out = same_values(file, tmp_path / "out")
    assert out.scheme.layer(LINEARS[0]).group_size == 32
    assert any("rounded to 16 bits" in note for note in done.notes)
    stored = gguf.GGUFReader(
        file
    )  # an independent decoder, on the one matrix whose rows are not reordered
    tensor = next(t for t in stored.tensors if t.name == "blk.1.ffn_down.weight")
    want = gguf.quants.dequantize(np.asarray(tensor.data), Q.Q4_0)
    np.testing.assert_array_equal(out.dense("model.layers.1.mlp.down_proj").numpy(), want)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_q8_0_becomes_8_bits(make_gguf, tmp_path, target):
    file = make_gguf("llama", Q.Q8_0)
    reformat(file, tmp_path / "out", target)
    assert same_values(file, tmp_path / "out").linear(LINEARS[0]).bits == 8
    with pytest.raises(
        UnsupportedError, match=r"14 of 14 layers have no exact form in awq.*8 bits.*--requantize"
    ):
        reformat(file, tmp_path / "no", "awq")
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize(("first", "then", "options"), [
    ("awq", "compressed-tensors", {}), ("awq", "gptq_v2", {}), ("gptq", "compressed-tensors", {}),
    ("gptq", "awq", {"group_size": 32}), ("gptq", "compressed-tensors", {"bits": 8, "group_size": -1})])  # fmt: skip
def test_integer_formats_go_round_without_a_change(dense, tmp_path, first, then, options):
    convert(dense, tmp_path / "a", first, **options, **FAST)
    reformat(tmp_path / "a", tmp_path / "b", then)
    same_values(tmp_path / "a", tmp_path / "b")
    back = "gptq_v2" if first == "awq" and then == "gptq_v2" else first
    reformat(tmp_path / "b", tmp_path / "c", back)
    same_values(tmp_path / "a", tmp_path / "c")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == then.removesuffix("_v2")


def test_a_zero_point_of_0_is_refused_by_v1_and_taken_by_v2(dense, tmp_path):
    """AWQ's range search may set it; v1 would store -1, which readers decode differently."""
    convert(dense, tmp_path / "awq", "awq", **FAST)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "awq" / "model.safetensors")
    tensors[f"{LINEARS[3]}.qzeros"].zero_()
    save_file(tensors, tmp_path / "awq" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"1 of 14 layers.*zero point of 0.*o_proj"):
        reformat(tmp_path / "awq", tmp_path / "v1", "gptq")
    reformat(tmp_path / "awq", tmp_path / "v2", "gptq_v2")
    same_values(tmp_path / "awq", tmp_path / "v2")


def test_float_minimums_are_refused_and_requantized_on_request(make_gguf, tmp_path):
    file = make_gguf("llama", Q.Q4_1)
    with pytest.raises(UnsupportedError, match="float minimums"):
        reformat(file, tmp_path / "out", "awq")
    done = reformat(file, tmp_path / "out", "awq", Grid(group_size=32))
    assert len(done.requantized) == 14
    first, second = open_checkpoint(file), open_checkpoint(tmp_path / "out")
    for module in LINEARS:
        a, b = (c.dense(module, torch.float32) for c in (first, second))
        assert (a - b).norm() < 0.1 * a.norm()


def test_fp8_per_channel_needs_compressed_tensors(dense, tmp_path):
    convert(dense, tmp_path / "a", "fp8")
    with pytest.raises(UnsupportedError, match="channel scales"):
        reformat(tmp_path / "a", tmp_path / "b", "fp8")
    with pytest.raises(UnsupportedError, match="fp8 weights"):
        reformat(tmp_path / "a", tmp_path / "b", "gptq")


def test_a_dense_model_and_an_unknown_format_are_refused(dense, tmp_path):
    with pytest.raises(UnsupportedError, match="not quantized"):
        reformat(dense, tmp_path / "b", "awq")
    with pytest.raises(UnsupportedError, match="--to exl2"):
        reformat(dense, tmp_path / "b", "exl2")


def test_a_head_of_its_own_is_not_tied_away(make_gguf, tmp_path):
    file = make_gguf("llama", Q.Q4_0)
    reformat(file, tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert open_checkpoint(tmp_path / "out").has("lm_head.weight")


def test_resumed_it_ends_in_the_same_bytes(make_gguf, tmp_path):
    file = make_gguf("llama", Q.Q4_0)
    reformat(file, tmp_path / "whole", "awq")

    def stop(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reformat(file, tmp_path / "out", "awq", progress=stop)
    assert not (tmp_path / "out").exists()
    reformat(file, tmp_path / "out", "awq", resume=True)
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert a == b


def test_scales_of_the_kv_cache_go_where_there_is_a_place_for_them(dense, tmp_path):
    convert(
        dense, tmp_path / "a", "awq", group_size=32, to="compressed-tensors", kv_scales=True, **FAST
    )
    scale = "model.layers.1.self_attn.k_scale"
    reformat(tmp_path / "a", tmp_path / "again", "compressed-tensors")
    again, original = (
        same_values(tmp_path / "a", tmp_path / "again"),
        open_checkpoint(tmp_path / "a"),
    )
    assert again.scheme.kv_cache == "fp8" and torch.equal(
        again.tensor(scale), original.tensor(scale)
    )
    done = reformat(tmp_path / "a", tmp_path / "awq", "awq")
    assert any("KV cache are left out" in note for note in done.notes)
    assert not same_values(tmp_path / "a", tmp_path / "awq").has(scale)
