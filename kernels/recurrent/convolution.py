"""A causal convolution of a few taps, one filter a channel, that goes on from a request's last inputs.

    state  [slots, TAPS - 1, C]     x  [T, C]
    | i i i |                       | x x x x x x |       out[t] = sum over taps of taps[i] * seen[t - TAPS + 1 + i]
            seen: the inputs in the request's slot, then its tokens

A program takes some channels of one request through all of its tokens, BLOCK_T at a time. It writes states when it has
read all that it needs of the old one, whose slot may be the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused.rows import FLOATS, need, need_rows
from .batch import StateBatch
from .elementwise import silu

TOKENS, CHANNELS = 16, 64  # of a program, where a request has several
CHANNELS_OF_ONE = 128  # where it has one; 256 spill on cc 8.9


@triton.jit
def _seen(
    token,
    channel,
    first,
    last,
    num_kept,
    x_ptr,
    factor_ptr,
    kept_ptr,
    x_stride,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Inputs [tokens, channels] in float32: those before `first` are the request's kept ones, num_kept of them."""
    in_channels = (channel < CHANNELS)[None, :]
    at = token[:, None].to(tl.int64) * x_stride + channel[None, :]
    new = ((token >= first) & (token < last))[:, None] & in_channels
    x = tl.load(x_ptr + at, mask=new, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + at, mask=new, other=0.0).to(tl.float32)
    old = ((token < first) & (token >= first - num_kept))[:, None] & in_channels
    place = (token - first + TAPS - 1)[:, None] * CHANNELS + channel[None, :]
    return x + tl.load(kept_ptr + place, mask=old, other=0.0)


@triton.jit
def conv_kernel(
    x_ptr,  # [T, CHANNELS]
    factor_ptr,  # as x: what is convolved is their product; None
    gate_ptr,  # as x: the output is multiplied by it; None
    taps_ptr,  # float32 [TAPS, CHANNELS], oldest first
    bias_ptr,  # float32 [CHANNELS]; None
    state_ptr,  # float32 [slots, TAPS - 1, CHANNELS]
    out_ptr,  # [T, CHANNELS]
    start_ptr,
    read_ptr,
    stop_start_ptr,
    stop_row_ptr,
    stop_slot_ptr,
    x_stride,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,  # TAPS - 1, up to a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
):
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    first = tl.load(start_ptr + sequence)
    last = tl.load(start_ptr + sequence + 1)
    slot = tl.load(read_ptr + sequence)
    num_kept = tl.where(slot >= 0, TAPS - 1, 0)
    kept = state_ptr + slot.to(tl.int64) * ((TAPS - 1) * CHANNELS)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    for begin in range(first, last, BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32) + bias[None, :]
        for tap in tl.static_range(TAPS):
            x = _seen(
                token + (tap - TAPS + 1),
                channel,
                first,
                last,
                num_kept,
                x_ptr,
                factor_ptr,
                kept,
                x_stride,
                CHANNELS,
                TAPS,
            )
            y += x * tl.load(taps_ptr + tap * CHANNELS + channel, mask=inside, other=0.0)[None, :]
        if SILU:
            y = silu(y)
        live = (token < last)[:, None] & inside[None, :]
        if gate_ptr is not None:
            gate_at = token[:, None].to(tl.int64) * x_stride + channel[None, :]
            y *= tl.load(gate_ptr + gate_at, mask=live, other=0.0).to(tl.float32)
        out = out_ptr + token[:, None].to(tl.int64) * CHANNELS + channel[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=live)

    row = tl.arange(0, ROWS)
    for stop in range(tl.load(stop_start_ptr + sequence), tl.load(stop_start_ptr + sequence + 1)):
        end = tl.load(stop_row_ptr + stop)
        target = tl.load(stop_slot_ptr + stop)
        state = _seen(
            end - (TAPS - 1) + row,
            channel,
            first,
            last,
            num_kept,
            x_ptr,
            factor_ptr,
            kept,
            x_stride,
            CHANNELS,
            TAPS,
        )
        tl.debug_barrier()  # all threads have read what one may overwrite
        place = target.to(tl.int64) * ((TAPS - 1) * CHANNELS) + row[:, None] * CHANNELS
        rows = row < tl.where(target >= 0, TAPS - 1, 0)
        tl.store(state_ptr + place + channel[None, :], state, mask=rows[:, None] & inside[None, :])


def causal_conv(
    x: Tensor,
    taps: Tensor,
    states: Tensor,
    batch: StateBatch,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    factor: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Each request's inputs through the filters; the states of its slots go on.

    x [T, C] of 16 bits or float32, rows contiguous. taps float32 [TAPS, C], oldest first. states float32 [slots, TAPS -
    1, C]: the last inputs, oldest first. bias float32 [C]. silu: of the sum with the bias. factor, gate [T, C], of x's
    dtype and row stride: factors of x and of the output.

    Returns [T, C] of `dtype`. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "causal_conv"
    need_rows(name, "x", x, FLOATS, None, None)
    tokens, channels = x.shape
    need_rows(name, "taps", taps, (torch.float32,), None, channels)
    need_rows(name, "states", states, (torch.float32,), None, len(taps) - 1, channels)
    need(taps.is_contiguous() and states.is_contiguous(), name, "taps or states have gaps")
    if bias is not None:
        need_rows(name, "bias", bias, (torch.float32,), channels)
    for what, each in (("factor", factor), ("gate", gate)):
        if each is not None:
            need_rows(name, what, each, (x.dtype,), tokens, channels)
            need(each.stride(0) == x.stride(0), name, f"{what} and x have other row strides")
    out = torch.empty(tokens, channels, dtype=dtype, device=x.device)
    if tokens:
        alone = batch.one_token_each
        block = min(triton.next_power_of_2(channels), CHANNELS_OF_ONE if alone else CHANNELS)
        conv_kernel[(len(batch.reads), triton.cdiv(channels, block))](
            x,
            factor,
            gate,
            taps,
            bias,
            states,
            out,
            *batch.tensors,
            x.stride(0),
            CHANNELS=channels,
            TAPS=len(taps),
            ROWS=triton.next_power_of_2(max(1, len(taps) - 1)),
            BLOCK_T=1 if alone else TOKENS,
            BLOCK_C=block,
            SILU=silu,
            num_warps=2,
        )
    return out
