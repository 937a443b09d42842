"""Filters against transformers' warper, numpy and cases worked out by hand."""

import numpy as np
import pytest
import torch
from transformers import TypicalLogitsWarper

from nibble.engine import filters


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_typical_is_that_of_transformers(mass: float, seed: int) -> None:
    logits = 2 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    warped = TypicalLogitsWarper(mass=mass)(None, logits[None].clone())[0]
    kept = filters.typical(torch.softmax(logits, -1), mass)
    assert (kept > 0).tolist() == torch.isfinite(warped).tolist()
    assert torch.equal(kept[kept > 0], torch.softmax(logits, -1)[kept > 0])


def test_typical_takes_what_is_left_for_all_there_is() -> None:
    probs = torch.tensor([0.4, 0.2, 0.0, 0.1])
    assert torch.equal(filters.typical(probs, 0.5), filters.typical(probs / 0.7, 0.5) * 0.7)
    assert filters.typical(torch.tensor([0.0, 1.0]), 0.2).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_top_n_sigma_counts_from_the_best_and_only_what_is_possible(n: float) -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    logits = torch.tensor([*values, float("-inf"), float("-inf")])
    kept = torch.isfinite(filters.top_n_sigma(logits, n)).tolist()
    assert kept == [*(values >= values.max() - n * values.std()), False, False]
    assert 1 <= sum(kept) < 50
    cooler = torch.isfinite(filters.top_n_sigma(logits / 0.1, n)).tolist()
    assert cooler == kept


@pytest.mark.parametrize(
    ("probs", "threshold", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.1, [0, 0, 0.15, 0.05]),
        ([0.05, 0.15, 0.5, 0.3], 0.1, [0.05, 0.15, 0, 0]),
        ([0.5, 0.3, 0.15, 0.05], 0.4, [0.5, 0.3, 0.15, 0.05]),  # one alone stays
        ([0.25, 0.25, 0.4, 0.1], 0.2, [0.25, 0, 0, 0.1]),  # of equals one stays
        ([0.25, 0.15, 0.1, 0.0], 0.3, [0, 0.15, 0.1, 0.0]),  # of what is left: 0.5, 0.3, 0.2
    ],
)
def test_top_choices_go_but_the_least_of_them(
    probs: list[float], threshold: float, kept: list[float]
) -> None:
    given = torch.tensor(probs, dtype=torch.float64)
    assert filters.exclude_top_choices(given, threshold).tolist() == kept
