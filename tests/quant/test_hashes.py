"""Hashes of a checkpoint's files against sha256sum and git, and what is said of a file that has changed."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

import nibble
from nibble.cli import main
from nibble.engine.llm import LLM
from nibble.quant.hashes import SUMS
from nibble.quant.reformat import reformat


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashes") / "model"
    return nibble.convert(tiny_llama, folder, "fp8", evaluate=False)


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "model")


def verify(capsys: pytest.CaptureFixture, folder: Path) -> tuple[int, list[str]]:
    code = main(["verify", str(folder)])
    return code, capsys.readouterr().out.splitlines()


def sha256sum(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils")
def test_sha256sum_agrees(model, capsys):
    done = sha256sum(model)
    assert done.returncode == 0, done.stderr
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert checked == {
        file.name
        for file in model.iterdir()
        if file.name not in ("README.md", "nibble_quality.json", SUMS)
    }
    assert verify(capsys, model)[0] == 0


def test_a_flipped_bit_is_one_line(model, capsys):
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    code, [line] = verify(capsys, model)
    assert code == 2
    assert line.startswith(f"{file}: has SHA-256 {hashlib.sha256(raw).hexdigest()[:16]}")


def test_each_wrong_file_has_its_line(model, capsys):
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").unlink()
    (model / "model-00002.safetensors").write_bytes(b"planted")
    code, lines = verify(capsys, model)
    assert code == 2
    assert [Path(line.partition(":")[0]).name for line in lines] == [
        "config.json",
        "tokenizer.json",
        "model-00002.safetensors",
    ]
    assert "is missing" in lines[1]
    assert "is not in SHA256SUMS, and would be loaded" in lines[2]


def test_the_card_and_notes_may_be_edited(model, capsys):
    (model / "README.md").write_text("mine")
    (model / "notes.txt").write_text("mine too")
    assert verify(capsys, model)[0] == 0


@pytest.mark.parametrize(
    "line", ["no hash", "0" * 64 + "  ../elsewhere", "0" * 64 + "  /etc/passwd"]
)
def test_a_list_that_is_none_is_an_error(model, capsys, line):
    (model / SUMS).write_text(line + "\n")
    assert main(["verify", str(model)]) == 2
    assert "is no hash of a file beside it" in capsys.readouterr().err


def test_nothing_to_compare_with_is_an_error(tiny_llama, capsys):
    assert main(["verify", str(tiny_llama)]) == 2
    assert "nothing to compare with" in capsys.readouterr().err


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_the_hubs_cache_knows_its_files(tmp_path, capsys):
    """blobs are called by their hash: git's of small files, SHA-256 of large ones."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    small, large = b'{"a": 1}', b"weights" * 999
    for name, content, digest in (
        ("config.json", small, git_hash(small)),
        ("model.safetensors", large, hashlib.sha256(large).hexdigest()),
    ):
        (blobs / digest).write_bytes(content)
        (snapshot / name).symlink_to(blobs / digest)
    assert verify(capsys, snapshot)[0] == 0
    for name in ("config.json", "model.safetensors"):
        with (snapshot / name).open("r+b") as file:
            file.write(b"X")
    code, lines = verify(capsys, snapshot)
    assert code == 2
    assert [Path(line.partition(":")[0]).name for line in lines] == [
        "config.json",
        "model.safetensors",
    ]


def test_a_folder_that_the_hub_downloaded_to_knows_its_files(tmp_path, capsys):
    """As `hf download --local-dir` leaves it."""
    content = b'{"a": 1}'
    metadata = tmp_path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{'c' * 40}\n{git_hash(content)}\n1700000000.0\n")
    (tmp_path / "config.json").write_bytes(content)
    assert verify(capsys, tmp_path)[0] == 0
    (tmp_path / "config.json").write_bytes(content + b"\n")
    assert verify(capsys, tmp_path)[0] == 2


def test_git_agrees_with_the_hash_of_a_small_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    done = subprocess.run(["git", "hash-object", "f"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == git_hash(b"abc")


def test_other_ways_to_a_checkpoint_write_hashes_too(converted, tiny_llama, tmp_path, capsys):
    reformat(converted, tmp_path / "reformatted", "compressed-tensors")
    LLM(str(tiny_llama), quantize="int8", save_quantized=str(tmp_path / "saved"))
    for name in ("reformatted", "saved"):
        assert (tmp_path / name / SUMS).is_file()
        assert verify(capsys, tmp_path / name)[0] == 0
