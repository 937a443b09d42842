"""Compiled experts of the shapes of real models, with this card's own path, against float64; and in a graph."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DEVICE,
    HALF,
    activations,
    make_fp4_weight,
    make_fp8_weight,
    make_weight,
    on_device,  # noqa: F401  (a fixture)
)
from torch import Tensor

from nibble.kernels.moe.experts import ExpertMlps, Gating, experts
from nibble.kernels.moe.route import route
from nibble.kernels.moe.routing import Routing
from nibble.kernels.moe.weight import Weight, stack

# hidden, inner, experts, top_k of Qwen 3 30B-A3B, GPT-OSS 20B (fewer experts), Mixtral (half as wide)
SHAPES = {
    "qwen3": (2048, 768, 128, 8),
    "gpt-oss": (2880, 2880, 8, 4),
    "mixtral": (4096, 7168, 8, 2),
}
TOKENS = (1, 5, 64, 700)  # a GEMV or the narrowest tile; each wider one
KINDS = ("dense", "int4", "mins", "fp8", "mxfp4")


def matrix(kind: str, out: int, inner: int, seed: int) -> Weight:
    if kind == "dense":
        return torch.randn(out, inner, generator=torch.Generator(DEVICE).manual_seed(seed)).to(HALF)
    if kind == "fp8":
        return make_fp8_weight(out, inner, (64, 64))
    if kind == "mxfp4":
        weight = make_fp4_weight(out, inner, 32)
    else:
        weight = make_weight(4, "mins" if kind == "mins" else "zeros", out, inner, 32)
    weight.codes = weight.codes.roll(seed, 0)
    return weight


def full(weight: Weight) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()


def made(kind: str, shape: tuple[int, int, int, int]) -> tuple[list[list[Weight]], ...]:
    hidden, inner, count, _ = shape
    ups = [[matrix(kind, inner, hidden, 3 * n + turn) for turn in (0, 1)] for n in range(count)]
    return ups, [[matrix(kind, hidden, inner, 3 * n + 2)] for n in range(count)]


def stacked(matrices: list[list[Weight]]):
    return stack(matrices, [[None] * len(each) for each in matrices], HALF, DEVICE)


def routed(tokens: int, shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    _, _, count, top_k = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(tokens, count, generator=generator)
    return route(logits, Routing(count, top_k, "softmax", norm_weights=True))


def expected(x: Tensor, weights: Tensor, chosen: Tensor, ups: list, downs: list) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for number in chosen.unique().tolist():
        tokens, places = torch.where(chosen == number)
        gate, up = (x[tokens].double() @ full(weight).T for weight in ups[number])
        added = (F.silu(gate) * up) @ full(downs[number][0]).T
        out.index_add_(0, tokens, added * weights[tokens, places, None].double())
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_experts_of_real_shapes(name: str, kind: str) -> None:
    shape = SHAPES[name]
    ups, downs = made(kind, shape)
    mlps = ExpertMlps(stacked(ups), stacked(downs), Gating("silu"))
    for tokens in TOKENS:
        x = activations(tokens, shape[0], HALF) * 0.01
        weights, chosen = routed(tokens, shape)
        got = experts(x, weights, chosen, mlps)
        want = expected(x, weights, chosen, ups, downs)
        assert float((got.double() - want).norm() / want.norm()) < 2e-3
        assert torch.equal(got, experts(x, weights, chosen, mlps))


def test_a_graph_serves_other_choices() -> None:
    shape = SHAPES["qwen3"]
    ups, downs = made("int4", shape)
    mlps = ExpertMlps(stacked(ups), stacked(downs), Gating("silu"))
    routing = Routing(shape[2], shape[3], "softmax")
    x, logits = activations(16, shape[0], HALF) * 0.01, torch.randn(16, shape[2])

    def compute() -> Tensor:
        return experts(x, *route(logits, routing), mlps)

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    for spread in (1.0, 50.0):
        logits.copy_(torch.randn_like(logits) * spread)
        x.copy_(torch.randn_like(x) * 0.01)
        graph.replay()
        assert torch.equal(out, compute())
