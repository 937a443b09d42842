"""Compiled recurrences of real sizes against torch's operators on the same card, and decode steps from a graph."""

import pytest
import torch
from kernel_cases import on_device  # noqa: F401  (a fixture)
from recurrent_cases import (
    check_convolution,
    check_delta_rule,
    check_state_space,
    item,
    randn,
)

from nibble.engine.backends.batch import Batch
from nibble.engine.backends.triton.states import StaticStates
from nibble.kernels.recurrent.convolution import causal_conv
from nibble.kernels.recurrent.delta_rule import gated_delta_rule

DECODES = [item(0, 5, 1), item(1, 31, 1, snapshots=[(32, 7)]), item(2, 0, 1)]
CHUNKS = [item(3, 0, 700, snapshots=[(512, 8)]), item(4, 64, 65, state_from=5)]
STEPS = {"decodes": DECODES, "chunks": CHUNKS, "both": DECODES + CHUNKS}


@pytest.fixture(params=STEPS)
def batch(request) -> Batch:
    return Batch(list(STEPS[request.param]), 16)


@pytest.mark.parametrize(("channels", "taps"), [(8192, 4), (2048, 3)])
def test_convolutions(batch: Batch, channels: int, taps: int) -> None:
    check_convolution(batch, channels, taps)


@pytest.mark.parametrize(
    ("key_heads", "heads", "k", "v"), [(16, 32, 128, 128), (16, 48, 128, 128), (4, 4, 256, 512)]
)
def test_delta_rules(batch: Batch, key_heads: int, heads: int, k: int, v: int) -> None:
    check_delta_rule(batch, key_heads, heads, k, v)


@pytest.mark.parametrize(
    ("groups", "heads", "n", "p"), [(1, 128, 128, 64), (8, 128, 256, 64), (8, 112, 128, 80)]
)
def test_state_spaces(batch: Batch, groups: int, heads: int, n: int, p: int) -> None:
    check_state_space(batch, groups, heads, n, p, (0.0, float("inf")))


def test_a_graph_carries_states_from_step_to_step() -> None:
    """Captured over padding, which leaves no trace; then as many replays as there are tokens."""
    heads, dim, count = 32, 128, 20
    device = torch.device("cuda")
    static, starts = StaticStates(4, device), torch.arange(5, dtype=torch.int32)
    step = static.view(starts)
    channels = 3 * heads * dim
    taps, rate, bias = randn(4, channels, seed=1), -randn(heads, seed=2).exp(), randn(heads, seed=3)
    x, ba = randn(4, channels, seed=4), randn(4, 2 * heads, seed=5)
    first = [randn(6, 3, channels, seed=6), randn(6, heads, dim, dim, seed=7)]
    inputs, matrices = (each.clone() for each in first)

    def compute(inputs: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        qkv = causal_conv(x, taps, inputs, step, torch.float32, silu=True)
        return gated_delta_rule(qkv, ba, rate, bias, matrices, step, heads)

    compute(inputs, matrices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute(inputs, matrices)
    assert torch.equal(inputs, first[0]) and torch.equal(matrices, first[1])
    for token in range(count):
        items = [item(slot, token + slot, 1) for slot in range(3)]
        static.load(Batch(items, 16), 4)
        x.copy_(randn(4, channels, seed=10 + token))
        want = compute(*first)
        graph.replay()
        assert torch.equal(out[:3], want[:3])
    assert torch.equal(inputs, first[0]) and torch.equal(matrices, first[1])
