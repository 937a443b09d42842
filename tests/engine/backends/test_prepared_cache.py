"""Prepared weights on disk: the second start gives the same tokens from them, no state of the cache changes an answer
or stops a start, and nothing is removed that Nibble did not make.
"""

import json
import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable
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
FOLDER = "prepared-weights"


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_cache, "_SMALLEST", 0)


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "model"
    return convert(tiny_llama, folder, "awq", group_size=32, calib_samples=2, calib_seqlen=32)


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """To be changed."""
    return shutil.copytree(converted, tmp_path / "model")


def start(model: Path, folder: Path, **options: object) -> torch.Tensor:
    return LLM(str(model), dtype="bfloat16", prepared_cache=str(folder), **options).logits(
        [1, 2, 3, 4]
    )


def entries(cache: Path) -> list[Path]:
    return sorted(file for file in (cache / FOLDER).iterdir() if file.name != "CACHEDIR.TAG")


def test_a_second_start_decodes_no_weight_and_gives_the_same(model, tmp_path, monkeypatch):
    first = start(model, tmp_path / "cache")
    [file] = entries(tmp_path / "cache")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700

    def prepare_dense(weight: object, bias: torch.Tensor | None) -> Prepared:
        assert isinstance(weight, torch.Tensor), "a quantized weight was prepared again"
        return prepare(weight, bias)

    monkeypatch.setattr(native_loader, "prepare", prepare_dense)
    assert torch.equal(start(model, tmp_path / "cache"), first)


def test_another_state_of_the_checkpoint_is_prepared_anew(model, tmp_path):
    start(model, tmp_path / "cache")
    [before] = entries(tmp_path / "cache")
    (model / "config.json").touch()
    start(model, tmp_path / "cache")
    [after] = entries(tmp_path / "cache")
    assert after != before


def test_entries_of_checkpoints_that_are_gone_are_removed(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    start(tmp_path / "copy", tmp_path / "cache")
    shutil.rmtree(tmp_path / "copy")
    start(model, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1


def test_what_nibble_did_not_make_is_never_removed(model, tmp_path, caplog):
    """Somebody's model in DIR, and files put among the entries, whatever they are called."""
    cache = shutil.copytree(model, tmp_path / "cache")
    start(model, cache)
    [entry] = entries(cache)
    foreign = [cache / "model.safetensors", cache / "config.json"]
    for name in (
        "model.safetensors",
        f"{entry.name[:16]}-0123456789abcdef.safetensors",  # the form of another state's entry
        f"{entry.name[:16]}-0123456789abcdef-01234567.safetensors",
        f"{entry.name[:16]}-0123456789abcdef-01234567.tmp",
    ):
        foreign.append(entry.parent / name)
        shutil.copyfile(model / "model.safetensors", foreign[-1])
        os.utime(foreign[-1], (0, 0))
    misnamed = entry.with_name("somebody's copy.safetensors")
    shutil.copyfile(entry, misnamed)
    (model / "config.json").touch()
    start(model, cache)
    assert all(file.exists() for file in [*foreign, misnamed])
    assert not entry.exists(), "the old state's entry is Nibble's own"


def test_what_was_never_finished_is_removed_after_a_day(model, tmp_path):
    start(model, tmp_path / "cache")
    [entry] = entries(tmp_path / "cache")
    old, young = (entry.with_name(f"{entry.stem}-0000000{i}.safetensors") for i in range(2))
    for file in (old, young):
        file.write_bytes(entry.read_bytes()[:20000])
        file.chmod(0o600)
    os.utime(old, times=(time.time() - 2 * 86400,) * 2)
    (model / "config.json").touch()
    start(model, tmp_path / "cache")
    assert young.exists()
    assert not old.exists()


def test_a_folder_that_nibble_did_not_make_is_left_alone(model, tmp_path, caplog):
    """Although it has the right name and is this user's."""
    folder = tmp_path / "cache" / FOLDER
    folder.mkdir(parents=True, mode=0o700)
    start(model, tmp_path / "cache")
    assert list(folder.iterdir()) == []
    assert [r.levelname for r in caplog.records if "was not made by Nibble" in r.message]


# --- damage: a file is changed, and its start gives the same answer as ever, with one warning ---


def _header(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(file: Path, header: dict, data: bytes) -> None:
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def flip(where: float, bits: int = 1) -> Callable[[Path], None]:
    """Bits of the bytes from a share of the file on."""

    def damage(file: Path) -> None:
        raw = bytearray(file.read_bytes())
        for i in range(bits):
            raw[int(len(raw) * where) + 97 * i] ^= 1 << (i % 8)
        file.write_bytes(raw)

    return damage


def header(old: str, new: str, count: int = 1) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        raw = file.read_bytes()
        assert len(old) == len(new) and old.encode() in raw
        file.write_bytes(raw.replace(old.encode(), new.encode(), count))

    return damage


def forged(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A list of contents that is changed and has the right checksum: what the kernels are given is still checked."""

    def damage(file: Path) -> None:
        head, data = _header(file)
        manifest = json.loads(head["__metadata__"]["nibble_prepared"])
        change(manifest)
        text = json.dumps(manifest)
        head["__metadata__"] |= {"nibble_prepared": text, "crc32": str(zlib.crc32(text.encode()))}
        _write(file, head, data)

    return damage


def number(key: str, value: object, group: str = "model.layers.1.mlp.down_proj"):
    return forged(lambda manifest: manifest["groups"][group][0].update({key: value}))


def reshaped(key: str, **changes: object) -> Callable[[Path], None]:
    """The header says otherwise of a tensor, all of whose bytes are right."""

    def damage(file: Path) -> None:
        head, data = _header(file)
        head[f"model.layers.0.self_attn.q_proj.1.{key}"] |= changes
        _write(file, head, data)

    return damage


def without_a_tensor(file: Path) -> None:
    head, data = _header(file)
    last = max((n for n in head if n != "__metadata__"), key=lambda n: head[n]["data_offsets"][1])
    begin, _ = head.pop(last)["data_offsets"]
    _write(file, head, data[:begin])


def with_another_tensor(file: Path) -> None:
    head, data = _header(file)
    head["model.layers.0.mlp.extra.0.data"] = {
        "dtype": "U8",
        "shape": [4],
        "data_offsets": [len(data), len(data) + 4],
    }
    _write(file, head, data + b"abcd")


def with_columns_out_of_range(file: Path) -> None:
    """An order of columns, of right shape and checksum, that would have the kernels read elsewhere."""
    head, data = _header(file)
    manifest = json.loads(head["__metadata__"]["nibble_prepared"])
    record = manifest["groups"]["model.layers.0.mlp.down_proj"][0]
    perm = struct.pack(f"<{record['k']}i", *range(1, record["k"] + 1))
    record["tensors"]["perm"] = zlib.crc32(perm)
    head["model.layers.0.mlp.down_proj.0.perm"] = {
        "dtype": "I32",
        "shape": [record["k"]],
        "data_offsets": [len(data), len(data) + len(perm)],
    }
    text = json.dumps(manifest)
    head["__metadata__"] |= {"nibble_prepared": text, "crc32": str(zlib.crc32(text.encode()))}
    _write(file, head, data + perm)


def exchanged(file: Path) -> None:
    """The names of two tensors of one shape."""
    head, data = _header(file)
    a, b = (f"model.layers.0.mlp.gate_proj.{i}.data" for i in range(2))
    head[a], head[b] = head[b], head[a]
    _write(file, head, data)


def of_another_checkpoint(file: Path) -> None:
    forged(lambda manifest: manifest.update(name="0" * 16 + file.name[16:]))(file)


def in_place_of(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def linked(file: Path) -> None:
    file.rename(file.parents[2] / "moved")
    file.symlink_to(file.parents[2] / "moved")


def owned_by_another(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file away needs root")
    os.chown(file, 65534, 65534)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the header": flip(0.001),
    "the header's length": flip(0.0),
    "a bit of the data": flip(0.5),
    "the last bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"),
    "100 bits of the data": flip(0.6, bits=100),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "zeroed data": lambda file: _write(file, _header(file)[0], bytes(len(_header(file)[1]))),
    "empty": lambda file: file.write_bytes(b""),
    "cut in the header": lambda file: os.truncate(file, 1000),
    "cut in the data": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "no list of contents": header("nibble_prepared", "nibble_prepareX"),
    "a changed number": header('\\"group\\":32', '\\"group\\":64'),
    "group 0": number("group", 0),
    "group -8": number("group", -8),
    "a huge n": number("n", 1 << 40),
    "another n": number("n", 48),
    "another k": number("k", 1 << 30),
    "format 7": number("format", 7),
    "offset 9": number("offset", 9),
    "offset of another kind": number("offset", 0),
    "midpoint 300": number("midpoint", 300),
    "multiplier 0": number("multiplier", 0.0),
    "multiplier null, as JSON has NaN": number("multiplier", None),
    "multiplier infinite": number("multiplier", 1e999),
    "multiplier negative": number("multiplier", -1.0),
    "a number as text": number("group", "32"),
    "a field that nobody knows": number("colour", 1),
    "no such tensor": forged(
        lambda m: m["groups"]["model.layers.0.mlp.down_proj"][0]["tensors"].pop("scales")
    ),
    "one linear less": forged(lambda m: m["groups"]["model.layers.0.mlp.gate_proj"].pop()),
    "another dtype": reshaped("scales", dtype="BF16"),
    "another shape": reshaped("data", shape=[1, 16, 16, 8]),
    "a missing tensor": without_a_tensor,
    "one tensor more": with_another_tensor,
    "columns out of range": with_columns_out_of_range,
    "two tensors exchanged": exchanged,
    "of another checkpoint": of_another_checkpoint,
    "written by others": lambda file: file.chmod(0o666),
    "written by the group": lambda file: file.chmod(0o660),
    "of another user": owned_by_another,
    "a symbolic link": linked,
    "a pipe": in_place_of(os.mkfifo),
    "a folder": in_place_of(Path.mkdir),
}


@pytest.fixture(scope="module")
def kept(
    converted: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, torch.Tensor]:
    """A model, a cache that it was kept in, and the model's answer."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_cache, "_SMALLEST", 0)
        answer = start(converted, folder / "cache")
    return converted, folder / "cache", answer


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_costs_one_warning_and_heals(damage, kept, tmp_path, caplog):
    model, cache, answer = kept
    cache = shutil.copytree(cache, tmp_path / "cache")
    [file] = entries(cache)
    damage(file)
    assert torch.equal(start(model, cache), answer)
    [told] = warnings(caplog)
    assert str(file) in told
    if file.is_dir():
        return  # which is not Nibble's to remove
    assert torch.equal(start(model, cache), answer)
    assert not warnings(caplog)
    assert [f.name for f in entries(cache)] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o600
    assert not file.is_symlink()


@pytest.mark.parametrize(
    "spoil", [lambda f: f.chmod(0o777), owned_by_another], ids=["mode", "owner"]
)
def test_a_folder_that_others_can_write_to_is_neither_read_nor_written(
    spoil, kept, tmp_path, monkeypatch, caplog
):
    model, cache, answer = kept
    cache = shutil.copytree(cache, tmp_path / "cache")
    spoil(cache / FOLDER)
    monkeypatch.setattr(
        prepared_cache.prepared_entry, "read", lambda file: pytest.fail(f"{file} was read")
    )
    [file] = entries(cache)
    before = file.read_bytes()
    assert torch.equal(start(model, cache), answer)
    [told] = warnings(caplog)
    assert "others" in told or "another user" in told
    assert file.read_bytes() == before


def test_a_place_that_cannot_be_written_costs_a_warning(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    start(model, tmp_path / "file")
    assert len(warnings(caplog)) == 1


def test_a_short_disk_keeps_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared_cache, "_SHARE_OF_DISK", 0.0)
    start(model, tmp_path / "cache")
    assert not entries(tmp_path / "cache")


def test_a_disk_that_runs_full_leaves_nothing_behind(model, tmp_path, monkeypatch, caplog):
    def full(file: Path, *args: object) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared_cache.prepared_entry, "write", full)
    start(model, tmp_path / "cache")
    assert not entries(tmp_path / "cache")
    assert len(warnings(caplog)) == 1


def test_options_that_change_what_is_prepared_have_entries_of_their_own(model, tmp_path):
    plain = start(model, tmp_path / "cache")
    assert not torch.equal(start(model, tmp_path / "cache", lm_head_bits=16), plain)
    assert len(entries(tmp_path / "cache")) == 2
    assert torch.equal(start(model, tmp_path / "cache"), plain)
