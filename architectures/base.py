"""What a decoder is, as data: a family's file turns config.json into a ModelSpec, backends compute it, the conversion
reads its groups and folds.

    ModelSpec -> LayerSpec, one a layer -> a mixer (Attention, LatentAttention, GatedDeltaNet, Mamba2, ShortConv) and a
                 feed-forward (GatedMlp, PlainMlp, Experts, MlpBesideExperts), norms around; some have one of the two

    x -> (norm) -> mixer -> (norm) -> + x -> (norm) -> feed-forward -> (norm) -> + x

A field without a default is a size or a number, which every backend must use. A field with one is a feature wherever it
differs from its default, and so is every kind and every choice: `features` names them, and a backend refuses what it
does not list (engine/backends). So what is added here is refused everywhere until a backend says that it computes it.
"""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from .alt_up import AltUp as AltUp
from .alt_up import Laurel as Laurel
from .feed_forward import ExpertNames as ExpertNames
from .feed_forward import Experts as Experts
from .feed_forward import FeedForward as FeedForward
from .feed_forward import MlpBesideExperts as MlpBesideExperts
from .feed_forward import SharedExpert as SharedExpert
from .feed_forward import experts_of as experts_of
from .latent import LatentAttention as LatentAttention
from .linears import Fold as Fold
from .linears import LinearGroup as LinearGroup
from .mlps import FUSED as FUSED
from .mlps import Activation as Activation
from .mlps import GatedMlp as GatedMlp
from .mlps import PlainMlp as PlainMlp
from .norms import NORMS_AFTER as NORMS_AFTER
from .norms import SANDWICH as SANDWICH
from .norms import Norms as Norms
from .recurrent import GatedDeltaNet as GatedDeltaNet
from .recurrent import Mamba2 as Mamba2
from .recurrent import ShortConv as ShortConv
from .rope import LongFactors as LongFactors
from .rope import Rope as Rope
from .rope import switch_of

_DETAIL = {"role": "detail"}  # of what another field names, or of the checkpoint: no feature


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
    # what the heads give is multiplied by sigmoid(gate): q_proj gives [query | gate] of each head, or gate_proj, which
    # reads what q_proj reads, those of all
    output_gate: Literal["q_proj", "gate_proj"] | None = None
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
    head_norms: tuple[str, str] | None = field(  # None: without weights
        default=("self_attn.q_norm", "self_attn.k_norm"), metadata=_DETAIL
    )

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: it has keys and values instead."""
        return ()

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """(vectors, dimensions) in the cache for each token: its keys, its values."""
        return () if self.kv_source is not None else ((self.num_kv_heads, self.head_dim),) * 2

    @property
    def rotation(self) -> tuple[Rope | None, int]:
        """And how many dimensions it is meant for."""
        return self.rope, self.head_dim

    def groups(self, hidden_size: int) -> "tuple[LinearGroup, ...]":
        """q, k, v as far as there are, gate; gates of heads, if they have them; o."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        own = "q" if self.kv_source is not None else "qk" if self.keys_are_values else "qkv"
        names = tuple(f"{self.module}.{name}_proj" for name in own)
        doubled = 2 if self.output_gate == "q_proj" else 1
        sizes: tuple[int, ...] = (queries * doubled, keys, keys)[: len(own)]
        if self.fused:
            names, sizes = (f"{self.module}.qkv_proj",), (sum(sizes),)
        if self.output_gate == "gate_proj":
            names, sizes = (*names, f"{self.module}.gate_proj"), (*sizes, queries)
        gates = LinearGroup((self.gate,), (self.num_heads,), hidden_size, "column", dense=True)
        return (
            LinearGroup(names, sizes, hidden_size, "column"),
            *([gates] if self.head_gate else []),
            LinearGroup((self.out,), (hidden_size,), queries, "row"),
        )

    def folds(self, norm: str | None) -> "tuple[Fold, ...]":
        """norm: before it. A gate on what heads give changes nothing here, a norm of values does."""
        qkv, *gates, out = self.groups(1)
        gated = self.output_gate == "gate_proj"
        heads = Fold("heads", qkv.modules[-2 if gated else -1], out.modules)
        has_values = self.kv_source is None and not self.keys_are_values and not self.v_norm
        dense = tuple(name for group in gates for name in group.modules)
        before = () if norm is None else (Fold("norm", norm, qkv.modules, dense),)
        return (*before, heads) if has_values else before


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """What every layer is told of the token once more, behind its feed-forward (Gemma 3n and 4):

    x += norm(projection(activation(gate(x)) * input)),
    input = (norm(projection of the embedding) + own embedding) / sqrt(2)

    Tokens beyond vocab_size have the own embedding of token 0.
    """

    KIND: ClassVar = "per_layer_inputs"
    width: int  # of a layer's input
    vocab_size: int
    activation: Activation


Mixer = Attention | LatentAttention | GatedDeltaNet | Mamba2 | ShortConv


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. Without a mixer, or without a feed-forward, it has none of the norms around that either."""

    KIND: ClassVar = "layer"
    mixer: Mixer | None
    mlp: FeedForward | None
    norms: Norms = field(default=Norms())
    scalar: bool = False  # what leaves the layer is multiplied by its stored layer_scalar
    laurel: Laurel | None = None  # around the mixer, which must be there

    def __post_init__(self) -> None:
        if self.laurel is not None and self.mixer is None:
            raise ValueError("a way around a mixer that is not there")

    def folds(self, hidden_size: int) -> tuple[Fold, ...]:
        """In the order in which the layer computes: no linear consumes two."""
        before = None if self.laurel else self.norms.before_mixer  # which adds what it gives
        mixer = () if self.mixer is None else self.mixer.folds(before)
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
    final_norm_offset: bool | None = None  # the same of the final norm; None: as the others
    after_norm_eps: float | None = None  # of norms after mixers and feed-forwards; None: norm_eps
    embedding_norm: bool = False  # what is embedded is normed, without a weight
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what mixers and feed-forwards add
    logits_scale: float = 1.0  # before the soft cap
    final_soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    per_layer_inputs: PerLayerInputs | None = None
    alt_up: AltUp | None = None
    prefix: str = field(default="model.", metadata=_DETAIL)  # of the checkpoint's tensor names
    embedding: str = field(default="embed_tokens", metadata=_DETAIL)
    final_norm: str = field(default="norm", metadata=_DETAIL)
    head: str = field(default="lm_head", metadata=_DETAIL)  # the output head's module
    # saved without an output head, as models are that embed: the one that is computed is the embedding
    headless: bool = field(default=False, metadata=_DETAIL)
    # layers that follow in the checkpoint and draft tokens: neither computed nor converted
    num_draft_layers: int = field(default=0, metadata=_DETAIL)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> dict[int, Attention]:
        """The mixers of the layers that attend, but for latent attention."""
        return {i: m for i, x in enumerate(self.layers) if isinstance(m := x.mixer, Attention)}

    @property
    def cached(self) -> dict[int, Attention | LatentAttention]:
        """The mixers of the layers that see tokens in a cache."""
        kinds = Attention, LatentAttention
        return {i: m for i, x in enumerate(self.layers) if isinstance(m := x.mixer, kinds)}

    @property
    def windows(self) -> dict[int, int | None]:
        """For each layer that sees tokens in a cache, how many of the last ones it sees, or another that reads the
        same; None: all."""
        sources = {index: getattr(m, "kv_source", None) for index, m in self.cached.items()}
        seen: dict[int, list[int | None]] = {}
        for index, mixer in self.cached.items():
            source = sources[index]
            own = seen.setdefault(index if source is None else source, [])
            own.append(getattr(mixer, "window", None))
        widest = {i: None if None in own else max(filter(None, own)) for i, own in seen.items()}
        return {i: widest[i if source is None else source] for i, source in sources.items()}

    @property
    def rope_switch(self) -> int | None:
        """Tokens of a request beyond which its ropes have their long factors; None: they have none."""
        return switch_of(mixer.rope for mixer in self.cached.values())

    def layer_name(self, index: int) -> str:
        """Of a layer's module in the checkpoint."""
        return f"{self.prefix}layers.{index}"

    @property
    def routers(self) -> tuple[str, ...]:
        """Modules of all layers that decide how much of which expert is added."""
        return tuple(
            f"{self.layer_name(index)}.{name}"
            for index, layer in enumerate(self.layers)
            if (experts := experts_of(layer.mlp)) is not None
            for name in experts.routers
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
