"""Bad words and breakers as tokens, of a byte-level vocabulary with a few merges."""

import pytest
import tokenizers

from nibble.engine.sampling_params import ParameterError, SamplingParams
from nibble.engine.text.token_sequences import bad_words, breakers, with_token_ids
from nibble.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    merges = [("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ"), (":", "ab")]
    symbols = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokens = [*sorted(symbols), *("".join(pair) for pair in merges)]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def ids(tokenizer: Tokenizer, *tokens: str) -> tuple[int, ...]:
    return tuple(tokenizer.backend.token_to_id(token) for token in tokens)


def test_a_bad_word_is_bad_at_the_beginning_and_behind_a_space(tokenizer: Tokenizer) -> None:
    assert bad_words(tokenizer, ("ab", "ac")) == (
        ids(tokenizer, "ab"),
        ids(tokenizer, "Ġ", "ab"),
        ids(tokenizer, "a", "c"),
        ids(tokenizer, "Ġa", "c"),
    )
    assert bad_words(tokenizer, (" a",)) == (ids(tokenizer, "Ġa"),)


def test_breakers_are_all_tokens_that_hold_one_and_texts_of_several(tokenizer: Tokenizer) -> None:
    found = breakers(tokenizer, ("\n", ":"))
    assert set(found) == {ids(tokenizer, t) for t in ("Ċ", "ĊĊ", ":", ":ab")}
    assert breakers(tokenizer, ("xy",)) == (ids(tokenizer, "x", "y"),)


def test_only_what_is_asked_for_is_looked_up(tokenizer: Tokenizer) -> None:
    plain = SamplingParams(temperature=0.5)
    assert with_token_ids(plain, tokenizer) is plain
    dry = with_token_ids(SamplingParams(dry_multiplier=1.0), tokenizer)
    assert dry.dry_breaker_ids == breakers(tokenizer, ("\n", ":", '"', "*"))
    assert dry.bad_words_token_ids is None
    bad = with_token_ids(SamplingParams(bad_words=("ab",)), tokenizer)
    assert bad.bad_words_token_ids == bad_words(tokenizer, ("ab",))
    assert bad.dry_breaker_ids is None


@pytest.mark.parametrize("field", ["bad_words", "dry_sequence_breakers"])
def test_an_empty_text_is_refused_by_name(tokenizer: Tokenizer, field: str) -> None:
    with pytest.raises(ParameterError, match="at least one character") as caught:
        with_token_ids(SamplingParams(dry_multiplier=1.0, **{field: ("a", "")}), tokenizer)
    assert caught.value.field == field
