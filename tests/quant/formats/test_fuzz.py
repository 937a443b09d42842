"""Hostile files: whatever the bytes, opening and reading a checkpoint ends in a UserError or in a valid tensor."""

import contextlib
import json
import struct
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nibble
from nibble.errors import UserError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.scheme import QuantScheme

convert = partial(nibble.convert, evaluate=False)

FUZZ = settings(
    max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MODULE = "model.layers.0.mlp.up_proj"
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12)  # fmt: skip


@pytest.fixture
def gptq_folder(make_gguf, tmp_path):
    dequantize_checkpoint(open_checkpoint(make_gguf("llama")), tmp_path / "dense")
    return convert(tmp_path / "dense", tmp_path / "gptq", "gptq", calib_samples=2, calib_seqlen=16)


def read_all(path):
    """Open and decode everything; only a UserError may come out. Returns whether the file was good."""
    try:
        checkpoint = open_checkpoint(path)
        for module in checkpoint.modules():
            assert torch.isfinite(checkpoint.dense(module, torch.float32)).all()
    except UserError as error:
        assert "\n" not in str(error) and str(error)
        return False
    return True


@FUZZ
@given(data=st.data())
def test_bytes_of_a_safetensors_file(gptq_folder, data):
    file = gptq_folder / "model.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    try:
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            bad[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(
            bytes(bad[: data.draw(st.integers(0, len(bad)))])
            if data.draw(st.booleans())
            else bytes(bad)
        )
        read_all(gptq_folder)
    finally:
        file.write_bytes(good)


@FUZZ
@given(
    entries=st.dictionaries(
        st.sampled_from([f"{MODULE}.qweight", f"{MODULE}.scales", "model.norm.weight", "x"]),
        JSON,
        min_size=1,
        max_size=4,
    )
)
def test_headers_of_any_json(gptq_folder, entries):
    file = gptq_folder / "model.safetensors"
    good = file.read_bytes()
    raw = json.dumps(entries).encode()
    try:
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + good[-1000:])
        assert not read_all(gptq_folder)
    finally:
        file.write_bytes(good)


@FUZZ
@given(suffix=st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]), data=st.data())
def test_tensors_of_any_shape_and_value(gptq_folder, suffix, data):
    file = gptq_folder / "model.safetensors"
    good = file.read_bytes()
    try:
        tensors = load_file(file)
        dtype = data.draw(
            st.sampled_from([torch.int32, torch.float16, torch.int64, torch.uint8, torch.float32])
        )
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 12, 64, 96]), max_size=3))
        value = data.draw(st.sampled_from([0, 1, 65, 200, float("nan"), float("inf")]))
        whole = (
            value
            if dtype.is_floating_point
            else 7
            if value != value or value == float("inf")
            else int(value)
        )
        tensors[f"{MODULE}.{suffix}"] = torch.full(shape, whole, dtype=dtype)
        save_file(tensors, file)
        read_all(gptq_folder)
    finally:
        file.write_bytes(good)


@FUZZ
@given(
    config=st.dictionaries(
        st.sampled_from(
            [
                "bits",
                "group_size",
                "sym",
                "desc_act",
                "dynamic",
                "version",
                "zero_point",
                "config_groups",
                "ignore",
                "format",
                "weight_block_size",
                "activation_scheme",
                "kv_cache_scheme",
                "quantization",
                "quant_algo",
                "lm_head",
            ]
        ),
        JSON,
    ),
    method=st.sampled_from(["awq", "gptq", "fp8", "compressed-tensors", "modelopt"]),
)
def test_quantization_configs_of_any_json(config, method):
    with contextlib.suppress(UserError):
        QuantScheme.from_config({"quant_method": method} | config).layer(MODULE)


@FUZZ
@given(data=st.data())
def test_bytes_of_a_gguf_file(make_gguf, tmp_path, data):
    file = tmp_path / "llama.gguf"
    good = file.read_bytes() if file.exists() else make_gguf("llama").read_bytes()
    try:
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            bad[data.draw(st.integers(0, 12_000))] = data.draw(st.integers(0, 255))
        file.write_bytes(
            bytes(bad[: data.draw(st.integers(0, len(bad)))])
            if data.draw(st.booleans())
            else bytes(bad)
        )
        read_all(file)
    finally:
        file.write_bytes(good)
