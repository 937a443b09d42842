"""Which experts a token goes through, and with what weights, from its router's logits.

    scores = softmax or sigmoid of logits         ranks = scores (+ correction bias)
    limited groups: of groups of consecutive experts only the best are left; a group ranks as the sum of its RANK best
    chosen = the top_k ranks                      weights = their scores (/ their sum) * routed scale (* the expert's)

A program routes one token; logits lie in its registers as [groups, experts of a group], both padded to powers of two.
Of equal ranks the lower number is chosen. A token whose logits are not numbers gets weights that are none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused.rows import need, need_rows
from .routing import Routing


@triton.jit
def _best_groups(
    ranks, group, member, GROUPS: tl.constexpr, BEST: tl.constexpr, RANK: tl.constexpr
):
    """The ranks [padded groups, padded size], without those of the groups that rank lower than the BEST."""
    left = ranks
    standing = tl.sum(tl.zeros_like(ranks), 1)
    for _ in tl.static_range(RANK):
        highest = tl.max(left, 1)
        standing += highest
        at = tl.min(tl.where(left == highest[:, None], member, ranks.shape[1]), 1)
        left = tl.where(member == at[:, None], float("-inf"), left)
    standing = tl.where(group < GROUPS, standing, float("-inf"))
    kept = tl.zeros_like(group)
    for _ in tl.static_range(BEST):
        at = tl.min(tl.where(standing == tl.max(standing, 0), group, GROUPS - 1), 0)
        kept = tl.where(group == at, 1, kept)
        standing = tl.where(group == at, float("-inf"), standing)
    return tl.where(kept[:, None] != 0, ranks, float("-inf"))


@triton.jit
def route_kernel(
    logits,  # float32 [T, NUM_EXPERTS]
    correction_bias,  # float32 [NUM_EXPERTS], None
    scales,  # float32 [NUM_EXPERTS], None
    weights,  # float32 [T, TOP_K]
    chosen,  # int32 [T, TOP_K]
    routed_scale,
    NUM_EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BEST: tl.constexpr,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """Grid (T,)."""
    SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED_GROUPS)
    member = tl.arange(0, PADDED_SIZE)[None, :]
    expert = group[:, None] * SIZE + member
    inside = (group[:, None] < GROUPS) & (member < SIZE)
    x = tl.load(logits + token * NUM_EXPERTS + expert, mask=inside, other=0.0 if SIGMOID else -1e30)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(x))
        scores = scores / tl.sum(scores)
    ranks = scores
    if correction_bias is not None:
        ranks += tl.load(correction_bias + expert, mask=inside, other=0.0)
    ranks = tl.where(inside, ranks, float("-inf"))
    if BEST < GROUPS:
        ranks = _best_groups(ranks, group, member, GROUPS, BEST, RANK)
    slot = tl.arange(0, PADDED_K)
    found = tl.zeros((PADDED_K,), tl.int32)
    weight = tl.zeros((PADDED_K,), tl.float32)
    for k in range(TOP_K):
        # where no rank is a number, none is the highest: the last expert is as good as any
        highest = (ranks == tl.max(ranks)) & inside
        best = tl.min(tl.where(highest, expert, NUM_EXPERTS - 1))
        is_best = (expert == best) & inside
        found = tl.where(slot == k, best, found)
        weight = tl.where(slot == k, tl.sum(tl.where(is_best, scores, 0.0)), weight)
        ranks = tl.where(is_best, float("-inf"), ranks)
    if NORM:
        weight = weight / (tl.sum(weight) + 1e-20)
    weight = weight * routed_scale
    if scales is not None:
        weight *= tl.load(scales + found)
    at = token * TOP_K + slot
    tl.store(weights + at, weight, mask=slot < TOP_K)
    tl.store(chosen + at, found, mask=slot < TOP_K)


def route(
    logits: Tensor,
    routing: Routing,
    correction_bias: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits float32 [T, num_experts] -> weights float32 and expert numbers int32, [T, top_k].

    correction_bias float32 [num_experts]: added to the scores to choose by. scales float32 [num_experts]: what the
    weight of an expert that is chosen is multiplied by. Raises KernelArgumentError naming what does not fit.
    """
    name, count, top_k = "route", routing.num_experts, routing.top_k
    need_rows(name, "logits", logits, (torch.float32,), None, count)
    need(logits.is_contiguous(), name, "logits are not contiguous")
    for given, vector in (("correction_bias", correction_bias), ("scales", scales)):
        if vector is not None:
            need_rows(name, given, vector, (torch.float32,), count)
    tokens = logits.shape[0]
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            correction_bias,
            scales,
            weights,
            chosen,
            routing.routed_scale,
            **constants(routing),
            num_warps=1,
        )
    return weights, chosen


def constants(routing: Routing) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "NUM_EXPERTS": routing.num_experts,
        "GROUPS": routing.groups,
        "BEST": routing.best_groups,
        "RANK": routing.group_rank,
        "TOP_K": routing.top_k,
        "SIGMOID": routing.scoring == "sigmoid",
        "NORM": routing.norm_weights,
        "PADDED_GROUPS": triton.next_power_of_2(routing.groups),
        "PADDED_SIZE": triton.next_power_of_2(routing.num_experts // routing.groups),
        "PADDED_K": triton.next_power_of_2(routing.top_k),
    }
