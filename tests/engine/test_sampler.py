"""The sampler against distributions worked out by hand or with numpy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from nibble.engine.request import Request
from nibble.engine.sampler import exponentials, sample
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import StepResult

PROBS = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = torch.tensor(np.log(PROBS), dtype=torch.float32)


def request(
    name: str = "r",
    prompt: tuple[int, ...] = (0,),
    output: tuple[int, ...] = (),
    seed: int = 0,
    eos: tuple[int, ...] = (),
    **params,
) -> Request:
    return Request(
        name,
        list(prompt),
        SamplingParams(**params),
        frozenset(eos),
        seed,
        token_ids=[*prompt, *output],
    )


def draw(count: int, logits: torch.Tensor = LOGITS, **params) -> Counter:
    requests = [request(str(i), seed=i, **params) for i in range(count)]
    result = StepResult()
    sample(logits.repeat(count, 1), requests, result)
    return Counter(token for (token,) in result.tokens.values())


def check_frequencies(counts: Counter, probs: np.ndarray) -> None:
    total = sum(counts.values())
    for token, p in enumerate(probs):
        spread = 4.5 * math.sqrt(total * p * (1 - p)) + 1e-9
        assert abs(counts[token] - total * p) <= spread, (token, counts)


def one(logits: torch.Tensor, r: Request) -> int:
    result = StepResult()
    sample(logits[None].clone(), [r], result)
    (token,) = result.tokens["r"]
    return token


def test_plain_sampling_follows_the_softmax() -> None:
    check_frequencies(draw(4000), PROBS)


def test_temperature() -> None:
    sharpened = PROBS**2 / (PROBS**2).sum()
    check_frequencies(draw(4000, temperature=0.5), sharpened)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.5}, 1),
        ({"min_p": 0.28}, 3),
        ({"top_k": 3, "top_p": 0.9}, 3),
        ({"top_k": 2, "top_p": 0.65}, 1),  # 0.5 is 67 % of what top_k left over, 50 % of all
        ({"top_k": 100}, 5),
        ({"top_p": 1.0}, 5),
    ],
)
def test_cuts_keep_the_most_probable_and_renormalise(params: dict, kept: int) -> None:
    cut = np.where(np.arange(5) < kept, PROBS, 0)
    check_frequencies(draw(3000, **params), cut / cut.sum())


def test_a_nucleus_wider_than_the_first_candidates() -> None:
    counts = draw(2000, logits=torch.zeros(1000), top_p=0.9)
    assert len(counts) > 700  # 256 candidates would have cut it


def test_greedy_takes_the_largest() -> None:
    assert one(LOGITS, request(temperature=0)) == 0


def test_penalties_as_their_papers_have_them() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert one(logits, request(prompt=(0,), temperature=0, repetition_penalty=2.0)) == 1
    assert (
        one(logits, request(prompt=(0,), temperature=0, presence_penalty=1.0)) == 0
    )  # prompt tokens do not count
    assert one(logits, request(prompt=(2,), output=(0,), temperature=0, presence_penalty=1.0)) == 1
    assert one(logits, request(prompt=(2,), output=(0,), temperature=0, frequency_penalty=0.4)) == 0
    assert (
        one(logits, request(prompt=(2,), output=(0, 0), temperature=0, frequency_penalty=0.4)) == 1
    )


def test_logit_bias_and_min_tokens() -> None:
    assert one(LOGITS, request(temperature=0, logit_bias={4: 100.0})) == 4
    assert one(LOGITS, request(temperature=0, min_tokens=1, max_tokens=2, eos=(0,))) == 1
    assert (
        one(LOGITS, request(temperature=0, min_tokens=1, max_tokens=2, stop_token_ids=(0, 1))) == 2
    )
    assert (
        one(LOGITS, request(temperature=0, min_tokens=1, max_tokens=2, eos=(0,), output=(3,))) == 0
    )


def test_only_allowed_tokens_are_chosen() -> None:
    assert one(LOGITS, request(temperature=0, allowed_token_ids=(4, 3))) == 3
    check_frequencies(draw(2000, allowed_token_ids=(1, 3)), np.array([0, 25, 0, 7, 0]) / 32)
    biased = request(temperature=0, allowed_token_ids=(3, 4), logit_bias={4: 5.0})
    assert one(LOGITS, biased) == 4


def test_a_bad_word_is_not_completed() -> None:
    bad = {"temperature": 0, "bad_words_token_ids": ((0,), (2, 1))}
    assert one(LOGITS, request(**bad)) == 1
    assert one(LOGITS, request(**bad, prompt=(2,))) == 1  # what the prompt says does not count
    assert one(LOGITS, request(**bad, output=(2,))) == 2
    assert one(LOGITS, request(**bad, output=(2, 4))) == 1


def test_a_request_that_nothing_is_left_for_fails_alone() -> None:
    stuck = request("s", temperature=0, allowed_token_ids=(2,), bad_words_token_ids=((2,),))
    result = StepResult()
    sample(LOGITS.repeat(2, 1), [stuck, request("r", temperature=0)], result)
    assert result.tokens == {"r": [0]} and "leave no token" in result.errors["s"]


def test_a_repetition_loses_its_next_token() -> None:
    dry = {"temperature": 0, "dry_multiplier": 1.0, "dry_breaker_ids": ()}
    assert one(LOGITS, request(prompt=(4, 3, 0), output=(1, 4, 3), **dry)) == 1
    assert one(LOGITS, request(prompt=(4, 3, 0), output=(1, 2, 3), **dry)) == 0


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"top_n_sigma": 0.9}, [0, 1]),  # logits deviate by 1.03
        ({"top_n_sigma": -1}, [0, 1, 2, 3, 4]),
        ({"typical_p": 0.2}, [1]),  # entropy 1.26 nats: 0.25 has 1.39, 0.5 has 0.69
        ({"typical_p": 0.5}, [0, 1]),
        ({"typical_p": 0.2, "top_k": 1}, [0]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.2}, [1, 2, 3, 4]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1}, [2, 3, 4]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1, "min_p": 0.4}, [1]),
    ],
)
def test_rarer_filters_and_their_order(params: dict, left: list[int]) -> None:
    cut = np.where(np.isin(np.arange(5), left), PROBS, 0)
    check_frequencies(draw(2000, **params), cut / cut.sum())


def test_top_choices_are_excluded_as_often_as_asked_and_the_race_stays_the_same() -> None:
    excluding = {"xtc_probability": 0.3, "xtc_threshold": 0.2}
    without = np.array([0, 0.25, 0.15, 0.07, 0.03])
    check_frequencies(draw(6000, **excluding), 0.7 * PROBS + 0.3 * without / without.sum())
    again = [one(LOGITS, request(seed=seed, **excluding)) for seed in range(40)]
    assert again == [one(LOGITS, request(seed=seed, **excluding)) for seed in range(40)]


def test_a_seed_fixes_the_token_in_any_company() -> None:
    alone = one(LOGITS, request(seed=11))
    others = [request(str(i), seed=i) for i in range(5)]
    result = StepResult()
    sample(LOGITS.repeat(6, 1), [*others, request("r", seed=11)], result)
    assert result.tokens["r"] == [alone]


def test_the_race_is_exponential_and_independent() -> None:
    draws = torch.stack(
        [
            exponentials(seed, position, torch.arange(64))
            for seed in (0, 1, 2**62)
            for position in range(60)
        ]
    ).double()
    assert float(draws.mean()) == pytest.approx(1, abs=0.05) and float(
        draws.var()
    ) == pytest.approx(1, abs=0.15)
    columns = torch.corrcoef(draws.T) - torch.eye(64)
    rows = torch.corrcoef(draws) - torch.eye(len(draws))
    assert (
        float(columns.abs().max()) < 0.45 and float(rows.abs().max()) < 0.75
    )  # 5 sigma of independent draws


def test_logprobs_are_of_the_raw_distribution() -> None:
    result = StepResult()
    sample(
        LOGITS[None].clone(), [request(temperature=0, logprobs=2, logit_bias={3: 100.0})], result
    )
    (entry,) = result.logprobs["r"]
    assert (entry.token_id, entry.rank, entry.top_ids) == (3, 4, [0, 1])
    assert entry.logprob == pytest.approx(math.log(0.07), abs=1e-5)
    assert entry.top_logprobs == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-5)


def test_nan_fails_its_own_request_only() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = float("nan")
    requests = [request(str(i), temperature=0) for i in range(3)]
    result = StepResult()
    sample(logits, requests, result)
    assert set(result.tokens) == {"0", "2"} and set(result.errors) == {"1"}
