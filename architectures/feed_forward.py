"""Feed-forwards with experts, as data, and what kinds of feed-forward there are."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from .linears import Fold, LinearGroup
from .mlps import Activation, GatedMlp, PlainMlp, up_down_folds

_DETAIL = {"role": "detail"}  # see base.py


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An MLP of their kind beside the experts, which every token goes through."""

    KIND: ClassVar = "shared_expert"
    intermediate_size: int
    # what it adds is multiplied by sigmoid(x . w), w the weight [1, hidden] of Experts.shared_gate
    gated: bool = False


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What checkpoints call an expert's modules, within the layer; "*" is its number."""

    gate: str = "mlp.experts.*.gate_proj"
    up: str = "mlp.experts.*.up_proj"
    down: str = "mlp.experts.*.down_proj"
    router: str = "mlp.gate"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    # tensors [num_experts, 2 * inner, hidden] (gate above up) and [num_experts, hidden, inner], where they are stacked
    stacked: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    interleaved: bool = False  # there gate and up take turns, row by row
    shared: str = "mlp.shared_expert"  # of its linears, which are named as GatedMlp's or PlainMlp's
    shared_linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    latent: tuple[str, str] = ("mlp.fc1_latent_proj", "mlp.fc2_latent_proj")
    shared_gate: str = "mlp.shared_expert_gate"

    @property
    def all(self) -> str:
        """The module that holds them."""
        return self.gate.partition(".*.")[0]


@dataclass(frozen=True, slots=True)
class Experts:
    """Many MLPs, of which each token goes through a few: a router scores them all, the top_k are added weighted.

    scores = softmax or sigmoid of router(x)
    chosen = the top_k of scores (+ correction bias), within the best of the groups
    y = sum over chosen of weight * expert(x) (+ shared expert(x)), weight = routed_scale * score (/ their sum)

    In a latent space, what the experts read is latent[0](x), and what is added latent[1] of their sum.
    """

    KIND: ClassVar = "experts"
    num_experts: int
    top_k: int
    intermediate_size: int  # of each expert
    activation: Activation
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_weights: bool = False  # the chosen scores are divided by their sum
    routed_scale: float = 1.0
    # added to the scores to choose by, and to them only: float32 [num_experts]
    correction_bias: bool = False
    # (groups, best): consecutive experts form groups; only those in the groups that rank highest are chosen
    limited_groups: tuple[int, int] | None = None
    group_rank: int = 2  # how many of a group's best scores are summed to rank it
    shared: SharedExpert | None = None
    # (alpha, limit): instead of activation(gate) * up, (u + 1) * g * sigmoid(alpha * g) with g = min(gate, limit) and
    # u = up within +-limit
    clamp: tuple[float, float] | None = None
    # experts have no gates: PlainMlp's instead of GatedMlp's, the shared one too
    plain: bool = False
    latent_size: int | None = None  # of what experts read and give; None: hidden_size
    names: ExpertNames = field(default=ExpertNames(), metadata=_DETAIL)

    def groups(self, hidden_size: int) -> "tuple[LinearGroup, ...]":
        """Into the latent space; gate, up of every expert; gate, up of the shared one; down of every expert; of the
        shared one; out of the latent space."""
        ups, downs = self._ups_and_downs(hidden_size)
        latent = self.latent_groups(hidden_size)
        return (*latent[:1], *ups, *downs, *latent[1:])

    def latent_groups(self, hidden_size: int) -> "tuple[LinearGroup, ...]":
        """Into the latent space and out of it, where there is one."""
        if (width := self.latent_size) is None:
            return ()
        into, out = self.names.latent
        return (
            LinearGroup((into,), (width,), hidden_size, "column"),
            LinearGroup((out,), (hidden_size,), width, "row"),
        )

    def _ups_and_downs(self, hidden_size: int) -> "tuple[list[LinearGroup], list[LinearGroup]]":
        names, inner, width = self.names, self.intermediate_size, self.latent_size or hidden_size
        first = (names.up,) if self.plain else (names.gate, names.up)
        up = LinearGroup(first, (inner,) * len(first), width, "column", self.num_experts)
        down = LinearGroup((names.down,), (width,), inner, "row", self.num_experts)
        if self.shared is None:
            return [up], [down]
        inner = self.shared.intermediate_size
        modules = tuple(f"{names.shared}.{name}" for name in names.shared_linears)
        kind: Any = PlainMlp if self.plain else GatedMlp
        shared = kind(inner, self.activation, names=modules)
        shared_up, shared_down = shared.groups(hidden_size)
        return [up, shared_up], [down, shared_down]

    @property
    def routers(self) -> tuple[str, ...]:
        """Modules that decide how much of what is added: they stay in 16 bits when all else is quantized."""
        gated = self.shared is not None and self.shared.gated
        return (self.names.router, self.names.shared_gate) if gated else (self.names.router,)

    def members(self, hidden_size: int) -> "list[tuple[LinearGroup, LinearGroup]]":
        """gate, up and down of each expert, the shared one last."""
        ups, downs = (
            [member for group in groups for member in group.members()]
            for groups in self._ups_and_downs(hidden_size)
        )
        return list(zip(ups, downs, strict=True))

    def folds(self, norm: str | None) -> "tuple[Fold, ...]":
        """norm: before it. One for the inputs of all, one for each between up and down."""
        each = self.members(1)
        ends = [(up.modules[-1], down.modules[0]) for up, down in each]
        if self.plain:
            rows = tuple(fold for pair in ends for fold in up_down_folds(self.activation, *pair))
        else:
            rows = tuple(Fold("rows", up, (down,)) for up, down in ends)
        if self.clamp is not None:  # what is added to up is not scaled with it
            rows = ()
        if norm is None:
            return rows
        reading = [up for up, _ in each]
        if self.latent_size is not None:  # the shared one alone reads what the norm gives
            reading = [*self.latent_groups(1)[:1], *reading[self.num_experts :]]
        modules = tuple(module for group in reading for module in group.modules)
        return (Fold("norm", norm, modules, self.routers), *rows)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what lies between up and down, in each kind of MLP that there is."""
        shared = () if self.shared is None else (self.shared.intermediate_size,)
        return (self.intermediate_size, *shared)

    def numbers_per_token(self, hidden_size: int) -> int:
        """What a token has between norm and sum, at most: beside 4 * hidden_size. Each expert has its own copy."""
        paths = self.top_k + (self.shared is not None)
        return paths * (3 * max(self.widths) + hidden_size) + 2 * self.num_experts


@dataclass(frozen=True, slots=True)
class MlpBesideExperts:
    """A gated MLP and experts that read the same x, each between norms of its own (Gemma 4 26B-A4B):

    y = norm(mlp(norm(x))) + norm(experts(norm(x)))

    The router reads x normed without a weight, times a scale of its own (stored [hidden]) / sqrt(hidden). The weight of
    each expert that is chosen is multiplied by a factor of its own (stored [num_experts]).
    """

    KIND: ClassVar = "mlp_beside_experts"
    mlp: GatedMlp
    experts: Experts
    norms: tuple[str, str, str, str] = (
        field(  # before and after the MLP, before and after the experts
            default=(
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm_1",
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_2",
            ),
            metadata=_DETAIL,
        )
    )
    router_scale: str = field(default="router.scale", metadata=_DETAIL)
    expert_scales: str = field(default="router.per_expert_scale", metadata=_DETAIL)

    def groups(self, hidden_size: int) -> "tuple[LinearGroup, ...]":
        return self.mlp.groups(hidden_size) + self.experts.groups(hidden_size)

    def folds(self, norm: str | None) -> "tuple[Fold, ...]":
        """norm: before it, which is in no fold: both have norms of their own. The router reads none of them."""
        before_mlp, _, before_experts, _ = self.norms
        of_all, *each = self.experts.folds(before_experts)
        of_all = replace(of_all, dense=(), read_by=self.experts.names.all)
        return (*self.mlp.folds(before_mlp), of_all, *each)

    @property
    def widths(self) -> tuple[int, ...]:
        return self.mlp.widths + self.experts.widths

    def numbers_per_token(self, hidden_size: int) -> int:
        """As of the larger, and what the first gives."""
        each = self.mlp.numbers_per_token(hidden_size), self.experts.numbers_per_token(hidden_size)
        return max(each) + hidden_size


FeedForward = GatedMlp | PlainMlp | Experts | MlpBesideExperts


def experts_of(mlp: FeedForward | None) -> Experts | None:
    """Those that a feed-forward has."""
    if isinstance(mlp, MlpBesideExperts):
        return mlp.experts
    return mlp if isinstance(mlp, Experts) else None
