"""What a decoder is, as data: a family's file turns config.json into a ModelSpec, backends compute it, the conversion
reads its groups and folds.

    ModelSpec -> LayerSpec, one a layer -> a mixer (Attention, GatedDeltaNet, Mamba2, ShortConv) and a feed-forward
                 (GatedMlp, PlainMlp, Experts), with norms around; some have one of the two

    x -> (norm) -> mixer -> (norm) -> + x -> (norm) -> feed-forward -> (norm) -> + x

A field without a default is a size or a number, which every backend must use. A field with one is a feature wherever it
differs from its default, and so is every kind and every choice: `features` names them, and a backend refuses what it
does not list (engine/backends). So what is added here is refused everywhere until a backend says that it computes it.
"""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from .linears import Fold as Fold
from .linears import LinearGroup as LinearGroup
from .mlps import FUSED as FUSED
from .mlps import Activation as Activation
from .mlps import GatedMlp as GatedMlp
from .mlps import PlainMlp as PlainMlp
from .mlps import up_down_folds
from .norms import NORMS_AFTER as NORMS_AFTER
from .norms import SANDWICH as SANDWICH
from .norms import Norms as Norms
from .recurrent import GatedDeltaNet as GatedDeltaNet
from .recurrent import Mamba2 as Mamba2
from .recurrent import ShortConv as ShortConv

_DETAIL = {"role": "detail"}  # of what another field names, or of the checkpoint: no feature


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: halves (i, i + dim/2) of the rotated part of a head pair up, as Hugging Face
    checkpoints have it."""

    KIND: ClassVar = "rope"
    theta: float
    scaling: str = "default"  # rope_type in config.json
    parameters: tuple[tuple[str, float], ...] = field(
        default=(), metadata=_DETAIL
    )  # of the scaling
    dim: int | None = None  # dimensions of a head that turn, the first; None: all
    attention_factor: float = 1.0  # of cosines and sines


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention over everything before a token, or over a window of it."""

    KIND: ClassVar = "attention"
    as_stored: ClassVar = ()  # tensors that a conversion leaves in the dtype that they have
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of queries times keys
    rope: Rope | None  # None: positions are not encoded
    window: int | None = None  # positions seen, the own included; None: all
    # RMSNorm of queries and keys before the rotation: of every head, or of all heads side by side
    qk_norm: Literal["head", "all"] | None = None
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    sinks: bool = False  # a learned logit per head that takes part in the softmax and adds no value
    # q_proj gives [query | gate] of each head; what a head gives is multiplied by sigmoid(gate)
    output_gate: bool = False
    head_gate: bool = False  # what a head gives is multiplied by sigmoid of its row of `gate` of h
    # (beta, length): queries are multiplied by 1 + beta * log(1 + position // length)
    query_scaling: tuple[float, int] | None = None
    v_norm: bool = False  # RMSNorm of every value head, without a weight
    # no v_proj: values are what k_proj gives, before k_norm and rotation
    keys_are_values: bool = False
    kv_source: int | None = None  # the layer whose keys and values it reads, having none of its own
    fused: bool = field(default=False, metadata=_DETAIL)  # q, k and v are rows of one qkv_proj
    module: str = field(default="self_attn", metadata=_DETAIL)  # of all but what is named here:
    gate: str = field(default="self_attn.gate_proj", metadata=_DETAIL)
    out: str = field(default="self_attn.o_proj", metadata=_DETAIL)
    head_norms: tuple[str, str] = field(
        default=("self_attn.q_norm", "self_attn.k_norm"), metadata=_DETAIL
    )

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: it has keys and values instead."""
        return ()

    def groups(self, hidden_size: int) -> "tuple[LinearGroup, ...]":
        """q, k, v as far as there are; gates, if heads have them; o."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        own = "q" if self.kv_source is not None else "qk" if self.keys_are_values else "qkv"
        names = tuple(f"{self.module}.{name}_proj" for name in own)
        sizes: tuple[int, ...] = (queries * (2 if self.output_gate else 1), keys, keys)[: len(own)]
        if self.fused:
            names, sizes = (f"{self.module}.qkv_proj",), (sum(sizes),)
        gates = LinearGroup((self.gate,), (self.num_heads,), hidden_size, "column", dense=True)
        return (
            LinearGroup(names, sizes, hidden_size, "column"),
            *([gates] if self.head_gate else []),
            LinearGroup((self.out,), (hidden_size,), queries, "row"),
        )

    def folds(self, norm: str | None) -> "tuple[Fold, ...]":
        """norm: before it. A gate on what heads give changes nothing here, a norm of values does."""
        qkv, *gates, out = self.groups(1)
        heads = Fold("heads", qkv.modules[-1], out.modules)
        has_values = self.kv_source is None and not self.keys_are_values and not self.v_norm
        dense = tuple(name for group in gates for name in group.modules)
        before = () if norm is None else (Fold("norm", norm, qkv.modules, dense),)
        return (*before, heads) if has_values else before


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
    # (groups, best): consecutive experts form groups; only those in the groups whose two best sum highest are chosen
    limited_groups: tuple[int, int] | None = None
    shared: SharedExpert | None = None
    # (alpha, limit): instead of activation(gate) * up, (u + 1) * g * sigmoid(alpha * g) with g = min(gate, limit) and
    # u = up within +-limit
    clamp: tuple[float, float] | None = None
    plain: bool = (
        False  # experts have no gates: PlainMlp's instead of GatedMlp's, the shared one too
    )
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
        shared = kind(inner, self.activation, modules)
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


FeedForward = GatedMlp | PlainMlp | Experts


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """What every layer is told of the token once more, behind its feed-forward (Gemma 3n and 4):

    x += norm(projection(activation(gate(x)) * input)),
    input = (norm(projection of the embedding) + own embedding) / sqrt(2)
    """

    KIND: ClassVar = "per_layer_inputs"
    width: int  # of a layer's input
    vocab_size: int
    activation: Activation


Mixer = Attention | GatedDeltaNet | Mamba2 | ShortConv


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. Without a mixer, or without a feed-forward, it has none of the norms around that either."""

    KIND: ClassVar = "layer"
    mixer: Mixer | None
    mlp: FeedForward | None
    norms: Norms = field(default=Norms())
    scalar: bool = False  # what leaves the layer is multiplied by its stored layer_scalar

    def folds(self, hidden_size: int) -> tuple[Fold, ...]:
        """In the order in which the layer computes: no linear consumes two."""
        mixer = () if self.mixer is None else self.mixer.folds(self.norms.before_mixer)
        return mixer if self.mlp is None else (*mixer, *self.mlp.folds(self.norms.before_mlp))

    def groups(self, hidden_size: int) -> tuple[LinearGroup, ...]:
        """In the same order."""
        mixer = () if self.mixer is None else self.mixer.groups(hidden_size)
        return mixer if self.mlp is None else mixer + self.mlp.groups(hidden_size)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what its mixer carries from token to token."""
        return () if self.mixer is None else self.mixer.state_shapes

    @property
    def as_stored(self) -> tuple[str, ...]:
        """Tensors that a conversion leaves in the dtype that they have."""
        return () if self.mixer is None else self.mixer.as_stored


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A causal language model: an embedding, layers, a norm, an output head."""

    KIND: ClassVar = "model"
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    tie_word_embeddings: bool  # the output head is the embedding
    norm_offset: bool = False  # the stored norm weight is w, the factor 1 + w
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what mixers and feed-forwards add
    logits_scale: float = 1.0  # before the soft cap
    final_soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    per_layer_inputs: PerLayerInputs | None = None
    prefix: str = field(default="model.", metadata=_DETAIL)  # of the checkpoint's tensor names
    embedding: str = field(default="embed_tokens", metadata=_DETAIL)
    final_norm: str = field(default="norm", metadata=_DETAIL)
    head: str = field(default="lm_head", metadata=_DETAIL)  # the output head's module

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> dict[int, Attention]:
        """The mixers of the layers that attend."""
        return {i: m for i, x in enumerate(self.layers) if isinstance(m := x.mixer, Attention)}

    def layer_name(self, index: int) -> str:
        """Of a layer's module in the checkpoint."""
        return f"{self.prefix}layers.{index}"

    @property
    def routers(self) -> tuple[str, ...]:
        """Modules of all layers that decide how much of which expert is added."""
        return tuple(
            f"{self.layer_name(index)}.{name}"
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mlp, Experts)
            for name in layer.mlp.routers
        )

    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        """Of one layer, in the order in which it computes."""
        return self.layers[index].groups(self.hidden_size)

    def folds(self, index: int) -> tuple[Fold, ...]:
        return self.layers[index].folds(self.hidden_size)

    def dense_modules(self) -> tuple[str, ...]:
        """Full names of the layers' modules that are never quantized."""
        linears = tuple(
            f"{self.layer_name(index)}.{name}"
            for index in range(self.num_layers)
            for group in self.groups(index)
            if group.dense
            for name in group.modules
        )
        return (*linears, *self.routers)


def features(part: Any) -> frozenset[str]:
    """What a ModelSpec (without its layers), a LayerSpec or a part of one asks for: its kinds ("attention"), its
    choices ("gated_mlp.activation=silu"), and every field that differs from its default ("attention.window")."""
    found = {part.KIND}
    for each in fields(part):
        value, role = getattr(part, each.name), each.metadata.get("role")
        name = f"{part.KIND}.{each.name}"
        if role == "detail" or each.name == "layers":
            continue
        if is_dataclass(value):
            found |= features(value)
        elif role == "module":
            if (value is None) != (each.default is None):
                found.add(name if value is not None else f"{name}=None")
        elif isinstance(value, str) or (value is None and each.default is MISSING):
            found.add(f"{name}={value}")
        elif each.default is not MISSING and value != each.default:
            found.add(name)
    return frozenset(found)
