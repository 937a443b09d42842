"""Feed-forwards in torch's operators, one class a kind (architectures/base.py)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Experts
from .layers import RMSNorm
from .linear import FusedLinear


@dataclass(slots=True)
class TorchGatedMlp:
    """down(act(gate) * up)"""

    activation: str
    gate_up: FusedLinear
    down: FusedLinear
    clamp: tuple[float, float] | None = None  # of Experts
    deviations: float | None = None  # of GatedMlp

    def __call__(self, h: Tensor) -> Tensor:
        """h [T, hidden], normed."""
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        if self.deviations is not None:
            gate = above_cutoff(gate, self.deviations)
        if self.clamp is not None:
            return self.down(clamped(gate, up, *self.clamp))
        return self.down(activate(gate, self.activation) * up)


@dataclass(slots=True)
class TorchPlainMlp:
    """down(act(up))"""

    activation: str
    up: FusedLinear
    down: FusedLinear

    def __call__(self, h: Tensor) -> Tensor:
        """h [T, hidden], normed."""
        return self.down(activate(self.up(h), self.activation))


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return F.relu(x).square()
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def above_cutoff(gate: Tensor, deviations: float) -> Tensor:
    """How far gates [T, n] are above their mean plus so many standard deviations, else 0: see GatedMlp."""
    spread, mean = torch.std_mean(gate.float(), dim=-1, correction=0, keepdim=True)
    return F.relu(gate - (mean + deviations * spread)).to(gate.dtype)


def clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """GPT-OSS's gating, see Experts.clamp."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@dataclass(slots=True)
class TorchExperts:
    """One expert after the other, each on the tokens that chose it. Scores and weights are float32."""

    spec: Experts
    router: Tensor  # float32 [num_experts, hidden]
    router_bias: Tensor | None  # float32 [num_experts]
    correction_bias: Tensor | None  # float32 [num_experts]
    experts: list[TorchGatedMlp] | list[TorchPlainMlp]
    shared: TorchGatedMlp | TorchPlainMlp | None
    shared_gate: Tensor | None  # float32 [1, hidden]
    latent: list[FusedLinear]  # into it and out of it; empty where experts read h
    scales: Tensor | None = None  # float32 [num_experts] of MlpBesideExperts

    def __call__(self, h: Tensor, routed: Tensor | None = None) -> Tensor:
        """h [T, hidden], normed. routed: what the router reads, where that is something else."""
        seen = h if routed is None else routed
        logits = F.linear(seen.float(), self.router, self.router_bias)
        out = self.mixed(self.latent[0](h) if self.latent else h, logits)
        out = self.latent[1](out) if self.latent else out
        if self.shared is None:
            return out
        added = self.of_shared(self.shared, h)
        if self.shared_gate is not None:
            added = added * F.linear(h.float(), self.shared_gate).sigmoid()
        return out + added.to(out.dtype)

    def mixed(self, read: Tensor, logits: Tensor) -> Tensor:
        """What the chosen experts give, weighted and added. read [T, in], logits float32 [T, num_experts]."""
        weights, chosen = route(self.spec, logits, self.correction_bias)
        if self.scales is not None:
            weights = weights * self.scales[chosen]
        out = torch.zeros_like(read)
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            added = self.experts[expert](read[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, added.to(out.dtype))
        return out

    def of_shared(self, shared: TorchGatedMlp | TorchPlainMlp, h: Tensor) -> Tensor:
        return shared(h)


@dataclass(slots=True)
class TorchMlpBesideExperts:
    """norm(mlp(norm(x))) + norm(experts(norm(x)))"""

    mlp: TorchGatedMlp | TorchPlainMlp
    experts: TorchExperts
    before_mlp: RMSNorm
    after_mlp: RMSNorm
    before_experts: RMSNorm
    after_experts: RMSNorm
    before_router: RMSNorm  # without a weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden], not normed."""
        routed = self.experts(self.before_experts(x), self.before_router(x))
        return self.after_mlp(self.mlp(self.before_mlp(x))) + self.after_experts(routed)


TorchFeedForward = TorchGatedMlp | TorchPlainMlp | TorchExperts | TorchMlpBesideExperts


def route(spec: Experts, logits: Tensor, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Router logits float32 [T, num_experts] -> weights and expert numbers [T, top_k]."""
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    ranks = scores if correction_bias is None else scores + correction_bias
    if spec.limited_groups is not None:
        count, best = spec.limited_groups
        groups = ranks.unflatten(-1, (count, -1))
        kept = groups.topk(spec.group_rank, dim=-1).values.sum(-1).topk(best, dim=-1).indices
        inside = torch.zeros(groups.shape[:-1], device=ranks.device).scatter_(-1, kept, 1.0) > 0
        ranks = groups.masked_fill(~inside.unsqueeze(-1), float("-inf")).flatten(-2)
    chosen = ranks.topk(spec.top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if spec.norm_weights:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * spec.routed_scale, chosen
