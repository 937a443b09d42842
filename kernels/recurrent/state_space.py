"""Mamba-2's state space (Dao and Gu 2024, "Transformers are SSMs"), token by token, per head:

    dt = softplus(dt + dt_bias), within limits;  decay = exp(rate * dt)
    S = decay S + B (dt x)^T;  y = S^T C + skip * x = decay S^T C, of the S before, + (dt (B . C) + skip) x

    a row of xbc   [ x of all heads | B of all groups | C of all groups ]
    S [N, P] of one head: a program takes BLOCK_P columns through all tokens of a request, as in delta_rule.py

Each group's B and C serve HEADS / GROUPS consecutive heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused.rows import FLOATS, need, need_rows
from .batch import StateBatch
from .delta_rule import STAGES, columns
from .elementwise import softplus


@triton.jit
def state_space_kernel(
    xbc_ptr,  # float32 [T, HEADS * P + 2 * GROUPS * N]
    dt_ptr,  # [T, HEADS]
    rate_ptr,
    dt_bias_ptr,
    skip_ptr,  # float32 [HEADS]
    state_ptr,  # float32 [slots, HEADS, N, P]
    out_ptr,  # float32 [T, HEADS, P]
    start_ptr,
    read_ptr,
    stop_start_ptr,
    stop_row_ptr,
    stop_slot_ptr,
    xbc_stride,
    dt_stride,
    least_dt,
    most_dt,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    row = tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = row < N, column < P
    slot = tl.load(read_ptr + sequence)
    known = (row < tl.where(slot >= 0, N, 0))[:, None] & in_p[None, :]
    slots = state_ptr + (head * N + row[:, None]) * P + column[None, :]
    s = tl.load(slots + slot.to(tl.int64) * (HEADS * N * P), mask=known, other=0.0)

    rate = tl.load(rate_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head)
    skip = tl.load(skip_ptr + head)
    token = tl.load(start_ptr + sequence)
    x_at = xbc_ptr + token.to(tl.int64) * xbc_stride + head * P + column
    b_at = xbc_ptr + token.to(tl.int64) * xbc_stride + HEADS * P + group * N + row
    dt_at = dt_ptr + token.to(tl.int64) * dt_stride + head
    out = out_ptr + (token.to(tl.int64) * HEADS + head) * P + column
    for stop in range(tl.load(stop_start_ptr + sequence), tl.load(stop_start_ptr + sequence + 1)):
        end = tl.load(stop_row_ptr + stop)
        for _ in tl.range(token, end, num_stages=STAGES):
            x = tl.load(x_at, mask=in_p, other=0.0)
            b = tl.load(b_at, mask=in_n, other=0.0)
            c = tl.load(b_at + GROUPS * N, mask=in_n, other=0.0)
            dt = softplus(tl.load(dt_at).to(tl.float32) + dt_bias)
            dt = tl.maximum(dt, least_dt, propagate_nan=tl.PropagateNan.ALL)
            dt = tl.minimum(dt, most_dt, propagate_nan=tl.PropagateNan.ALL)
            decay = tl.exp(rate * dt)
            # Both sums are of what was there before the token: neither waits for the other.
            y = decay * tl.sum(s * c[:, None], 0) + (tl.sum(b * c, 0) * dt + skip) * x
            tl.store(out, y, mask=in_p)
            s = s * decay + b[:, None] * (dt * x)[None, :]
            x_at += xbc_stride
            b_at += xbc_stride
            dt_at += dt_stride
            out += HEADS * P
        token = end
        slot = tl.load(stop_slot_ptr + stop)
        wanted = (row < tl.where(slot >= 0, N, 0))[:, None] & in_p[None, :]
        tl.store(slots + slot.to(tl.int64) * (HEADS * N * P), s, mask=wanted)


def state_space(
    xbc: Tensor,
    dt: Tensor,
    rate: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    states: Tensor,
    batch: StateBatch,
    num_groups: int,
    time_step_limit: tuple[float, float],
) -> Tensor:
    """Each request's tokens through its state; the states of its slots go on.

    xbc float32 [T, heads * P + 2 * num_groups * N], rows contiguous. dt [T, heads] of 16 bits or float32. rate,
    dt_bias, skip float32 [heads]. states float32 [slots, heads, N, P].

    Returns float32 [T, heads, P]. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "state_space"
    need_rows(name, "states", states, (torch.float32,), None, None, None, None)
    need(states.is_contiguous(), name, "states have gaps")
    _, heads, state_dim, head_dim = states.shape
    need(heads % num_groups == 0, name, f"{heads} heads are not of {num_groups} groups")
    width = heads * head_dim + 2 * num_groups * state_dim
    need_rows(name, "xbc", xbc, (torch.float32,), None, width)
    need_rows(name, "dt", dt, FLOATS, len(xbc), heads)
    for what, each in (("rate", rate), ("dt_bias", dt_bias), ("skip", skip)):
        need_rows(name, what, each, (torch.float32,), heads)
    out = torch.empty(len(xbc), heads, head_dim, device=xbc.device)
    if len(xbc):
        block_n, block_p = columns(state_dim, head_dim)
        state_space_kernel[(len(batch.reads), heads, triton.cdiv(head_dim, block_p))](
            xbc,
            dt,
            rate,
            dt_bias,
            skip,
            states,
            out,
            *batch.tensors,
            xbc.stride(0),
            dt.stride(0),
            *time_step_limit,
            HEADS=heads,
            GROUPS=num_groups,
            N=state_dim,
            P=head_dim,
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            num_warps=1,
        )
    return out
