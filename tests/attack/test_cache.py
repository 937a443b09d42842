"""A cache of prepared weights that is damaged, planted or somebody else's: never another answer, never a traceback,
never a file lost that is not the cache's own."""

import hashlib
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import models
from .conftest import SERVE, Record
from .harness import Server, complaint_in, end, start
from .results import Result

Damage = Callable[[Path], None]
READY = 60.0


def _data_start(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def _patched(at: Callable[[Path], int], change: Callable[[bytes], bytes], size: int = 1) -> Damage:
    """Replace `size` bytes at a place in the file."""

    def damage(file: Path) -> None:
        with file.open("r+b") as data:
            where = at(file)
            data.seek(where)
            old = data.read(size)
            data.seek(where)
            data.write(change(old))

    return damage


def _flip(old: bytes) -> bytes:
    return bytes(byte ^ 0x10 for byte in old)


def _in_tensor(suffix: str) -> Callable[[Path], int]:
    """The middle of the first tensor whose name ends so."""

    def where(file: Path) -> int:
        head = json.loads(file.read_bytes()[8 : _data_start(file)])
        name = min(name for name in head if name.endswith(suffix))
        first, last = head[name]["data_offsets"]
        return _data_start(file) + (first + last) // 2

    return where


def _rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """The same file, whole and well-formed, of changed tensors; what it says of itself is kept."""

    def damage(file: Path) -> None:
        head = json.loads(file.read_bytes()[8 : _data_start(file)])
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, head.get("__metadata__"))

    return damage


def _first(tensors: dict[str, torch.Tensor], suffix: str) -> str:
    return min(name for name in tensors if name.endswith(suffix))


def _said(key: str, value: object, with_checksum: bool = False) -> Damage:
    """Another value in what the entry says of its first linear; with_checksum: of its contents' list as it then is."""

    def damage(file: Path) -> None:
        head = json.loads(file.read_bytes()[8 : _data_start(file)])
        metadata = head["__metadata__"]
        manifest = json.loads(metadata["nibble_prepared"])
        next(iter(manifest["groups"].values()))[0][key] = value
        metadata["nibble_prepared"] = json.dumps(manifest)
        if with_checksum:
            metadata["crc32"] = str(zlib.crc32(metadata["nibble_prepared"].encode()))
        save_file(load_file(file), file, metadata)

    return damage


def _replace(suffix: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = _first(tensors, suffix)
        tensors[name] = new(tensors[name]).contiguous()

    return _rewritten(change)


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    """The first two weights of one shape."""
    names = sorted(name for name in tensors if name.endswith(".data"))
    a, b = next(
        pair for pair in combinations(names, 2) if len({tensors[name].shape for name in pair}) == 1
    )
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link(target: str) -> Damage:
    def damage(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return damage


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _write(new: Callable[[bytes], bytes]) -> Damage:
    return lambda file: file.write_bytes(new(file.read_bytes())) and None


DAMAGES: dict[str, Damage] = {
    "cut in the middle": _write(lambda old: old[: len(old) // 2]),
    "cut by one byte": _write(lambda old: old[:-1]),
    "eight bytes": _write(lambda old: old[:8]),
    "empty": _write(lambda _: b""),
    "a byte more": _write(lambda old: old + b"x"),
    "random bytes": _write(lambda old: random.Random(0).randbytes(len(old))),
    "a header of 2^63 bytes": _patched(lambda _: 0, lambda _: struct.pack("<Q", 2**63), 8),
    "a header that is no JSON": _patched(lambda _: 8, lambda old: b"\xff" * len(old), 64),
    "one bit of a weight": _patched(_in_tensor(".data"), _flip),
    "one bit of a scale": _patched(_in_tensor(".scales"), _flip),
    "64 KiB of weights zeroed": _patched(_in_tensor(".data"), lambda old: b"\0" * len(old), 65536),
    "all data zeroed": _write(
        lambda old: old[: (n := 8 + struct.unpack("<Q", old[:8])[0])] + b"\0" * (len(old) - n)
    ),
    "another number of outputs": _said("n", 2048),
    "another group size": _said("group", 32),
    "another multiplier": _said("multiplier", 3.0),
    "another number of outputs, checksum and all": _said("n", 2048, True),
    "another number of inputs, checksum and all": _said("k", 64, True),
    "an unknown format, checksum and all": _said("format", 99, True),
    "a negative number, checksum and all": _said("n", -1, True),
    "a word for a number, checksum and all": _said("n", "x", True),
    "a tensor too few": _rewritten(lambda t: t.pop(_first(t, ".data"))),
    "a tensor of another type": _replace(".scales", lambda t: t.view(torch.uint8)),
    "a tensor of half the size": _replace(".data", lambda t: t.flatten()[: t.numel() // 2]),
    "a tensor of another shape": _replace(".scales", lambda t: t.flatten()),
    "two linears swapped": _rewritten(_swap),
    "a folder in its place": _folder,
    "a link to nowhere": _link("nowhere"),
    "a link to /dev/zero": _link("/dev/zero"),
    "a pipe": _fifo,
}


def _entry(cache: Path) -> Path:
    """The one file that holds prepared weights."""
    [entry] = cache.rglob("*.safetensors")
    return entry


def _answer(server: Server) -> str:
    """Text and log-probabilities, to the last digit."""
    return json.dumps(server.complete("abc", 12, logprobs=5)["choices"])


def _served(model: Path, cache: Path | str, folder: Path) -> tuple[str, str]:
    """The answer of a server with this cache ("" if it does not come up), and its log."""
    server = start(model, folder, *SERVE, "--prepared-cache", str(cache))
    try:
        return _answer(server.wait_ready(READY)), server.log_text()
    except RuntimeError as error:
        return "", str(error)
    finally:
        end(server)


def damaged(model: Path, good: Path, expected: str, damage: str, folder: Path) -> Result:
    """A server started with a copy of the cache, damaged so."""
    cache = folder / "cache"
    shutil.copytree(good, cache)
    entry = _entry(cache)
    mode = entry.stat().st_mode
    DAMAGES[damage](entry)
    if entry.is_file() and not entry.is_symlink():
        entry.chmod(mode)  # what is wrong with it is the damage alone
    return _judged(f"cache: {damage}", _served(model, cache, folder / "run"), expected)


def _judged(attack: str, served: tuple[str, str], expected: str) -> Result:
    answer, log = served
    figure = "the same" if answer == expected else "another" if answer else "none"
    said = complaint_in(log)
    return Result(
        attack,
        f"{figure} answer{said}",
        "the same answer, no traceback",
        answer == expected and not said,
    )


def planted(model: Path, good: Path, expected: str, other: Path, folder: Path) -> Result:
    """The whole entry of another model of the same shapes, under this model's name."""
    _served(other, folder / "other", folder / "run-other")
    shutil.copytree(good, folder / "cache")
    shutil.copy(_entry(folder / "other"), _entry(folder / "cache"))
    return _judged(
        "cache: another model's entry", _served(model, folder / "cache", folder / "run"), expected
    )


def foreign_files(model: Path, expected: str, folder: Path) -> Result:
    """--prepared-cache given a folder that holds somebody's models: nothing of it may change."""
    place = folder / "models"
    (place / "sub").mkdir(parents=True)
    save_file({"x": torch.ones(4)}, place / "model.safetensors")
    save_file(
        {"source": torch.tensor(list(b"/nowhere"), dtype=torch.uint8)}, place / "a-b.safetensors"
    )
    (place / "damaged.safetensors").write_bytes(b"\0" * 100)
    (place / "notes.txt").write_text("mine")
    (place / "sub" / "model.safetensors").write_bytes(b"x")
    before = _digests(place)
    answer, log = _served(model, place, folder / "run")
    after = _digests(place)
    lost = sum(after.get(name) != digest for name, digest in before.items())
    same = answer == expected and "Traceback" not in log
    return Result(
        "a cache folder that holds others' files",
        f"{lost} of {len(before)} lost or changed, {'the same' if same else 'not the same'} answer",
        "0, the same answer",
        not lost and same,
    )


def _digests(folder: Path) -> dict[str, str]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def together(model: Path, expected: str, folder: Path) -> Result:
    """Two servers started at once that write the same entry, and a third that reads it."""
    flags = (*SERVE, "--prepared-cache", str(folder / "cache"))
    pair = [start(model, folder / str(i), *flags) for i in range(2)]
    try:
        answers = [_answer(server.wait_ready(READY)) for server in pair]
        said = complaint_in("".join(server.log_text() for server in pair))
    finally:
        for server in pair:
            end(server)
    answers.append(_served(model, folder / "cache", folder / "2")[0])
    entries = len(list((folder / "cache").rglob("*.safetensors")))
    same = sum(answer == expected for answer in answers)
    return Result(
        "two servers that write one cache at once",
        f"{same} of 3 the same answer, {entries} entries{said}",
        "3, 1 entry, no traceback",
        same == 3 and entries == 1 and not said,
    )


@pytest.fixture(scope="module")
def expected(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    answer, log = _served(wide, "none", tmp_path_factory.mktemp("expected"))
    if not answer:
        raise RuntimeError(log)
    return answer


@pytest.fixture(scope="module")
def good(wide: Path, expected: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a start has written, of which a copy is as good: a second start reads it and leaves it as it is."""
    folder = tmp_path_factory.mktemp("good")
    first, log = _served(wide, folder / "cache", folder / "0")
    shutil.copytree(folder / "cache", folder / "copy")
    before = _entry(folder / "copy").stat()
    second, more = _served(wide, folder / "copy", folder / "1")
    after = _entry(folder / "copy").stat()
    if not (first == second == expected and after.st_ino == before.st_ino) or "WARNING" in more:
        raise RuntimeError(log + more)
    return folder / "cache"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(
    record: Record, wide: Path, good: Path, expected: str, tmp_path: Path, damage: str
) -> None:
    record(damaged(wide, good, expected, damage, tmp_path))
    shutil.rmtree(tmp_path)


def test_an_entry_of_another_model(
    record: Record, wide: Path, good: Path, expected: str, tmp_path: Path
) -> None:
    other = models.quantized(wide, tmp_path / "model", seed=1, group=models.GROUP)
    record(planted(wide, good, expected, other, tmp_path))
    shutil.rmtree(tmp_path)


def test_files_of_others(record: Record, wide: Path, expected: str, tmp_path: Path) -> None:
    record(foreign_files(wide, expected, tmp_path))


def test_two_at_once(record: Record, wide: Path, expected: str, tmp_path: Path) -> None:
    record(together(wide, expected, tmp_path))
