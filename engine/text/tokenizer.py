"""Tokenizer: text <-> token ids, and messages -> text, from the files of a checkpoint. No torch, no transformers.

    tokenizer.json            the tokenizer itself (Hugging Face `tokenizers`). What it adds at the start and end of a
                              text counts, not tokenizer_config.json's add_bos_token, as in transformers 5
    tokenizer_config.json     special tokens by role, tokens to add, older chat templates
    special_tokens_map.json   special tokens by role, where the former lacks them
    added_tokens.json         older: tokens to add
    generation_config.json    eos_token_id, one or several (config.json's where it has none)
    chat_template.jinja, additional_chat_templates/NAME.jinja
                              the chat templates (older homes: tokenizer_config.json, chat_template.json)

Where these files are, or are made: tokenizer_files.py.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken

from ...errors import CheckpointError
from . import chat_template
from .tokenizer_files import tokenizer_folder

log = logging.getLogger(__name__)

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class _Files:
    """What the JSON files of a tokenizer folder say."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _read_json(folder / "tokenizer_config.json")
        self.special = _read_json(folder / "special_tokens_map.json")

    def special_tokens(self) -> dict[str, str]:
        """Role -> content."""
        contents = {r: _content(self.config.get(r, self.special.get(r))) for r in _ROLES}
        return {role: content for role, content in contents.items() if content is not None}

    def further_special_tokens(self) -> list[AddedToken]:
        """Those without one of the roles above: under names of the model's own, then in a list."""
        sources = [self.config]
        if "added_tokens_decoder" not in self.config:
            sources.append(self.special)
        found = [
            s.get("extra_special_tokens") or s.get("additional_special_tokens") for s in sources
        ]
        listed: Any = next(filter(None, found), [])
        named = [v for k, v in self.config.items() if k.endswith("_token") and k not in _ROLES]
        if isinstance(listed, dict):
            named, listed = [*named, *listed.values()], []
        contents = [content for value in named if (content := _content(value))]
        return [_special(content) for content in contents] + [
            AddedToken(**{k: v for k, v in value.items() if k != "__type"})
            if isinstance(value, dict)
            else _special(value)
            for value in listed
        ]

    def listed_tokens(self, special: set[str]) -> list[AddedToken]:
        """Tokens listed with an id, by id; `special` are special also where added_tokens.json cannot say so."""
        if "added_tokens_decoder" in self.config:
            listed = self.config["added_tokens_decoder"] or {}
            return [
                AddedToken(**{**entry, "special": entry.get("special", False)})
                for _, entry in sorted(listed.items(), key=lambda entry: int(entry[0]))
            ]
        older = _read_json(self.folder / "added_tokens.json")
        return [
            AddedToken(content, special=content in special, normalized=content not in special)
            for content, _ in sorted(older.items(), key=lambda entry: entry[1])
        ]

    def chat_templates(self) -> dict[str, str]:
        """Name -> source, as far as they can be read. What cannot is said in the log."""
        found = self.config.get("chat_template") or _read_json(
            self.folder / "chat_template.json"
        ).get("chat_template")
        entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
        templates = {}
        for entry in entries if found else ():
            if isinstance(entry, dict) and all(
                isinstance(entry.get(k), str) for k in ("name", "template")
            ):
                templates[entry["name"]] = entry["template"]
            else:
                log.warning(
                    "%s: a chat_template without name and template is left out", self.folder
                )
        files = sorted(self.folder.glob("additional_chat_templates/*.jinja"))
        templates |= {file.stem: file.read_text(encoding="utf-8") for file in files}
        default = self.folder / "chat_template.jinja"
        return templates | (
            {"default": default.read_text(encoding="utf-8")} if default.is_file() else {}
        )

    def eos_token_ids(self) -> list[int]:
        found = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        if found is None:
            found = _read_json(self.folder / "config.json").get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) for i in ids):
            raise ValueError(f"eos_token_id is {found!r}")
        return ids


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"is not a JSON object: {error}", file=file, fix="download it again"
        ) from None


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
        self._template_problem = self._drop_broken_templates()
        own_eos = backend.token_to_id(self.eos_token) if self.eos_token else None
        self.eos_token_ids = sorted({*eos_token_ids, *(() if own_eos is None else (own_eos,))})
        backend.no_truncation()
        backend.no_padding()
        self._byte_level = backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "

    @classmethod
    def from_pretrained(cls, model: str | Path, revision: str | None = None) -> "Tokenizer":
        """Read the tokenizer of a local folder, a .gguf file or a Hub id. CheckpointError if missing or damaged."""
        files = _Files(tokenizer_folder(model, revision))
        backend = _load_backend(files.folder)
        try:
            special_tokens = files.special_tokens()
            _add_missing_tokens(backend, files, special_tokens)
            templates, eos_token_ids = files.chat_templates(), files.eos_token_ids()
        except (ValueError, TypeError, AttributeError) as error:  # a field of another type
            raise CheckpointError(
                f"its tokenizer's configuration makes no sense: {error}".splitlines()[0],
                file=files.folder,
                fix="copy the tokenizer's .json files from the original model",
            ) from error
        return cls(backend, special_tokens, chat_templates=templates, eos_token_ids=eos_token_ids)

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

    def _drop_broken_templates(self) -> str | None:
        """Why a chat template was dropped, said in the log too: text can be completed without one."""
        last = None
        for name, source in list(self._chat_templates.items()):
            if problem := chat_template.problem_of(source):
                last = f"the chat template {name!r} is no valid Jinja: {problem}"
                log.warning("%s; this model is served without it", last)
                del self._chat_templates[name]
        return last

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
        tools: Sequence[Mapping[str, Any]] | None = None,
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
                self._template_problem
                or "this model has no chat template; use text completions, or serve its instruct version"
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


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"is not a tokenizer that this version of `tokenizers` reads: {error}".splitlines()[0],
            file=file,
            fix="`pip install -U tokenizers`, or download the file again if it is damaged",
        ) from None


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, files: _Files, special_tokens: Mapping[str, str]
) -> None:
    """Tokens that other files name and tokenizer.json lacks, under the ids that transformers gives them: first those
    listed with an id, in the order of their ids, then special ones by role, then further special ones."""
    special = [_special(content) for content in special_tokens.values()]
    special += files.further_special_tokens()
    tokens = files.listed_tokens({token.content for token in special}) + special
    backend.add_tokens([token for token in tokens if backend.token_to_id(token.content) is None])
    backend.add_special_tokens([token for token in tokens if token.special])


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


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
