"""Many texts and pairs at once come out as `tokenizers` itself makes them, cut as it cuts them."""

import itertools
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from nibble.engine.text.batch_encoder import BatchEncoder, TextTooLong, longest_first
from nibble.engine.text.control_tokens import MARK
from nibble.engine.text.tokenizer import Tokenizer

from ..encoders.models import words, write_word_tokenizer

COUNTS = (0, 1, 3, 8, 9, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture
def theirs(folder: Path) -> Backend:
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("limit", [4, 5, 10, 11])
def test_texts_are_cut_as_tokenizers_cuts_them(
    tokenizer: Tokenizer, theirs: Backend, limit: int
) -> None:
    texts = [words(count, count) for count in COUNTS]
    theirs.enable_truncation(limit)
    for special in (True, False):
        want = [each.ids for each in theirs.encode_batch(texts, add_special_tokens=special)]
        assert BatchEncoder(tokenizer, 100, limit).texts(texts, special) == want


@pytest.mark.parametrize("limit", [4, 5, 10, 11, 12])
def test_pairs_are_cut_as_tokenizers_cuts_them(
    tokenizer: Tokenizer, theirs: Backend, limit: int
) -> None:
    pairs = [(words(a, a), words(b, b)) for a, b in itertools.product(COUNTS, COUNTS)]
    theirs.enable_truncation(limit, strategy="longest_first")
    want = [(each.ids, each.type_ids) for each in theirs.encode_batch(pairs)]
    found = BatchEncoder(tokenizer, 100, limit).pairs(pairs)
    for (ids, second), (their_ids, types) in zip(found, want, strict=True):
        assert ids == their_ids
        assert [int(bool(second) and i >= second) for i in range(len(ids))] == types


def test_what_is_kept_of_two_texts() -> None:
    assert longest_first(3, 4, 7) == (3, 4)
    assert longest_first(3, 9, 7) == (3, 4) and longest_first(9, 3, 7) == (4, 3)
    assert longest_first(9, 9, 7) == (3, 4) and longest_first(9, 8, 7) == (4, 3)


def test_one_that_is_too_long_is_named(tokenizer: Tokenizer) -> None:
    encoder = BatchEncoder(tokenizer, 10)
    assert len(encoder.texts([words(8)])[0]) == 10
    with pytest.raises(TextTooLong) as caught:
        encoder.texts([words(8), words(2), words(9)])
    assert caught.value.index == 2
    with pytest.raises(TextTooLong):
        encoder.pairs([(words(4), words(4))])


@pytest.mark.parametrize("limit", [None, 10])
def test_of_a_book_little_more_is_looked_at_than_is_kept(
    tokenizer: Tokenizer, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Spy:
        def __getattr__(self, name: str):
            return getattr(tokenizer.backend, name)

        def encode_batch_fast(self, texts, **kwargs):
            for text in texts:
                seen.append(sum(map(len, [text] if isinstance(text, str) else text)))
            return tokenizer.backend.encode_batch_fast(texts, **kwargs)

    encoder, book = BatchEncoder(tokenizer, 10, limit), words(40) + " w5" * 200_000
    monkeypatch.setattr(encoder, "backend", Spy())
    if limit is None:
        with pytest.raises(TextTooLong):
            encoder.texts([book])
    else:
        assert encoder.texts([book]) == [[2, *(int(w[1:]) for w in book.split()[:8]), 3]]
        assert len(encoder.pairs([(words(2), book)])[0][0]) == 10
    assert seen and max(seen) < 10_000


def test_what_is_no_text_is_refused(tokenizer: Tokenizer) -> None:
    encoder = BatchEncoder(tokenizer, 10)
    for text in ("\ud800", f"a{MARK}b"):
        with pytest.raises(ValueError):
            encoder.texts(["w4", text])
    with pytest.raises(ValueError, match="3 special tokens"):
        BatchEncoder(tokenizer, 10, 3)
