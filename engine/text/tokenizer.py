"""Tokenizer: text <-> token ids, and messages -> token ids, from the files of a checkpoint. No torch, no transformers.

tokenizer.json is the tokenizer itself (Hugging Face `tokenizers`). What it adds at the start and end of a text counts,
not tokenizer_config.json's add_bos_token, as in transformers 5. What other files say of it: tokenizer_config.py. Where
these files are, or are made: tokenizer_files.py. What users write forms no control tokens: control_tokens.py.

Invariant: other threads run while a text is tokenised, and the time and memory that a text takes are bounded by the
number of tokens that are wanted of it, not by its length.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from ...architectures import limits
from ...errors import CheckpointError
from ...quant.files import read_bounded
from .chat_template import ChatFormat, ChatRenderer, Conversation
from .control_tokens import MARK, check_unmarked
from .tokenizer_config import TokenizerConfig, special_token
from .tokenizer_files import tokenizer_folder

_CHARS_PER_TOKEN = 8  # more than in any language's ordinary text
_SLACK = 256  # tokens that a text cut off in the middle may have more than the same part of the whole has
_CHATML = re.compile(r"<\|.*\|>", re.DOTALL)


class TooManyTokens(ValueError):
    """A text has more tokens than it may: `count`, or, where the rest of it was not looked at, at least those."""

    def __init__(self, count: int, at_least: bool):
        super().__init__(f"the text has {'at least ' * at_least}{count} tokens")
        self.count, self.at_least = count, at_least


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
        _remove_marks(backend, self.control_tokens)
        _remember_nothing(backend)
        self._byte_level = backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "

    @classmethod
    def from_pretrained(cls, model: str | Path, revision: str | None = None) -> "Tokenizer":
        """Read the tokenizer of a local folder, a .gguf file or a Hub id. CheckpointError if missing or damaged."""
        files = TokenizerConfig(tokenizer_folder(model, revision))
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

    @cached_property
    def control_tokens(self) -> list[str]:
        """The special tokens; also those written as ChatML and Llama 3 write theirs, `<|...|>`, that their file forgets
        to call special. What only structures a text (`<think>`, runs of newlines) is none."""
        added = self.backend.get_added_tokens_decoder().values()
        return [t.content for t in added if t.special or _CHATML.fullmatch(t.content)]

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        max_tokens: int | None = None,
        marked: bool = False,
    ) -> list[int]:
        """Token ids. Special tokens written out in `text` are recognised either way, but not those with MARK in them,
        which only a text that is `marked` may have.

        TooManyTokens if there are more than max_tokens. ValueError for lone surrogates.
        """
        if not marked:
            check_unmarked(text)
        if max_tokens is not None:
            self._check_length(text, max_tokens)
        encoding = self._encoding(text, add_special_tokens)
        if max_tokens is not None and len(encoding) > max_tokens:
            raise TooManyTokens(len(encoding), at_least=False)
        return encoding.ids

    def _check_length(self, text: str, max_tokens: int) -> None:
        """TooManyTokens as soon as the beginning of a long text has too many."""
        if len(begun := beginning(self, text, max_tokens)) < len(text):
            count = len(self._encoding(begun, add_special_tokens=False))
            raise TooManyTokens(count - _SLACK, at_least=True)

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        # `encode` would hold the interpreter's lock for as long as it takes: seconds, for a book
        try:
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except TypeError as error:  # lone surrogates
            raise ValueError(f"the text is no Unicode: {error}") from None

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

    def chat_format(self, parse_special_tokens: bool = False) -> ChatFormat:
        """What renders conversations elsewhere (renderer.py). parse_special_tokens: see encode_chat."""
        controls = [] if parse_special_tokens else self.control_tokens
        return ChatFormat(self._chat_templates, self.special_tokens, controls)

    @cached_property
    def _renderers(self) -> dict[bool, ChatRenderer]:
        return {parse: ChatRenderer(self.chat_format(parse)) for parse in (False, True)}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation, to look at: `encode_chat` makes tokens of it that users cannot forge.

        ValueError if the checkpoint has no chat template, or its template refuses the messages.
        """
        return self._renderers[True].render(
            _conversation(messages, tools, add_generation_prompt, continue_final_message, kwargs)
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        parse_special_tokens: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt of a conversation. Special tokens that are written out in it are text, or with
        parse_special_tokens the tokens themselves, as in transformers. Rendered in this process: of a template that you
        do not trust, and for a server, see renderer.py. ValueError as apply_chat_template."""
        text = self._renderers[parse_special_tokens].render(
            _conversation(messages, tools, add_generation_prompt, continue_final_message, kwargs)
        )
        return self.encode(text, add_special_tokens=False, marked=True)

    @property
    def chat_template(self) -> str:
        """That of conversations with tools, where there are two; empty where there is none."""
        return self._chat_templates.get("tool_use") or self._chat_templates.get("default", "")

    @cached_property
    def special_token_ids(self) -> dict[str, int]:
        """Content -> id of the special tokens."""
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` skips with skip_special_tokens."""
        return frozenset(self.special_token_ids.values())


def beginning(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """A text, or so much of it as has more than `tokens` tokens for certain, however it goes on: first a beginning that
    most texts of so many fit in, then twice as much, and so on. All of it is tokenised only if half of it had few
    enough."""
    end = (tokens + _SLACK) * _CHARS_PER_TOKEN
    while end < len(text):
        if len(tokenizer._encoding(text[:end], add_special_tokens=False)) > tokens + _SLACK:
            return text[:end]
        end *= 2
    return text


def _conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: dict[str, Any],
) -> Conversation:
    return Conversation(
        [dict(message) for message in messages],
        None if tools is None else [dict(tool) for tool in tools],
        add_generation_prompt,
        continue_final_message,
        variables,
    )


def _remove_marks(backend: tokenizers.Tokenizer, control_tokens: Sequence[str]) -> None:
    """Make a tokenizer take MARK out of a text once it has found the control tokens in it."""
    added = backend.get_added_tokens_decoder().values()
    controls = set(control_tokens)
    steps: list[Any]
    if any(token.normalized for token in added if token.content in controls):
        # These are looked for after normalizing, where the mark must still be there: it goes one step later, and the
        # text is split in its place.
        steps = [pre_tokenizers.Split(MARK, behavior="removed"), backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([step for step in steps if step])
    else:
        steps = [normalizers.Replace(MARK, ""), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step])


def _remember_nothing(backend: tokenizers.Tokenizer) -> None:
    """Turn off the cache of ten thousand words that some models have: it makes nothing faster, and where a tokenizer
    splits little it keeps the texts of strangers, hundreds of megabytes of them."""
    if isinstance(backend.model, (tokenizers.models.BPE, tokenizers.models.Unigram)):
        backend.model._resize_cache(0)


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    data = read_bounded(file, limits.MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"is not a tokenizer that this version of `tokenizers` reads: {error}".splitlines()[0],
            file=file,
            fix="`pip install -U tokenizers`, or download the file again if it is damaged",
        ) from None


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, files: TokenizerConfig, special_tokens: Mapping[str, str]
) -> None:
    """Tokens that other files name and tokenizer.json lacks, under the ids that transformers gives them: first those
    listed with an id, in the order of their ids, then special ones by role, then further special ones."""
    special = [special_token(content) for content in special_tokens.values()]
    special += files.further_special_tokens()
    tokens = files.listed_tokens({token.content for token in special}) + special
    backend.add_tokens([token for token in tokens if backend.token_to_id(token.content) is None])
    backend.add_special_tokens([token for token in tokens if token.special])


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
