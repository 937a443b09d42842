"""Steps that go through recurrent states, and what torch's operators make of them; in the interpreter, or on a GPU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_cases import DEVICE
from torch import Tensor

from nibble.engine.backends.batch import Batch
from nibble.engine.backends.torch import delta_rule, state_space
from nibble.engine.backends.torch.states import StateStep, carry, convolve
from nibble.engine.backends.triton.states import upload_states
from nibble.engine.request import Request
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledRequest
from nibble.kernels.recurrent.batch import StateBatch
from nibble.kernels.recurrent.convolution import causal_conv
from nibble.kernels.recurrent.delta_rule import gated_delta_rule
from nibble.kernels.recurrent.state_space import state_space as run_state_space

SLOTS = 12


def item(slot: int, start: int, count: int, **more) -> ScheduledRequest:
    tokens = list(range(start + count + 1))
    request = Request(f"{slot}", tokens, SamplingParams(), frozenset(), seed=0, state_slot=slot)
    return ScheduledRequest(request, start, count, **more)


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE) * scale


def starts_of(batch: Batch) -> Tensor:
    return torch.tensor(batch.query_start_loc, dtype=torch.int32)


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
    for mine, wanted in ((got.float(), want), (states, want_states)):
        bound = 2e-5 * float(wanted.nan_to_num().abs().max())
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=bound, equal_nan=True)


def check_convolution(batch: Batch, channels: int, taps: int) -> None:
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


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def check_delta_rule(batch: Batch, key_heads: int, heads: int, k: int, v: int) -> None:
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


def check_state_space(
    batch: Batch, groups: int, heads: int, n: int, p: int, limit: tuple[float, float]
) -> None:
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
