"""What `--dry-run` promises against what a conversion then writes, to the byte."""

import struct

import pytest

from nibble.quant.conversion import estimate as module
from nibble.quant.conversion.pipeline import dry_run, quantize_checkpoint
from nibble.quant.conversion.recipe import Recipe

FAST = {"calib_samples": 4, "calib_seqlen": 32}
RECIPES = [
    ("awq", {"group_size": 32}),
    ("gptq", {"group_size": 16}),
    ("gptq", {"bits": 8, "group_size": -1}),
    ("gptq", {"target": "compressed-tensors", "group_size": 32}),
    ("fp8", {}),
    ("fp8", {"fp8_scheme": "tensor"}),
]


@pytest.mark.parametrize(("method", "options"), RECIPES)
def test_the_size_is_exact_up_to_the_header(dense, tmp_path, method, options):
    recipe = Recipe.of(method, **options)
    _, needs = dry_run(dense, tmp_path / "out", recipe, **FAST)
    quantize_checkpoint(dense, tmp_path / "out", recipe, **FAST)
    file = tmp_path / "out" / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    tensors = file.stat().st_size - 8 - header
    # weight_shape of compressed-tensors and single scales: a few bytes a linear are not counted
    assert 0 <= tensors - needs.output <= 14 * 16


def test_the_disk_must_hold_a_shard_twice_and_the_activations(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 1000)
    _, needs = dry_run(dense, tmp_path / "out", Recipe.of("awq", group_size=32), **FAST)
    hidden = 4 * 32 * 64 * 4  # windows, tokens, hidden size, float32
    assert needs.disk == needs.output + 1000 + 2 * hidden
    _, needs = dry_run(dense, tmp_path / "out", Recipe.of("fp8"), **FAST)
    assert needs.disk == needs.output + 1000  # nothing is calibrated
