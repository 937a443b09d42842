"""Feed-forwards as data: the kinds that a LayerSpec has, beside those of base.py's mixers."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from .linears import Fold, LinearGroup

_DETAIL = {"role": "detail"}  # see base.py


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x))."""

    KIND: ClassVar = "gated_mlp"
    intermediate_size: int
    activation: Literal["silu", "gelu_tanh"]
    fused: bool = field(default=False, metadata=_DETAIL)  # gate and up are rows of one gate_up_proj
    names: tuple[str, str, str] = field(  # gate, up, down
        default=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), metadata=_DETAIL
    )

    def groups(self, hidden_size: int) -> "tuple[LinearGroup, LinearGroup]":
        """gate, up; down."""
        inner = self.intermediate_size
        names: tuple[str, ...] = self.names[:2]
        sizes: tuple[int, ...] = (inner, inner)
        if self.fused:
            names, sizes = ("mlp.gate_up_proj",), (2 * inner,)
        return (
            LinearGroup(names, sizes, hidden_size, "column"),
            LinearGroup(self.names[2:], (hidden_size,), inner, "row"),
        )

    def folds(self, norm: str | None) -> "tuple[Fold, ...]":
        """norm: before it."""
        gate_up, down = self.groups(1)
        rows = Fold("rows", gate_up.modules[-1], down.modules)
        return (rows,) if norm is None else (Fold("norm", norm, gate_up.modules), rows)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what lies between up and down, in each kind of MLP that there is."""
        return (self.intermediate_size,)

    def numbers_per_token(self, hidden_size: int) -> int:
        """What a token has between norm and sum, at most: beside 4 * hidden_size."""
        return 3 * self.intermediate_size


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """A gated MLP beside the experts, which every token goes through."""

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
    shared: str = "mlp.shared_expert"  # of its gate_proj, up_proj, down_proj
    shared_gate: str = "mlp.shared_expert_gate"

    @property
    def all(self) -> str:
        """The module that holds them."""
        return self.gate.partition(".*.")[0]


@dataclass(frozen=True, slots=True)
class Experts:
    """Many gated MLPs, of which each token goes through a few: a router scores them all, the top_k are added weighted.

    scores = softmax or sigmoid of router(x)
    chosen = the top_k of scores (+ correction bias), within the best of the groups
    y = sum over chosen of weight * expert(x) (+ shared expert(x)), weight = routed_scale * score (/ their sum)
    """

    KIND: ClassVar = "experts"
    num_experts: int
    top_k: int
    intermediate_size: int  # of each expert
    activation: Literal["silu", "gelu_tanh"]
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
    names: ExpertNames = field(default=ExpertNames(), metadata=_DETAIL)

    def groups(self, hidden_size: int) -> "tuple[LinearGroup, ...]":
        """gate, up of every expert; gate, up of the shared one; down of every expert; of the shared one."""
        inner, count, names = self.intermediate_size, self.num_experts, self.names
        gate_up = (names.gate, names.up), (inner, inner), hidden_size
        found = [LinearGroup(*gate_up, "column", count)]
        down = [LinearGroup((names.down,), (hidden_size,), inner, "row", count)]
        if self.shared is not None:
            inner = self.shared.intermediate_size
            modules = tuple(f"{names.shared}.{name}_proj" for name in ("gate", "up"))
            found.append(LinearGroup(modules, (inner, inner), hidden_size, "column"))
            modules = (f"{names.shared}.down_proj",)
            down.append(LinearGroup(modules, (hidden_size,), inner, "row"))
        return (*found, *down)

    @property
    def routers(self) -> tuple[str, ...]:
        """Modules that decide how much of what is added: they stay in 16 bits when all else is quantized."""
        gated = self.shared is not None and self.shared.gated
        return (self.names.router, self.names.shared_gate) if gated else (self.names.router,)

    def members(self, hidden_size: int) -> "list[tuple[LinearGroup, LinearGroup]]":
        """gate, up and down of each expert, the shared one last."""
        each = [member for group in self.groups(hidden_size) for member in group.members()]
        half = len(each) // 2
        return list(zip(each[:half], each[half:], strict=True))

    def folds(self, norm: str | None) -> "tuple[Fold, ...]":
        """norm: before it. One for the inputs of all, one for each between up and down."""
        each = self.members(1)
        rows = tuple(Fold("rows", gate_up.modules[-1], down.modules) for gate_up, down in each)
        if self.clamp is not None:  # what is added to up is not scaled with it
            rows = ()
        if norm is None:
            return rows
        read = tuple(module for gate_up, _ in each for module in gate_up.modules)
        return (Fold("norm", norm, read, self.routers), *rows)

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


FeedForward = GatedMlp | Experts | MlpBesideExperts


def experts_of(mlp: FeedForward) -> Experts | None:
    """Those that a feed-forward has."""
    return (
        mlp.experts
        if isinstance(mlp, MlpBesideExperts)
        else mlp
        if isinstance(mlp, Experts)
        else None
    )
