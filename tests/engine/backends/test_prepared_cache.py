"""Prepared weights on disk: the second start gives the same tokens from them, and no state of the cache stops one."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import nibble
from nibble.engine.backends.cpp import loader as native_loader
from nibble.engine.backends.cpp import prepared_cache
from nibble.engine.llm import LLM
from nibble.kernels.cpu.library import why_missing
from nibble.kernels.cpu.prepared import Prepared, prepare

convert = partial(nibble.convert, evaluate=False)

pytestmark = pytest.mark.skipif(
    why_missing() is not None, reason=f"no C++ kernels: {why_missing()}"
)


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepared_cache, "_SMALLEST", 0)
    return convert(
        tiny_llama, tmp_path / "model", "awq", group_size=32, calib_samples=2, calib_seqlen=32
    )


def start(model: Path, folder: Path, **options: object) -> torch.Tensor:
    return LLM(str(model), dtype="bfloat16", prepared_cache=str(folder), **options).logits(
        [1, 2, 3, 4]
    )


def test_a_second_start_decodes_no_weight_and_gives_the_same(model, tmp_path, monkeypatch):
    first = start(model, tmp_path / "cache")
    [file] = (tmp_path / "cache").iterdir()
    assert file.stat().st_mode & 0o077 == file.stat().st_mode & 0o044  # nobody else writes there

    def prepare_dense(weight: object, bias: torch.Tensor | None) -> Prepared:
        assert isinstance(weight, torch.Tensor), "a quantized weight was prepared again"
        return prepare(weight, bias)

    monkeypatch.setattr(native_loader, "prepare", prepare_dense)
    assert torch.equal(start(model, tmp_path / "cache"), first)


def test_another_state_of_the_checkpoint_is_prepared_anew(model, tmp_path):
    start(model, tmp_path / "cache")
    [before] = (tmp_path / "cache").iterdir()
    (model / "config.json").touch()
    start(model, tmp_path / "cache")
    [after] = (tmp_path / "cache").iterdir()
    assert after != before


def test_entries_of_checkpoints_that_are_gone_are_removed(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    start(tmp_path / "copy", tmp_path / "cache")
    shutil.rmtree(tmp_path / "copy")
    start(model, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_damage_costs_a_warning(model, tmp_path, caplog):
    first = start(model, tmp_path / "cache")
    [file] = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(start(model, tmp_path / "cache"), first)
    assert "cannot be read" in caplog.text
    assert torch.equal(start(model, tmp_path / "cache"), first)  # it was written again


def test_a_place_that_cannot_be_written_costs_a_warning(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    start(model, tmp_path / "file")
    assert "not kept" in caplog.text


def test_a_short_disk_keeps_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared_cache, "_SHARE_OF_DISK", 0.0)
    start(model, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_options_that_change_what_is_prepared_have_entries_of_their_own(model, tmp_path):
    plain = start(model, tmp_path / "cache")
    assert not torch.equal(start(model, tmp_path / "cache", lm_head_bits=16), plain)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.equal(start(model, tmp_path / "cache"), plain)
