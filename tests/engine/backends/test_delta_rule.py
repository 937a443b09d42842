"""The gated delta rule and Mamba-2's state space in chunks against one token after the other, and states against what
an item's tokens are."""

import pytest
import torch

from nibble.engine.backends.batch import Batch
from nibble.engine.backends.torch import state_space
from nibble.engine.backends.torch.delta_rule import chunked, recurrent_step
from nibble.engine.backends.torch.states import StateStep, convolve
from nibble.engine.request import Request
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledRequest

HEADS, K, V = 3, 8, 5


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_chunks_are_tokens_one_after_the_other(length: int) -> None:
    torch.manual_seed(length)
    q, k = torch.nn.functional.normalize(torch.randn(2, length, HEADS, K), dim=-1)
    v, beta = torch.randn(length, HEADS, V), torch.rand(length, HEADS)
    g, start = -torch.rand(length, HEADS), torch.randn(HEADS, K, V)
    got, left = chunked(q, k, v, g, beta, start)
    state, rows = start[None], []
    for t in range(length):
        row, state = recurrent_step(*(x[t : t + 1] for x in (q, k, v, g, beta)), state)
        rows.append(row)
    torch.testing.assert_close(got, torch.cat(rows), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(left, state[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_chunks_of_a_state_space_are_tokens_one_after_the_other(length: int) -> None:
    torch.manual_seed(length)
    b, c = torch.randn(2, length, HEADS, K)
    x, g, start = (
        torch.randn(length, HEADS, V),
        -torch.rand(length, HEADS),
        torch.randn(HEADS, K, V),
    )
    got, left = state_space.chunked(b, c, x, g, start)
    state, rows = start[None], []
    for t in range(length):
        row, state = state_space.recurrent_step(*(each[t : t + 1] for each in (b, c, x, g)), state)
        rows.append(row)
    torch.testing.assert_close(got, torch.cat(rows), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(left, state[0], atol=2e-5, rtol=2e-5)


def item(slot: int, start: int, count: int, **more) -> ScheduledRequest:
    tokens = list(range(start + count + 1))
    request = Request(f"{slot}", tokens, SamplingParams(), frozenset(), seed=0, state_slot=slot)
    return ScheduledRequest(request, start, count, **more)


def test_a_convolution_goes_on_from_slots_snapshots_and_nothing() -> None:
    """Decodes and chunks in one step: from their own slot, a snapshot, zeros; snapshots within and at the end."""
    torch.manual_seed(0)
    taps, states = torch.randn(3, 4), torch.randn(9, 2, 4)
    before = states.clone()
    items = [
        item(0, 5, 1),
        item(1, 7, 1, state_from=6, snapshots=[(8, 7)]),
        item(2, 0, 1),
        item(3, 0, 5, snapshots=[(1, 8)]),
        item(4, 9, 4, state_from=5, snapshots=[(12, 6)]),
    ]
    x = torch.randn(12, 4)
    got = convolve(x, taps, StateStep.build(Batch(items, 16), torch.device("cpu")), states)
    earlier = [before[0], before[6], torch.zeros(2, 4), torch.zeros(2, 4), before[5]]
    row = 0
    for each, start in zip(items, earlier, strict=True):
        seen = torch.cat((start, x[row : row + each.num_tokens]))
        for t in range(each.num_tokens):
            torch.testing.assert_close(got[row + t], (seen[t : t + 3] * taps).sum(0))
        left = {each.request.state_slot: each.num_tokens}
        left |= {slot: position - each.start for position, slot in each.snapshots}
        for slot, count in left.items():
            assert torch.equal(states[slot], seen[count : count + 2])
        row += each.num_tokens
    assert torch.equal(states[5], before[5])
