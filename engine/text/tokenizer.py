"""Tokenizer: text <-> token ids, and messages -> text, from the files of a checkpoint. No torch, no transformers.

    tokenizer.json            the tokenizer itself (Hugging Face `tokenizers`). What it adds at the start and end of a
                              text counts, not tokenizer_config.json's add_bos_token, as in transformers 5
    tokenizer_config.json     special tokens by role, tokens to add, older chat templates
    special_tokens_map.json   special tokens by role, where the former lacks them
    generation_config.json    eos_token_id, one or several (config.json's where it has none)
    chat_template.jinja       the chat template (older homes: tokenizer_config.json, chat_template.json)

A GGUF file's tokenizer is written as these files into a cache folder once. A folder that holds only slow tokenizer
files (tokenizer.model, vocab.json) is converted by transformers at each start.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken

from ...errors import CheckpointError
from ...version import __version__
from . import chat_template

_HUB_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "*config.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CACHE = Path("~/.cache/nibble/tokenizers")


class Tokenizer:
    """One checkpoint's tokenizer. Thread-safe: nothing changes after construction."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        *,
        chat_templates: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ):
        """`special_tokens`: role -> content. `chat_templates`: name -> Jinja source; "default", perhaps "tool_use"."""
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        own_eos = backend.token_to_id(self.eos_token) if self.eos_token else None
        self.eos_token_ids = sorted({*eos_token_ids, *(() if own_eos is None else (own_eos,))})
        backend.no_truncation()
        backend.no_padding()
        self._byte_level = backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "

    @classmethod
    def from_pretrained(cls, model: str | Path, revision: str | None = None) -> "Tokenizer":
        """Read the tokenizer of a local folder, a .gguf file or a Hub id. CheckpointError if missing or damaged."""
        folder = _folder_of(model, revision)
        config = _read_json(folder / "tokenizer_config.json")
        fallback = _read_json(folder / "special_tokens_map.json")
        contents = {role: _content(config.get(role, fallback.get(role))) for role in _ROLES}
        special_tokens = {
            role: content for role, content in contents.items() if content is not None
        }
        backend = _load_backend(folder)
        _add_missing_tokens(backend, config, special_tokens)
        return cls(
            backend,
            special_tokens,
            chat_templates=_read_chat_templates(folder, config),
            eos_token_ids=_read_eos_token_ids(folder),
        )

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @cached_property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in `text` are recognised either way; ValueError for lone surrogates."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD and unknown ids nothing."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, also where they are not UTF-8 alone; b"" for an unknown id."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return _bytes_of_byte_level(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    def token_str(self, token_id: int) -> str:
        """One token as text, `bytes:\\xf0\\x9f` (as OpenAI writes it) where its bytes are not UTF-8 alone."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False, the template wrote them.

        ValueError if the checkpoint has no chat template, or its template refuses the messages.
        """
        templates = self._chat_templates
        template = templates.get("tool_use") if tools else None
        template = template or templates.get("default")
        if template is None:
            raise ValueError(
                "this model has no chat template; use text completions, or serve its instruct version"
            )
        return chat_template.render(
            template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **kwargs},
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` skips with skip_special_tokens."""
        return frozenset(
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        )


def _folder_of(model: str | Path, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if not path.exists():
        path = _download(str(model), revision)
    if path.is_file():
        return _gguf_folder(path)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1 and not any(path.glob("*.safetensors")):
        return _gguf_folder(gguf_files[0])
    return path


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"has no tokenizer to be found: {reason}",
            file=name,
            fix="give a folder, a .gguf file or a Hub id owner/name",
        ) from None


def _gguf_folder(file: Path) -> Path:
    """The tokenizer files of a GGUF file, made at its first use and kept as long as the file does not change."""
    stat = file.stat()
    key = f"{__version__}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    folder = _cache_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    if folder.is_dir():
        return folder
    from ...quant.checkpoint import (
        open_checkpoint,
    )  # these import torch, for the weights beside the tokenizer
    from ...quant.checkpoint.side_files import copy_side_files

    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        copy_side_files(open_checkpoint(file), partial)
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


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


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"is not a tokenizer: {error}".splitlines()[0], file=file, fix="download it again"
            ) from None
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            "has no tokenizer.json", file=folder, fix="copy it from the original model"
        )
    from transformers import (
        AutoTokenizer,
    )  # seconds to import; only for checkpoints without tokenizer.json

    return AutoTokenizer.from_pretrained(folder).backend_tokenizer


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: dict, special_tokens: Mapping[str, str]
) -> None:
    """Tokens that the configuration names and tokenizer.json lacks, in the order of their ids, as transformers does."""
    listed = sorted(
        (config.get("added_tokens_decoder") or {}).items(), key=lambda entry: int(entry[0])
    )
    tokens = [
        AddedToken(**{**entry, "special": entry.get("special", False)}) for _, entry in listed
    ]
    tokens += [
        AddedToken(content, special=True, normalized=False) for content in special_tokens.values()
    ]
    backend.add_tokens([token for token in tokens if backend.token_to_id(token.content) is None])
    backend.add_special_tokens([token for token in tokens if token.special])


def _read_chat_templates(folder: Path, config: dict) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    found = config.get("chat_template") or _read_json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {"default": found} if found else {}


def _read_eos_token_ids(folder: Path) -> list[int]:
    found = _read_json(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = _read_json(folder / "config.json").get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"is not a JSON object: {error}", file=file, fix="download it again"
        ) from None


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible stand-ins for the 256 bytes: printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _bytes_of_byte_level(token: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()
