"""What the files beside tokenizer.json say of a tokenizer: its special tokens by role, tokens to add, templates, ends.

tokenizer_config.json     special tokens by role, tokens to add, older chat templates
special_tokens_map.json   special tokens by role, where the former lacks them
added_tokens.json         older: tokens to add
generation_config.json    eos_token_id, one or several (config.json's where it has none)
chat_template.jinja, additional_chat_templates/NAME.jinja
                          the chat templates (older homes: tokenizer_config.json, chat_template.json)
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken

from ...architectures import limits
from ...architectures.config import eos_token_ids
from ...architectures.multimodal import text_config
from ...errors import CheckpointError
from ...quant.files import read_bounded, read_text

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


class TokenizerConfig:
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
        return [special_token(content) for content in contents] + [
            AddedToken(**{k: v for k, v in value.items() if k != "__type"})
            if isinstance(value, dict)
            else special_token(value)
            for value in listed
        ]

    def listed_tokens(self, special: set[str]) -> list[AddedToken]:
        """Tokens listed with an id, by id; `special` are special also where added_tokens.json cannot say so."""
        if "added_tokens_decoder" in self.config:
            listed = self.config["added_tokens_decoder"] or {}
            return [
                AddedToken(**{"special": False, **entry, "content": _named(entry.get("content"))})
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
        if len(files) > limits.MAX_TEMPLATES:
            raise ValueError(f"{len(files)} additional chat templates")
        templates |= {file.stem: read_text(file, limits.MAX_TEMPLATE_BYTES) for file in files}
        default = self.folder / "chat_template.jinja"
        return templates | (
            {"default": read_text(default, limits.MAX_TEMPLATE_BYTES)} if default.exists() else {}
        )

    def eos_token_ids(self) -> list[int]:
        """generation_config.json's, else config.json's."""
        files = [self.folder / name for name in ("generation_config.json", "config.json")]
        return next(
            (ids for file in files if (ids := eos_token_ids(text_config(_read_json(file)), file))),
            [],
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return msgspec.json.decode(read_bounded(file, limits.MAX_JSON_BYTES), type=dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"is not a JSON object: {error}", file=file, fix="download it again"
        ) from None


def _named(content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise ValueError(f"a token is {content!r}")
    return content


def special_token(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
