"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json.

    tokenizer.ggml.model  gpt2   byte-level BPE; merges in the file; `tokenizer.ggml.pre` names the split regex
                          llama  SentencePiece BPE with byte fallback; merges follow from the vocabulary's scores
    token_type            3 control (special), 4 user defined (matched whole, not special), 6 byte

Built here and not by transformers' reader, because that one ignores `pre = smollm` (digits stand alone) and needs 20 s
for Gemma's vocabulary, which a server would pay at each start. The tests compare the two. Source: llama.cpp
`llama-vocab.cpp`.
"""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ....errors import CheckpointError, UnsupportedError, UserError
from .container import GgufFile

_LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
_TEKKEN_SPLIT = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                 r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                 r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits stand alone
# What takes a whole word that is a token before it looks at merges, and begins with BOS unless the file says otherwise
_WHOLE_WORDS = {"llama-bpe": _LLAMA3_SPLIT, "llama3": _LLAMA3_SPLIT, "llama-v3": _LLAMA3_SPLIT,
                "falcon3": _LLAMA3_SPLIT, "tekken": _TEKKEN_SPLIT}  # fmt: skip
_QWEN35_SPLIT = _QWEN2_SPLIT.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)  # marks are of words
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = (  # Tekken's, with English endings and digits by three
    _TEKKEN_SPLIT.replace(r"\p{M}]+|", rf"\p{{M}}]+{_ENDING}|", 1)
    .replace(r"\p{M}]*|", rf"\p{{M}}]*{_ENDING}|", 1)
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|", 1)
)
_SPLITS = _WHOLE_WORDS | {"qwen2": _QWEN2_SPLIT, "qwen35": _QWEN35_SPLIT, "gpt-4o": _GPT4O_SPLIT}
_GPT2_LIKE = ("default", "gpt-2", "olmo", "smollm")
_CONTROL, _USER_DEFINED = 3, 4


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file; `Tokenizer.save` makes it a tokenizer.json.

    Raises UnsupportedError for a model or pre-tokenizer other than those above, CheckpointError for missing metadata.
    """
    kind = _get(file, "model", str)
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported (gpt2 and llama are)"
        )
    gemma = file.metadata["general.architecture"].startswith("gemma")
    build = _byte_level if kind == "gpt2" else _gemma if gemma else _sentencepiece
    try:
        tokenizer = build(file)
        _add_special_tokens(file, tokenizer)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises nothing narrower for a merge of unknown tokens
        raise CheckpointError(
            f"its tokenizer is damaged: {error}".splitlines()[0],
            file=file.path,
            fix="convert the model to GGUF again, or use another file of it",
        ) from None
    if adds_bos(file):
        bos = _token(file, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, _id(file, "bos"))],
        )
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """tokenizer_config.json, without the chat template (which has a file of its own)."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos(file),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get(
            f"{file.metadata['general.architecture']}.context_length"
        ),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := _token(file, key)) is not None:
            config[f"{name}_token"] = token
    return config


def adds_bos(file: GgufFile) -> bool:
    """Whether a prompt begins with BOS; where the file does not say, llama.cpp's defaults."""
    by_default = (
        _get(file, "model", str) == "llama"
        or file.metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    )
    return (
        bool(file.metadata.get("tokenizer.ggml.add_bos_token", by_default))
        and _id(file, "bos") is not None
    )


def _byte_level(file: GgufFile) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS and pre not in _GPT2_LIKE:
        known = ", ".join((*_GPT2_LIKE, *_SPLITS))
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported (supported: {known})"
        )
    vocab = {token: i for i, token in enumerate(_get(file, "tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in _get(file, "merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in ("qwen2", "qwen35"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """Llama 2's: a space before the text, and before each piece, becomes ▁."""
    tokens = _get(file, "tokens")
    tokenizer = _byte_fallback_bpe(
        file, tokens, dict(zip(tokens, _get(file, "scores"), strict=False))
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _gemma(file: GgufFile) -> Tokenizer:
    """As transformers' GemmaTokenizer: runs of spaces are stored as spaces, and file order, not score, ranks merges."""
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in _get(file, "tokens")]
    tokenizer = _byte_fallback_bpe(file, tokens, {token: -i for i, token in enumerate(tokens)})
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _byte_fallback_bpe(file: GgufFile, tokens: list[str], scores: dict[str, float]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_of(vocab, scores)
    return Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=_token(file, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )


def _merges_of(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: each token from each pair of tokens, best score first."""
    merges = []
    for token, score in scores.items():
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _add_special_tokens(file: GgufFile, tokenizer: Tokenizer) -> None:
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    tokens = [tokenizer.id_to_token(i) for i in range(len(kinds))]
    listed = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in listed if k == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=False) for t, k in listed if k == _USER_DEFINED]
    )


def _get(file: GgufFile, key: str, kind: type = list) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, kind):
        raise CheckpointError(
            f"metadata tokenizer.ggml.{key} is missing or no {kind.__name__}",
            file=file.path,
            fix="convert the model to GGUF again with a current llama.cpp",
        )
    return value


def _id(file: GgufFile, key: str) -> int | None:
    """A special token's id; None if the file names none (0xFFFFFFFF is llama.cpp's way to say so)."""
    token_id = file.metadata.get(f"tokenizer.ggml.{key}_token_id", 0xFFFFFFFF)
    if token_id == 0xFFFFFFFF:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(_get(file, "tokens")):
        raise CheckpointError(
            f"tokenizer.ggml.{key}_token_id {token_id!r} is not in the vocabulary",
            file=file.path,
            fix="convert the model to GGUF again",
        )
    return token_id


def _token(file: GgufFile, key: str) -> str | None:
    token_id = _id(file, key)
    return None if token_id is None else _get(file, "tokens")[token_id]
