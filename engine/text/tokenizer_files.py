"""Where the tokenizer files of a model are: its own folder, or one made at the first use and kept. No torch.

    tokenizer.json in the folder     the folder itself
    a GGUF file                      made of its metadata
    tokenizer.model (SentencePiece, tiktoken) or vocab.json and merges.txt
                                     made by transformers, which knows what each model's class adds to them; in a
                                     process of its own (convert_tokenizer.py), for it loads torch

A folder made lies under ~/.cache/nibble/tokenizers as long as what it was made of does not change. It is believed if
nobody else could have written to it and its files are under the hashes that were written with them; else there is one
warning, and it is made again.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ...architectures import limits
from ...errors import CheckpointError
from ...quant import hashes
from ...quant.files import check_size
from ...quant.locate import locate
from ...quant.private_files import why_not_private
from ...version import __version__

log = logging.getLogger(__name__)

# -P: a folder named like a library in the working directory must not be imported in its place.
CONVERT_COMMAND = (sys.executable, "-P", "-m", "nibble.engine.text.convert_tokenizer")
_CACHE = Path("~/.cache/nibble/tokenizers")
_CONVERTED = (
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json",
)  # fmt: skip
_KEPT = ("config.json", "generation_config.json", "chat_template.json")  # beside what is made
_CONVERT_SECONDS = 300
_GPT2_END = "<|endoftext|>"


def tokenizer_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder with the tokenizer.json of a local path or Hub id. CheckpointError where there is no way to one."""
    path = locate(model, revision)
    if path.is_file():
        return _made_once([path], lambda out: _extract(path, out))
    if (path / "tokenizer.json").is_file():
        return path
    sources = [file for name in (*_CONVERTED, *_KEPT) if (file := path / name).is_file()]
    if not {"tokenizer.model", "vocab.json"} & {file.name for file in sources}:
        raise CheckpointError(
            "has no tokenizer.json", file=path, fix="copy it from the original model"
        )
    for file in sources:
        check_size(file, limits.MAX_TOKENIZER_BYTES)
    _check_packages(path)
    try:
        return _made_once(sources, lambda out: _convert(path, out))
    except CheckpointError:
        if not _is_gpt2(path):
            raise
    log.warning(
        "%s: has vocab.json and merges.txt, but nothing says whose: text is split as GPT-2 does "
        "(copy tokenizer_config.json or tokenizer.json from the original model)",
        path,
    )
    return _made_once([*sources, path], lambda out: _write_gpt2(path, out))


def _extract(file: Path, out: Path) -> None:
    from ...quant.formats.gguf.container import (
        GgufFile,  # NumPy, which other models need not wait for
    )
    from ...quant.formats.gguf.side_files import write_side_files

    write_side_files(GgufFile(file), out)


def _made_once(sources: Iterable[Path], make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled from `sources`, now or at an earlier start."""
    stats = [(str(file.resolve()), file.stat()) for file in sources]
    key = "|".join([__version__, *(f"{name}|{s.st_size}|{s.st_mtime_ns}" for name, s in stats)])
    folder = _cache_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    if folder.is_dir():
        problem = _why_not_believed(folder)
        if problem is None:
            return folder
        log.warning("%s is made again: %s", folder, problem)
        shutil.rmtree(folder)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        make(partial)
        (partial / hashes.SUMS).write_text(hashes.sums(partial, {}))
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _why_not_believed(folder: Path) -> str | None:
    """None for a folder that was made here and is as it was."""
    for path in (folder, *folder.rglob("*")):
        if reason := why_not_private(path, folder=path.is_dir()):
            return f"{path} {reason}"
    try:
        return next(iter(hashes.problems(folder)), None)
    except CheckpointError as error:
        return str(error)


def _cache_dir() -> Path:
    """The cache folder, made if need be; where there is no writable home, a folder for this process alone."""
    try:
        folder = _CACHE.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        pass
    return Path(tempfile.mkdtemp(prefix="nibble-"))


def _check_packages(folder: Path) -> None:
    """CheckpointError naming the packages that transformers needs for a tokenizer.model and does not find."""
    file = folder / "tokenizer.model"
    if not file.is_file() or (folder / "vocab.json").is_file():
        return
    with file.open("rb") as stream:
        sentencepiece = (
            stream.read(1) == b"\n"
        )  # a protobuf's first field; tiktoken's are lines of text
    needed = ("sentencepiece", "google.protobuf") if sentencepiece else ("tiktoken",)
    if not all(_is_installed(module) for module in needed):
        packages = "sentencepiece protobuf" if sentencepiece else "tiktoken"
        raise CheckpointError(
            "has no tokenizer.json, and its tokenizer.model cannot be read",
            file=folder,
            fix=f"`pip install {packages}`, or copy tokenizer.json from the original model",
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is not there
        return False


def _convert(folder: Path, out: Path) -> None:
    _copy(folder, out, _KEPT)
    try:
        done = subprocess.run(
            [*CONVERT_COMMAND, str(folder.resolve()), str(out)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CONVERT_SECONDS,
        )
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        problem = f"transformers did not end within {_CONVERT_SECONDS} s"
    if not (out / "tokenizer.json").is_file():
        raise CheckpointError(
            f"its tokenizer files cannot be read: {problem}",
            file=folder,
            fix="copy tokenizer.json from the original model",
        )


def _is_gpt2(folder: Path) -> bool:
    """Whether vocab.json and merges.txt can only be read as GPT-2's, the first to have them: nothing names a class,
    and spaces are written as GPT-2 writes them."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    return (
        vocab.is_file()
        and merges.is_file()
        and not (folder / "tokenizer_config.json").exists()
        and "Ġ" in merges.read_text(encoding="utf-8")
    )


def _write_gpt2(folder: Path, out: Path) -> None:
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"its vocab.json and merges.txt do not fit: {error}".splitlines()[0], file=folder
        ) from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _GPT2_END)
    config = special if tokenizer.token_to_id(_GPT2_END) is not None else {}
    (out / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    _copy(folder, out, (*_KEPT, "added_tokens.json", "special_tokens_map.json"))


def _copy(folder: Path, out: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
