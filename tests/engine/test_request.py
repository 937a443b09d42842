"""SamplingParams: the error for a value out of range carries the field, for whoever must name it to a client."""

import pytest

from nibble.engine.request import ParameterError, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
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
