"""DRY's penalties against a slow search through every earlier place, and its definition's own examples."""

import random

import pytest

from nibble.engine.dry import penalties
from nibble.engine.sampling_params import SamplingParams, TokenSequences


def slow(tokens: list[int], params: SamplingParams) -> dict[int, float]:
    """Each earlier place, a match's length counted token by token, up to a breaker of any size."""
    if params.dry_penalty_last_n >= 0:
        tokens = tokens[max(0, len(tokens) - params.dry_penalty_last_n) :]
    reach = 0
    while reach < len(tokens) and not any(
        tuple(tokens[len(tokens) - reach - len(b) : len(tokens) - reach]) == b
        for b in params.dry_breaker_ids or ()
    ):
        reach += 1
    longest: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(reach, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        longest[tokens[end + 1]] = max(longest.get(tokens[end + 1], 0), length)
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in longest.items()
        if length >= params.dry_allowed_length and (token,) not in (params.dry_breaker_ids or ())
    }


def asked(breakers: TokenSequences = (), **params) -> SamplingParams:
    given = {"dry_multiplier": 0.8, "dry_breaker_ids": breakers} | params
    return SamplingParams(**given)


@pytest.mark.parametrize("breakers", [(), ((3,),), ((3,), (0, 1)), ((0, 1, 0),)])
@pytest.mark.parametrize("last_n", [-1, 0, 1, 12])
@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_as_a_search_through_all_places(
    breakers: TokenSequences, last_n: int, allowed: int
) -> None:
    params = asked(breakers, dry_penalty_last_n=last_n, dry_allowed_length=allowed)
    random.seed(str((breakers, last_n, allowed)))
    found = 0
    for _ in range(60):
        tokens = random.choices(range(4), k=random.randint(1, 20))
        tokens += tokens[: random.randint(0, 20)]  # said again
        want = slow(tokens, params)
        assert penalties(tokens, params) == want, tokens
        found += bool(want)
    assert found > 5 or last_n in (0, 1) or (last_n, allowed) == (12, 4)


def test_the_longer_a_repetition_the_more_it_costs() -> None:
    said = [1, 2, 3, 4, 9, 1, 2, 3]
    assert penalties(said, asked(dry_base=2.0)) == {4: pytest.approx(0.8 * 2)}
    assert penalties(said, asked(dry_base=2.0, dry_allowed_length=3)) == {4: pytest.approx(0.8)}
    assert penalties(said, asked(dry_allowed_length=4)) == {}


def test_no_repetition_reaches_over_a_breaker_and_none_is_punished() -> None:
    said = [1, 2, 3, 4, 9, 1, 2, 3]
    assert penalties(said, asked(((2,),))) == {}
    assert penalties(said, asked(((2,),), dry_allowed_length=1)) == {4: pytest.approx(0.8)}
    assert penalties(said, asked(((4,),))) == {}
    assert penalties(said, asked(((9, 1),))) == {4: pytest.approx(0.8)}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("base", [1.0, 1.001, 1.75])
def test_a_long_text_of_one_token_costs_little_and_no_overflow(base: float) -> None:
    (penalty,) = penalties([5] * 20_000, asked(dry_base=base, dry_multiplier=1.0)).values()
    assert penalty == 1.0 if base == 1.0 else 1e8 < penalty < 1e39
