"""The canary: how far answers are apart, by a plain loop, and files that are none."""

import json
import math

import pytest
import torch

from nibble.errors import CheckpointError
from nibble.quant import canary

PROMPT = [5, 1, 3]


def logits(seed: int, vocab: int = 40) -> torch.Tensor:
    return torch.randn(len(PROMPT), vocab, generator=torch.Generator().manual_seed(seed)) * 3


def divergence(kept: torch.Tensor, served: torch.Tensor, top: int) -> float:
    """Of the `top` likeliest tokens and of all others as one; natural logarithms, averaged over the prompt."""
    total = 0.0
    for a, b in zip(kept.tolist(), served.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (a, b))
        best = sorted(range(len(p)), key=lambda i: -p[i])[:top]
        pairs = [(p[i], q[i]) for i in best]
        pairs.append((1 - sum(x for x, _ in pairs), 1 - sum(y for _, y in pairs)))
        total += sum(x * math.log(x / y) for x, y in pairs)
    return total / len(kept)


def test_divergence_is_that_of_kullback_and_leibler():
    kept = canary.of_logits(PROMPT, logits(0))
    assert canary.divergence(kept, logits(0)) == pytest.approx(0, abs=1e-4)
    want = divergence(logits(0), logits(1), 16)
    assert want > 1
    assert canary.divergence(kept, logits(1)) == pytest.approx(want, rel=1e-3)


def test_a_certain_model_can_be_compared():
    certain = torch.full((3, 40), -1e4)
    certain[:, 7] = 1e4
    kept = canary.of_logits(PROMPT, certain)
    assert canary.divergence(kept, certain) == pytest.approx(0, abs=1e-6)
    assert canary.divergence(kept, logits(0)) > 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(tmp_path, value):
    kept = canary.of_logits(PROMPT, logits(0))
    served = logits(0)
    served[1, 2] = value
    with pytest.raises(CheckpointError, match="answers otherwise"):
        canary.check(kept, served, tmp_path)


def test_it_comes_back_as_it_was_kept(tmp_path):
    kept = canary.of_logits(PROMPT, logits(0))
    assert canary.read(tmp_path, 40) is None
    (tmp_path / canary.FILE).write_text(json.dumps(canary.as_json(kept)))
    assert canary.read(tmp_path, 40) == kept


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.update(prompt=[]),
        lambda c: c.update(prompt=[5, 1]),
        lambda c: c.update(prompt=[5, 1, 40]),
        lambda c: c.update(prompt=[5, 1, -1]),
        lambda c: c.update(prompt="text"),
        lambda c: c["positions"].pop(),
        lambda c: c["positions"][0].update(token_ids=[99] * 16),
        lambda c: c["positions"][0]["logprobs"].pop(),
        lambda c: c["positions"][0].update(logprobs=[0.5] * 16),
        lambda c: c["positions"][0].update(logprobs=["-1"] * 16),
        lambda c: c.update(more=1),
    ],
)
def test_a_file_that_is_no_canary_is_one_clear_error(tmp_path, change):
    content = canary.as_json(canary.of_logits(PROMPT, logits(0)))
    change(content)
    (tmp_path / canary.FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"nibble_canary\.json.*serve unchecked"):
        canary.read(tmp_path, 40)
