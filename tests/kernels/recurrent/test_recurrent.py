"""The recurrent kernels in the interpreter against torch's operators: decodes and chunks of any length side by side,
from their own slot, a snapshot or nothing, with snapshots within and at the end."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, on_device  # noqa: F401  (a fixture)
from recurrent_cases import (
    SLOTS,
    check,
    check_convolution,
    check_delta_rule,
    check_state_space,
    item,
    randn,
    starts_of,
    tokens_of,
)
from torch import Tensor

from nibble.engine.backends.batch import Batch
from nibble.engine.backends.torch.states import convolve
from nibble.engine.backends.triton.states import StaticStates, upload_states
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.recurrent.batch import StateBatch
from nibble.kernels.recurrent.convolution import causal_conv
from nibble.kernels.recurrent.delta_rule import gated_delta_rule
from nibble.kernels.recurrent.gated_norm import gated_norm

DECODES = [
    item(0, 5, 1),
    item(1, 7, 1, state_from=6, snapshots=[(8, 7)]),
    item(2, 0, 1),
]
CHUNKS = [
    item(3, 0, 5, snapshots=[(1, 8)]),
    item(4, 9, 4, state_from=5, snapshots=[(10, 9), (13, 10)]),
    item(11, 2, 35),
]


@pytest.fixture(params=["decodes", "chunks", "both"])
def batch(request) -> Batch:
    chosen = {"decodes": DECODES, "chunks": CHUNKS, "both": DECODES + CHUNKS}[request.param]
    return Batch(list(chosen), 16)


@pytest.mark.parametrize(("channels", "taps"), [(70, 4), (5, 2), (300, 3)])
def test_convolution(batch: Batch, channels: int, taps: int) -> None:
    check_convolution(batch, channels, taps)


def test_convolution_between_gates(batch: Batch) -> None:
    """Parts of the rows of one product, in 16 bits; the states are of what is convolved, not rounded."""
    before, after, x = randn(tokens_of(batch), 3 * 40, seed=2).half().chunk(3, 1)
    filters = randn(3, 40, seed=3)
    check(
        batch,
        (2, 40),
        lambda step, states: causal_conv(
            x, filters, states, step, torch.float32, factor=before, gate=after
        ),
        lambda step, states: (
            after.float() * convolve(before.float() * x.float(), filters, step, states)
        ),
    )


@pytest.mark.parametrize(("key_heads", "heads", "k", "v"), [(2, 4, 8, 5), (1, 3, 24, 80)])
def test_gated_delta_rule(batch: Batch, key_heads: int, heads: int, k: int, v: int) -> None:
    check_delta_rule(batch, key_heads, heads, k, v)


@pytest.mark.parametrize(("groups", "heads", "n", "p"), [(2, 4, 16, 8), (1, 3, 24, 80)])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 1.2)])
def test_state_space(batch: Batch, groups: int, heads: int, n: int, p: int, limit) -> None:
    check_state_space(batch, groups, heads, n, p, limit)


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gated_norm(gate_first: bool, shared: bool) -> None:
    rows, groups, width = 3, 4, 20
    x, weight = randn(rows, groups * width, seed=1), randn(groups, width, seed=2)
    weight = weight[:1] if shared else weight
    gate = randn(rows, groups * width + 4, seed=3).half()[:, 4:]
    factor = F.silu(gate.float())
    normed = (x * factor if gate_first else x).view(rows, groups, width)
    want = (F.rms_norm(normed, (width,), eps=0.1) * weight).flatten(1)
    want = want if gate_first else want * factor
    got = gated_norm(x, gate, weight.flatten(), 0.1, num_groups=groups, gate_first=gate_first)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=1e-3, atol=1e-3)


def test_the_static_batch_of_graphs_is_the_uploaded_one() -> None:
    """But for padding, which reads and writes nothing; and what was loaded before leaves nothing behind."""
    static = StaticStates(8, DEVICE)
    starts = torch.arange(9, dtype=torch.int32)
    static.load(Batch([item(slot, 3, 1, snapshots=[(4, 11)]) for slot in range(8)], 16), 8)
    static.load(Batch(list(DECODES), 16), 4)
    channels, filters = 6, randn(4, 6, seed=3)
    x, states = randn(4, channels, seed=2), randn(SLOTS, 3, channels, seed=1)
    want = states.clone()
    uploaded = upload_states(Batch(list(DECODES), 16), starts[:4])
    rows = causal_conv(x[:3], filters, want, uploaded, torch.float32)
    got = causal_conv(x, filters, states, static.view(starts[:5]), torch.float32)
    assert torch.equal(got[:3], rows) and torch.equal(states, want)
    assert torch.equal(got[3], x[3] * filters[3])


def test_tokens_are_the_same_however_they_are_cut() -> None:
    """Bit by bit: whole, in chunks, and one by one."""
    heads, k, v, count = 2, 8, 16, 23
    qkv, ba = randn(count, heads * (2 * k + v), seed=2), randn(count, 2 * heads, seed=3)
    rate, dt_bias = -randn(heads, seed=4).exp(), randn(heads, seed=5)

    def run(cuts: list[int]) -> tuple[Tensor, Tensor]:
        states, rows = torch.full((1, heads, k, v), float("nan")), []
        for first, end in itertools.pairwise(cuts):
            batch = Batch([item(0, first, end - first)], 16)
            step = upload_states(batch, starts_of(batch))
            rows.append(
                gated_delta_rule(qkv[first:end], ba[first:end], rate, dt_bias, states, step, heads)
            )
        return torch.cat(rows), states

    whole = run([0, count])
    for cuts in ([0, 1, 7, 23], list(range(count + 1))):
        assert all(torch.equal(a, b) for a, b in zip(run(cuts), whole, strict=True))


def test_wrong_arguments_are_named() -> None:
    batch = Batch(list(DECODES), 16)
    step = upload_states(batch, starts_of(batch))
    x, states = randn(3, 8, seed=1), randn(SLOTS, 3, 8, seed=2)
    with pytest.raises(KernelArgumentError, match=r"states has shape \[12, 3, 8\]"):
        causal_conv(x, randn(3, 8, seed=3), states, step, torch.float32)
    with pytest.raises(KernelArgumentError, match="gate and x have other row strides"):
        gate = randn(3, 9, seed=3)[:, :8]
        causal_conv(x, randn(4, 8, seed=3), states, step, torch.float32, gate=gate)
    with pytest.raises(KernelArgumentError, match="3 value heads are not shared by 2"):
        of_heads = randn(SLOTS, 3, 4, 4, seed=1)
        gated_delta_rule(x, x, x[0], x[0], of_heads, step, 2)
    with pytest.raises(KernelArgumentError, match="not contiguous int32"):
        StateBatch(*(each.long() for each in step.tensors), one_token_each=True)
    with pytest.raises(KernelArgumentError, match="do not fit together"):
        StateBatch(step.starts[:2], *step.tensors[1:], one_token_each=True)
