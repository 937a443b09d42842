"""Texts that parameters name, as the sequences of tokens that the engine compares its own with."""

from functools import lru_cache

import msgspec

from ..sampling_params import ParameterError, SamplingParams, TokenSequences
from .tokenizer import Tokenizer


def with_token_ids(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same, with `bad_words` and `dry_sequence_breakers` as tokens. ParameterError if one of them is empty."""
    found: dict[str, TokenSequences] = {}
    if params.bad_words:
        _check_texts(params.bad_words, "bad_words")
        found["bad_words_token_ids"] = bad_words(tokenizer, params.bad_words)
    if params.dry_multiplier:
        _check_texts(params.dry_sequence_breakers, "dry_sequence_breakers")
        found["dry_breaker_ids"] = breakers(tokenizer, params.dry_sequence_breakers)
    return msgspec.structs.replace(params, **found) if found else params


def bad_words(tokenizer: Tokenizer, words: tuple[str, ...]) -> TokenSequences:
    """Each as it is written at the beginning of a text, and as it is within one, behind a space (vLLM's rule)."""
    texts = [text for word in words for text in (word, " " + word.lstrip())]
    encoded = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tuple(dict.fromkeys(filter(None, encoded)))


@lru_cache(maxsize=64)
def breakers(tokenizer: Tokenizer, texts: tuple[str, ...]) -> TokenSequences:
    """Every token that holds one of the texts, and the tokens of a text that no single one is."""
    single = [
        (i,) for i, token in enumerate(_token_texts(tokenizer)) if any(t in token for t in texts)
    ]
    encoded = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return (*single, *(sequence for sequence in encoded if len(sequence) > 1))


@lru_cache(maxsize=4)
def _token_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    every = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return tuple(token.decode(errors="replace") for token in every)


def _check_texts(texts: tuple[str, ...], field: str) -> None:
    if not all(texts):
        raise ParameterError(field, f"{field} must be texts of at least one character")
