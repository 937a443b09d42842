"""Prompts that ask for a middle, of a tokenizer that knows how and of one that does not."""

import pytest
import tokenizers

from nibble.engine.text.fill_in import FORMS, FillIn, with_suffix
from nibble.engine.text.tokenizer import Tokenizer


def of_bytes(*special: str) -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    return Tokenizer(backend)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.prefix)
def test_each_family_has_its_tokens_around_prefix_and_suffix(form: FillIn) -> None:
    tokenizer = of_bytes(form.prefix, form.suffix, form.middle)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("def f(", "x")]
    first, second = with_suffix(tokenizer, prompts, "): ü")
    assert tokenizer.decode(first, skip_special_tokens=False) == (
        f"{form.prefix}def f({form.suffix}): ü{form.middle}"
    )
    assert tokenizer.decode(second, skip_special_tokens=False) == (
        f"{form.prefix}x{form.suffix}): ü{form.middle}"
    )


def test_a_model_without_them_says_so() -> None:
    for tokenizer in (of_bytes(), of_bytes("<fim_prefix>", "<fim_suffix>")):
        with pytest.raises(ValueError, match="no tokens to fill in the middle"):
            with_suffix(tokenizer, [[1]], "b")
