"""However tokens arrive, the deltas add up to what one `decode` gives, cut at the first stop string."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.sampling_params import SamplingParams
from nibble.engine.text.detokenizer import Detokenizer
from nibble.engine.text.tokenizer import Tokenizer

from .tiny_tokenizers import byte_fallback, byte_level


@pytest.fixture(
    scope="module", params=[byte_level, byte_fallback], ids=["byte-level", "byte-fallback"]
)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    make: Callable[..., Path] = request.param
    return Tokenizer.from_pretrained(make(tmp_path_factory.mktemp("tokenizer")))


def params(**values) -> SamplingParams:
    return SamplingParams(**{"ignore_eos": True, "max_tokens": 1000, **values})


def stream(
    tokenizer: Tokenizer, ids: list[int], chunk: int = 1, prompt: list[int] = (), **values
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, params(**values), prompt)
    deltas = [detokenizer.push(ids[at : at + chunk]) for at in range(0, len(ids), chunk)]
    return [*deltas, detokenizer.finish()]


TEXTS = ["the cat", "hi 🤗🤗 é", "  two  spaces ", "日本語 the", "🤗"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_deltas_add_up_and_never_show_half_a_character(
    tokenizer: Tokenizer, text: str, chunk: int
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = stream(tokenizer, ids, chunk)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(deltas)


def test_a_cut_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi 🤗", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer, params())
    assert "\ufffd" not in detokenizer.push(ids)
    assert "\ufffd" in detokenizer.finish()


def test_endless_garbage_is_let_go(tokenizer: Tokenizer) -> None:
    byte = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
    assert sum(map(len, stream(tokenizer, [byte] * 100)[:-1])) > 80


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hi", add_special_tokens=False), *[tokenizer.eos_token_ids[0]] * 20]
    assert "".join(stream(tokenizer, ids)) == "hi"
    assert (
        "".join(stream(tokenizer, ids, skip_special_tokens=False))
        == "hi" + (tokenizer.eos_token or "") * 20
    )


def test_the_token_that_ends_it_is_not_text(tokenizer: Tokenizer) -> None:
    hi, the = (tokenizer.encode(text, add_special_tokens=False) for text in ("hi", " the"))
    ids, stop = [*hi, *the], the[-1]
    with_it, without = tokenizer.decode(ids), tokenizer.decode(ids[:-1])
    assert "".join(stream(tokenizer, ids, stop_token_ids=(stop,))) == without
    assert (
        "".join(stream(tokenizer, ids, stop_token_ids=(stop,), include_stop_str_in_output=True))
        == with_it
    )
    ended = [*hi, tokenizer.eos_token_ids[0]]
    assert "".join(stream(tokenizer, ended, ignore_eos=False, skip_special_tokens=False)) == "hi"


def test_the_prompt_gives_the_first_token_its_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_fallback(tmp_path))
    prompt, ids = tokenizer.encode("hi"), tokenizer.encode("the", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "the"
    assert "".join(stream(tokenizer, ids, prompt=prompt)) == " the"


def test_stop_string_over_several_tokens_is_never_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the hi hi the", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, params(stop=("hi the", "nothing")))
    text = "".join(detokenizer.push([i]) for i in ids)
    assert text == "the hi "
    assert (detokenizer.stopped, detokenizer.stop_reason) == (True, "hi the")
    assert detokenizer.push(ids) == detokenizer.finish() == ""


def test_what_may_start_a_stop_string_is_held_back_and_no_more(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, params(stop=("the end", "zz")))
    ids = tokenizer.encode("hi the hi", add_special_tokens=False)
    shown = ""
    for end, token in enumerate(ids, 1):
        shown += detokenizer.push([token])
        text = tokenizer.decode(ids[:end])
        held = next(n for n in range(len(text), -1, -1) if text.endswith("the end"[:n]))
        assert shown == text[: len(text) - held]
    assert shown + detokenizer.finish() == "hi the hi"


def test_include_stop_string(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi the hi", add_special_tokens=False)
    assert (
        "".join(stream(tokenizer, ids, stop=("the",), include_stop_str_in_output=True)) == "hi the"
    )


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the the hi the", add_special_tokens=False)
    text = tokenizer.decode(ids)
    first = len(tokenizer.encode("the", add_special_tokens=False))
    assert "".join(stream(tokenizer, ids, stop=("the",))) == ""
    assert "".join(stream(tokenizer, ids, stop=("hi",), min_tokens=first)) == "the the "
    assert "".join(stream(tokenizer, ids, stop=("the",), min_tokens=len(ids))) == text


def test_token_offsets_point_into_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi the 🤗 hi", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, params())
    text = detokenizer.push(ids) + detokenizer.finish()
    assert len(detokenizer.token_offsets) == len(ids)
    for i, offset in enumerate(detokenizer.token_offsets):
        whole = tokenizer.decode(ids[:i])
        assert text[:offset] == whole.rstrip("\ufffd")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_any_stops(tokenizer: Tokenizer, data: st.DataObject) -> None:
    words = st.sampled_from([" the", "hi", "🤗", "t", " ", "é", "he"])
    text = "".join(data.draw(st.lists(words, max_size=12)))
    stops = tuple(data.draw(st.lists(st.text("the hi🤗", min_size=1, max_size=4), max_size=3)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    for chunk in (1, 3, 100):
        assert "".join(stream(tokenizer, ids, chunk, stop=stops)) == expected
