"""The recurrent kernels in the interpreter against torch's operators: decodes and chunks of any length side by side,
from their own slot, a snapshot or nothing, with snapshots within and at the end."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, on_device  # noqa: F401  (a fixture)
from torch import Tensor

from nibble.engine.backends.batch import Batch
from nibble.engine.backends.torch import delta_rule, state_space
from nibble.engine.backends.torch.states import StateStep, carry, convolve
from nibble.engine.backends.triton.states import StaticStates, upload_states
from nibble.engine.request import Request, SamplingParams
from nibble.engine.scheduling.batch import ScheduledRequest
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.recurrent.batch import StateBatch
from nibble.kernels.recurrent.convolution import causal_conv
from nibble.kernels.recurrent.delta_rule import gated_delta_rule
from nibble.kernels.recurrent.gated_norm import gated_norm
from nibble.kernels.recurrent.state_space import state_space as run_state_space

SLOTS = 12


def item(slot: int, start: int, count: int, **more) -> ScheduledRequest:
    tokens = list(range(start + count + 1))
    request = Request(f"{slot}", tokens, SamplingParams(), frozenset(), seed=0, state_slot=slot)
    return ScheduledRequest(request, start, count, **more)


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


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE) * scale


def starts_of(batch: Batch) -> Tensor:
    return torch.tensor(batch.query_start_loc, dtype=torch.int32)


@pytest.fixture(params=["decodes", "chunks", "both"])
def batch(request) -> Batch:
    chosen = {"decodes": DECODES, "chunks": CHUNKS, "both": DECODES + CHUNKS}[request.param]
    return Batch(list(chosen), 16)


def tokens_of(batch: Batch) -> int:
    return batch.query_start_loc[-1]


def check(
    batch: Batch,
    shape: tuple[int, ...],
    ours: Callable[[StateBatch, Tensor], Tensor],
    theirs: Callable[[StateStep, Tensor], Tensor],
) -> None:
    """Outputs, and the states of all slots: those that nothing was to be written to as well. Slots of requests that
    start have numbers that must not be read."""
    states = randn(SLOTS, *shape, seed=1)
    states[[2, 3]] = float("nan")
    want_states = states.clone()
    want = theirs(StateStep.build(batch, DEVICE), want_states)
    got = ours(upload_states(batch, starts_of(batch)), states)
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, want_states, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("channels", "taps"), [(70, 4), (5, 2), (300, 3)])
def test_convolution(batch: Batch, channels: int, taps: int) -> None:
    wide = randn(tokens_of(batch), channels + 3, seed=2)
    filters, bias = randn(taps, channels, seed=3), randn(channels, seed=4)
    check(
        batch,
        (taps - 1, channels),
        lambda step, states: causal_conv(
            wide[:, :channels], filters, states, step, torch.float32, bias=bias, silu=True
        ),
        lambda step, states: F.silu(convolve(wide[:, :channels], filters, step, states) + bias),
    )


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


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize(("key_heads", "heads", "k", "v"), [(2, 4, 8, 5), (1, 3, 24, 80)])
def test_gated_delta_rule(batch: Batch, key_heads: int, heads: int, k: int, v: int) -> None:
    count, keys = tokens_of(batch), key_heads * k
    qkv = randn(count, 2 * keys + heads * v + 2, seed=2)[:, : 2 * keys + heads * v]
    ba = randn(count, 2 * heads, seed=3, scale=3.0).half()
    rate, dt_bias = -randn(heads, seed=4).exp(), randn(heads, seed=5)

    def theirs(step: StateStep, states: Tensor) -> Tensor:
        parts = qkv.split((keys, keys, heads * v), 1)
        query, key = (
            unit(x.reshape(count, key_heads, k)).repeat_interleave(heads // key_heads, 1)
            for x in parts[:2]
        )
        value = parts[2].reshape(count, heads, v)
        b, a = ba.float().chunk(2, 1)
        inputs = query * k**-0.5, key, value, rate * F.softplus(a + dt_bias), b.sigmoid()
        return carry(delta_rule.recurrent_step, delta_rule.chunked, inputs, step, states)

    check(
        batch,
        (heads, k, v),
        lambda step, states: gated_delta_rule(qkv, ba, rate, dt_bias, states, step, key_heads),
        theirs,
    )


@pytest.mark.parametrize(("groups", "heads", "n", "p"), [(2, 4, 16, 8), (1, 3, 24, 80)])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 1.2)])
def test_state_space(batch: Batch, groups: int, heads: int, n: int, p: int, limit) -> None:
    count, width = tokens_of(batch), heads * p + 2 * groups * n
    xbc = randn(count, width + 1, seed=2)[:, :width]
    dt = randn(count, heads + 5, seed=3, scale=3.0).half()[:, 5:]
    rate, dt_bias, skip = -randn(heads, seed=4).exp(), randn(heads, seed=5), randn(heads, seed=6)

    def theirs(step: StateStep, states: Tensor) -> Tensor:
        x, *both = xbc.split((heads * p, groups * n, groups * n), 1)
        x = x.reshape(count, heads, p)
        b, c = (
            each.reshape(count, groups, n).repeat_interleave(heads // groups, 1) for each in both
        )
        steps = F.softplus(dt.float() + dt_bias).clamp(*limit)
        inputs = b, c, steps[..., None] * x, rate * steps
        y = carry(state_space.recurrent_step, state_space.chunked, inputs, step, states)
        return y + skip[:, None] * x

    check(
        batch,
        (heads, n, p),
        lambda step, states: run_state_space(
            xbc, dt, rate, dt_bias, skip, states, step, groups, limit
        ),
        theirs,
    )


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
