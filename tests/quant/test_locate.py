"""Which file a name means, for weights and tokenizer alike; and the one line for each that means nothing."""

from pathlib import Path

import pytest

from nibble.errors import CheckpointError
from nibble.quant.locate import locate


def files(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("model.gguf",), "model.gguf"),
        (("model.gguf", "mmproj-model-f16.gguf"), "model.gguf"),
        (("a.gguf", "a.mmproj-Q8_0.gguf", "config.json"), "a.gguf"),
        (("m-00002-of-00002.gguf", "m-00001-of-00002.gguf"), "m-00001-of-00002.gguf"),
        (
            ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf"),
            "m-00001-of-00002.gguf",
        ),
        (("model.safetensors", "a.gguf", "b.gguf"), "."),
        (("config.json",), "."),
    ],
)
def test_what_a_folder_means(tmp_path: Path, names: tuple[str, ...], meant: str) -> None:
    folder = files(tmp_path / "folder", *names)
    assert locate(folder) == folder / meant


def test_any_part_of_a_split_model_means_the_first(tmp_path: Path) -> None:
    folder = files(tmp_path / "folder", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert locate(folder / "m-00002-of-00002.gguf") == folder / "m-00001-of-00002.gguf"


def test_a_gguf_file_needs_no_ending(tmp_path: Path) -> None:
    blob = files(tmp_path / "blobs", "sha256-0123abcd") / "sha256-0123abcd"
    assert locate(blob) == blob


@pytest.mark.parametrize(
    ("names", "name", "parts"),
    [
        (("a.gguf", "b.gguf"), ".", ("holds 2 GGUF models: a.gguf, b.gguf", "path of one")),
        (("a-00001-of-00002.gguf", "b.gguf"), ".", ("a-*-of-00002.gguf, b.gguf",)),
        (tuple(f"q{i}.gguf" for i in range(12)), ".", ("12 GGUF models", "and 4 more")),
        (("mmproj-a.gguf",), ".", ("image projector (mmproj-a.gguf)",)),
        (("m-00002-of-00003.gguf",), ".", ("part 1 of 3 is missing", "m-00001-of-00003.gguf")),
    ],
)
def test_what_means_no_model_is_said_in_one_line(
    tmp_path: Path, names: tuple[str, ...], name: str, parts: tuple[str, ...]
) -> None:
    folder = files(tmp_path / "folder", *names)
    with pytest.raises(CheckpointError) as caught:
        locate(folder / name)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert all(part in message for part in parts), message


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        locate(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "./typo-folder",
        "/no/such/folder",
        "nothing",
        "nothing.gguf",
        "models/nothing.gguf",
        "models/deep/nothing",
        "~/nothing",
        "two words/model",
        "a/" + "b" * 120,
    ],
)
def test_a_path_that_is_not_there_does_not_exist(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        locate(name)
    assert "Repo id" not in str(caught.value)
