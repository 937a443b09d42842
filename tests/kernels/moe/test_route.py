"""Routing in the interpreter against torch's own (engine/backends/torch/feed_forward.py)."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import on_device  # noqa: F401  (a fixture)

from nibble.architectures.base import Experts
from nibble.engine.backends.torch import feed_forward as torchs
from nibble.engine.backends.triton.feed_forward import routing
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.moe.route import route
from nibble.kernels.moe.routing import Routing

BASE = Experts(12, 3, 48, "silu")
KINDS = {
    "softmax": BASE,
    "normed": replace(BASE, norm_weights=True, routed_scale=2.5),
    "one": replace(BASE, num_experts=7, top_k=1),
    "all": replace(BASE, num_experts=5, top_k=5),
    "sigmoid": replace(BASE, scoring="sigmoid", norm_weights=True, routed_scale=0.5),
    "corrected": replace(BASE, num_experts=160, top_k=6, scoring="sigmoid", correction_bias=True),
    "groups": replace(BASE, num_experts=40, limited_groups=(5, 2), correction_bias=True),
    "best of groups": replace(BASE, limited_groups=(3, 2), group_rank=1),
    "three of a group": replace(BASE, limited_groups=(3, 1), group_rank=3, scoring="sigmoid"),
}


def logits_of(spec: Experts, tokens: int = 9) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(spec.num_experts)
    logits = torch.randn(tokens, spec.num_experts, generator=generator, device="cpu") * 2
    return logits.to(torch.empty(0).device)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_weights_are_torchs(kind: str, scaled: bool) -> None:
    spec = KINDS[kind]
    logits = logits_of(spec)
    bias = torch.randn(spec.num_experts) * 0.3 if spec.correction_bias else None
    scales = torch.rand(spec.num_experts) + 0.5 if scaled else None
    weights, chosen = route(logits, routing(spec), bias, scales)
    want, numbers = torchs.route(spec, logits, bias)
    want = want if scales is None else want * scales[numbers]
    assert weights.dtype == torch.float32 and chosen.dtype == torch.int32
    assert torch.equal(chosen.long(), numbers)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-7)


def test_of_equal_scores_each_is_chosen_once() -> None:
    logits = torch.zeros(2, 12)
    weights, chosen = route(logits, routing(BASE))
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 12))


def test_logits_that_are_not_numbers_cost_their_own_token() -> None:
    logits = logits_of(BASE, 3)
    logits[1] = float("nan")
    weights, chosen = route(logits, routing(BASE))
    assert ((chosen >= 0) & (chosen < BASE.num_experts)).all()
    assert weights.isnan().all(1).tolist() == [False, True, False]


def test_no_tokens() -> None:
    weights, chosen = route(torch.zeros(0, 12), routing(BASE))
    assert weights.shape == chosen.shape == (0, 3)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match="4 experts are chosen, of 3"):
        Routing(12, 4, "softmax", groups=4, best_groups=1)
    with pytest.raises(KernelArgumentError, match="do not form 5 groups"):
        Routing(12, 4, "softmax", groups=5, best_groups=1)
    with pytest.raises(KernelArgumentError, match="at most 1024"):
        Routing(2048, 4, "softmax")
    with pytest.raises(KernelArgumentError, match=r"want \['any', 12\]"):
        route(torch.zeros(3, 11), routing(BASE))
