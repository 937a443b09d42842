"""SamplingParams: the error for a value out of range carries the field, for whoever must name it to a client."""

import pytest
import torch

from nibble.engine.request import Request
from nibble.engine.sampler import sample
from nibble.engine.sampling_params import (
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    ParameterError,
    SamplingParams,
)
from nibble.engine.scheduling.batch import StepResult


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 9.9e-6),
        ("temperature", 10.1),
        ("top_p", 0.0),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 2**100),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 0.0099),
        ("repetition_penalty", 10.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**63),
        ("stop_token_ids", (100,)),
        ("logit_bias", {3: 101.0}),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_the_error_names_the_field(field: str, value: object) -> None:
    SamplingParams().verify(100)
    with pytest.raises(ParameterError, match=f"^{field} must be") as caught:
        SamplingParams(**{field: value}).verify(100)
    assert caught.value.field == field and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "value", [dict.fromkeys(range(1000, 2000), 0.0), {10**4000: 0.0}, {10**5000: 0.0}]
)
def test_an_error_quotes_a_line_at_most(value: dict[int, float]) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(logit_bias=value).verify(100)
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize(
    ("field", "values"),
    [("temperature", (0.0, 1e-5, 10.0)), ("top_k", (-1, 0, 1, 2**31 - 1)),
     ("repetition_penalty", (0.01, 10.0)), ("max_tokens", (1, 2**31 - 1))],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_in_them(field: str, values: tuple[float, ...]) -> None:
    for value in values:
        SamplingParams(**{field: value}).verify(100)


def test_the_smallest_divisors_leave_numbers() -> None:
    """In float32, with logits as large as models have them."""
    logits = torch.tensor([[3e4, -3e4, 1.0]])
    params = SamplingParams(
        temperature=MIN_TEMPERATURE, repetition_penalty=MIN_REPETITION_PENALTY, seed=1
    )
    request = Request("r", [0, 1], params, frozenset(), seed=1)
    result = StepResult()
    sample(logits, [request], result)
    assert result.tokens == {"r": [0]} and not result.errors
