"""Feed-forwards on a CUDA device: gated MLPs and experts by Triton's kernels, the others by torch's operators.

Experts are stacked when they are loaded (kernels/moe/weight.py), a layer at a time, so that which of them a token goes
through never has to be known to the host. Those that cannot be stacked are computed one after the other, as torch's
backend does it; the log says why. Then the host waits in each such layer, and no CUDA graph can hold the step.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ....architectures.base import Experts
from ....kernels.fused.activation import gated
from ....kernels.moe.experts import ExpertMlps, Gating, experts
from ....kernels.moe.route import route
from ....kernels.moe.routing import Routing
from ....kernels.moe.tiles import tokens_of_tiles
from ....kernels.moe.weight import ExpertWeight, stack, why_not_stacked
from ..torch.feed_forward import (
    TorchExperts,
    TorchFeedForward,
    TorchGatedMlp,
    TorchMlpBesideExperts,
    TorchPlainMlp,
)
from ..torch.loader import Loader

logger = logging.getLogger(__name__)

KERNEL = "moe-triton"  # in reports


@dataclass(slots=True, kw_only=True)
class TritonExperts(TorchExperts):
    """All experts at once. The list of them is empty."""

    mlps: ExpertMlps
    routing: Routing

    def mixed(self, read: Tensor, logits: Tensor) -> Tensor:
        weights, chosen = route(logits, self.routing, self.correction_bias, self.scales)
        return experts(read, weights, chosen, self.mlps)

    def of_shared(self, shared: TorchGatedMlp | TorchPlainMlp, h: Tensor) -> Tensor:
        return feed_forward(shared, h)


def feed_forward(mlp: TorchFeedForward | None, h: Tensor) -> Tensor:
    """h [T, hidden], normed where the layer's norm is -> what is added, [T, hidden].

    Raises RuntimeError where a CUDA graph is captured that cannot hold it.
    """
    if mlp is None:
        raise TypeError("a layer without a feed-forward has nothing to compute")
    if isinstance(mlp, TorchGatedMlp) and mlp.clamp is None and mlp.deviations is None:
        return mlp.down(gated(mlp.gate_up(h), mlp.activation))
    if _host_chooses(mlp) and _is_captured(h):
        raise RuntimeError("the host looks at which experts are chosen")
    return mlp(h)


def warm_up_tokens(mlps: Iterable[TorchFeedForward | None]) -> set[int]:
    """Lengths of prompts from which on experts take other tiles, which are compiled when they are first needed."""
    every = [mlp.experts if isinstance(mlp, TorchMlpBesideExperts) else mlp for mlp in mlps]
    routings = {each.routing for each in every if isinstance(each, TritonExperts)}
    return {
        tokens
        for routing in routings
        for tokens in tokens_of_tiles(routing.num_experts, routing.top_k)
    }


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _host_chooses(mlp: TorchFeedForward) -> bool:
    found = mlp.experts if isinstance(mlp, TorchMlpBesideExperts) else mlp
    return isinstance(found, TorchExperts) and not isinstance(found, TritonExperts)


class TritonLoader(Loader):
    """As torch's, but for experts."""

    __slots__ = ()

    def _experts(self, index: int, mlp: Experts, router: Tensor) -> TorchExperts:
        up = self._stacked(index, mlp, 0)
        down = None if up is None else self._stacked(index, mlp, 1)
        if up is None or down is None:
            return Loader._experts(self, index, mlp, router)
        found = self._around_experts(index, mlp, router)
        self.report.used[KERNEL] += 2
        gating = Gating(mlp.activation, not mlp.plain, mlp.clamp)
        return TritonExperts(
            **{each.name: getattr(found, each.name) for each in fields(found)},
            mlps=ExpertMlps(up, down, gating),
            routing=routing(mlp),
        )

    def _stacked(self, index: int, mlp: Experts, side: int) -> ExpertWeight | None:
        """Gate and up (side 0) or down (1) of every expert; None: they cannot be stacked."""
        members = mlp.members(self.weights.model.hidden_size)[: mlp.num_experts]
        linears = [self.weights.group(index, pair[side]) for pair in members]
        weights = [[linear.weight for linear in each] for each in linears]
        if (reason := why_not_stacked(weights)) is not None:
            if KERNEL not in self.report.refused:
                logger.warning("experts are computed one after another: %s %s", KERNEL, reason)
            self.report.refused.setdefault(KERNEL, reason)
            return None
        biases = [[linear.bias for linear in each] for each in linears]
        return stack(weights, biases, self.target.dtype, self.target.device)


def routing(mlp: Experts) -> Routing:
    """How its router's logits are read."""
    groups, best = mlp.limited_groups or (1, 1)
    return Routing(
        mlp.num_experts,
        mlp.top_k,
        mlp.scoring,
        mlp.norm_weights,
        mlp.routed_scale,
        groups,
        best,
        mlp.group_rank if mlp.limited_groups else 1,
    )
