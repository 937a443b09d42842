"""The gated delta rule (Yang et al. 2024, "Gated Delta Networks"), token by token, per value head:

    q = q / |q| / sqrt(K), k = k / |k|, beta = sigmoid(b), decay = exp(rate * softplus(a + dt_bias))
    S = decay S;  S = S + k (beta (v - S^T k))^T;  o = S^T q
      = decay S + k d^T                              = decay S^T q + (k . q) d,  d = beta (v - decay S^T k)

    S [K, V] of one head    a program takes BLOCK_V columns of it through all tokens of a request, in registers:
    | p0 | p1 | p2 | p3 |   the next tokens' q, k and v are on their way meanwhile

Each key head serves VALUE_HEADS / KEY_HEADS consecutive value heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused.rows import FLOATS, need, need_rows
from .batch import StateBatch
from .elementwise import sigmoid, softplus

NUMBERS = 2048  # of a state in one program: 64 registers a thread of one warp
STAGES = tl.constexpr(3)  # tokens whose rows are being loaded


@triton.jit
def delta_rule_kernel(
    qkv_ptr,  # float32 [T, 2 * KEY_HEADS * K + VALUE_HEADS * V]
    ba_ptr,  # [T, 2 * VALUE_HEADS]: b, a
    rate_ptr,
    dt_bias_ptr,  # float32 [VALUE_HEADS]
    state_ptr,  # float32 [slots, VALUE_HEADS, K, V]
    out_ptr,  # float32 [T, VALUE_HEADS, V]
    start_ptr,
    read_ptr,
    stop_start_ptr,
    stop_row_ptr,
    stop_slot_ptr,
    qkv_stride,
    ba_stride,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    row = tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = row < K, column < V
    place = (head * K + row[:, None]) * V + column[None, :]
    slot = tl.load(read_ptr + sequence)
    known = (row < tl.where(slot >= 0, K, 0))[:, None] & in_v[None, :]
    slots = state_ptr + place
    s = tl.load(slots + slot.to(tl.int64) * (VALUE_HEADS * K * V), mask=known, other=0.0)

    rate = tl.load(rate_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head)
    token = tl.load(start_ptr + sequence)
    q_at = qkv_ptr + token.to(tl.int64) * qkv_stride + key_head * K + row
    v_at = qkv_ptr + token.to(tl.int64) * qkv_stride + 2 * KEY_HEADS * K + head * V + column
    b_at = ba_ptr + token.to(tl.int64) * ba_stride + head
    out = out_ptr + (token.to(tl.int64) * VALUE_HEADS + head) * V + column
    for stop in range(tl.load(stop_start_ptr + sequence), tl.load(stop_start_ptr + sequence + 1)):
        end = tl.load(stop_row_ptr + stop)
        for _ in tl.range(token, end, num_stages=STAGES):
            q = tl.load(q_at, mask=in_k, other=0.0)
            k = tl.load(q_at + KEY_HEADS * K, mask=in_k, other=0.0)
            v = tl.load(v_at, mask=in_v, other=0.0)
            beta = sigmoid(tl.load(b_at).to(tl.float32))
            a = tl.load(b_at + VALUE_HEADS).to(tl.float32)
            decay = tl.exp(rate * softplus(a + dt_bias))
            # All sums are of what was there before the token: none of them waits for another.
            found_k, found_q = tl.sum(s * k[:, None], 0), tl.sum(s * q[:, None], 0)
            k_factor = tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
            q_factor = tl.rsqrt((tl.sum(q * q, 0) + 1e-6) * K)
            delta = (v - decay * k_factor * found_k) * (beta * k_factor)
            y = (decay * found_q + tl.sum(q * k, 0) * delta) * q_factor
            tl.store(out, y, mask=in_v)
            s = s * decay + k[:, None] * delta[None, :]
            q_at += qkv_stride
            v_at += qkv_stride
            b_at += ba_stride
            out += VALUE_HEADS * V
        token = end
        slot = tl.load(stop_slot_ptr + stop)
        wanted = (row < tl.where(slot >= 0, K, 0))[:, None] & in_v[None, :]
        tl.store(slots + slot.to(tl.int64) * (VALUE_HEADS * K * V), s, mask=wanted)


def gated_delta_rule(
    qkv: Tensor,
    ba: Tensor,
    rate: Tensor,
    dt_bias: Tensor,
    states: Tensor,
    batch: StateBatch,
    num_key_heads: int,
) -> Tensor:
    """Each request's tokens through its state; the states of its slots go on.

    qkv float32 [T, 2 * num_key_heads * K + heads * V], rows contiguous: queries and keys as they come from the
    convolution, values. ba [T, 2 * heads] of 16 bits or float32. rate, dt_bias float32 [heads]. states float32 [slots,
    heads, K, V].

    Returns float32 [T, heads, V]. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "gated_delta_rule"
    need_rows(name, "states", states, (torch.float32,), None, None, None, None)
    need(states.is_contiguous(), name, "states have gaps")
    _, heads, key_dim, value_dim = states.shape
    need(heads % num_key_heads == 0, name, f"{heads} value heads are not shared by {num_key_heads}")
    width = 2 * num_key_heads * key_dim + heads * value_dim
    need_rows(name, "qkv", qkv, (torch.float32,), None, width)
    need_rows(name, "ba", ba, FLOATS, len(qkv), 2 * heads)
    need_rows(name, "rate", rate, (torch.float32,), heads)
    need_rows(name, "dt_bias", dt_bias, (torch.float32,), heads)
    out = torch.empty(len(qkv), heads, value_dim, device=qkv.device)
    if len(qkv):
        block_k, block_v = columns(key_dim, value_dim)
        delta_rule_kernel[(len(batch.reads), heads, triton.cdiv(value_dim, block_v))](
            qkv,
            ba,
            rate,
            dt_bias,
            states,
            out,
            *batch.tensors,
            qkv.stride(0),
            ba.stride(0),
            KEY_HEADS=num_key_heads,
            VALUE_HEADS=heads,
            K=key_dim,
            V=value_dim,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=1,
        )
    return out


def columns(rows: int, width: int) -> tuple[int, int]:
    """Of a state [rows, width] the part that one program holds: rows up to a power of two, and columns."""
    block = triton.next_power_of_2(rows)
    return block, min(triton.next_power_of_2(width), max(1, NUMBERS // block))
