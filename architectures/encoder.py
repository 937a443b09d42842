"""What an encoder is, as data: a family's file turns config.json into an EncoderSpec, engine/encoders computes it.

    tokens -> word (+ position) (+ token type) -> norm -> layers -> (norm) -> hidden states -> pooled, or the classifier

    a layer, norms after (BERT)          x = norm(x + out(attention(qkv(x))));  x = norm(x + down(activation(up(x))))
    a layer, norms first (ModernBERT)    x = x + out(attention(qkv(norm(x))));  x = x + down(...(up(norm(x))))

Every token sees every other one, or those of a window on both sides of it. A gated feed-forward's `up` gives what is
activated and then what that is multiplied by.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError, UnsupportedError
from .config import Config
from .linears import LinearGroup
from .rope import Rope

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """Modules: of embeddings and the final norm behind the model's prefix, the others within a layer."""

    word: str
    position: str
    token_type: str
    embedding_norm: str
    layer: str  # "{}" stands for its index
    qkv: tuple[str, ...]  # one that has the rows of all three, or three
    out: str
    up: tuple[
        str, ...
    ]  # of a gated feed-forward: one, or what is activated and what that is multiplied by
    down: str
    attention_norm: str
    mlp_norm: str
    final_norm: str | None = None
    relative: str | None = None  # a table of biases, one for each bucket of distances and head


@dataclass(frozen=True, slots=True)
class Classifier:
    """The head of a cross-encoder: score(out(norm(activation(dense(pooled))))). Full names of modules."""

    num_labels: int
    pooling: Literal["cls", "mean"]
    dense: str
    activation: Activation
    out: str
    norm: str | None = None
    score: Literal["sigmoid", "identity"] = "sigmoid"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A text encoder. Norms are LayerNorms, with a bias where the checkpoint has one; so are the linears' biases."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_tokens: int  # of a text
    norm_eps: float
    activation: Activation
    names: EncoderNames
    prefix: str  # of tensor names
    gated: bool = False
    norms_first: bool = (
        False  # the first layer has none before its attention: its input is normed already
    )
    position_offset: int | None = (
        0  # row of the first token in the table of positions; None: there is no table
    )
    token_types: int = 0  # rows of their table; 0: there is none
    relative_buckets: int = 0  # of distances, each with a bias; 0: there are none
    ropes: tuple[Rope, ...] = ()  # one a layer, or none
    windows: tuple[
        int | None, ...
    ] = ()  # one a layer: tokens seen on either side of a token; None: all
    classifier: Classifier | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {self.hidden_size} dimensions")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def groups(self) -> tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]:
        """qkv, out, up, down: of every layer."""
        names, hidden = self.names, self.hidden_size
        inner = self.intermediate_size * (2 if self.gated else 1)
        qkv, up = len(names.qkv), len(names.up)
        return (
            LinearGroup(names.qkv, (3 * hidden // qkv,) * qkv, hidden, "column"),
            LinearGroup((names.out,), (hidden,), hidden, "row"),
            LinearGroup(names.up, (inner // up,) * up, hidden, "column"),
            LinearGroup((names.down,), (hidden,), self.intermediate_size, "row"),
        )

    def layer_name(self, index: int) -> str:
        return self.prefix + self.names.layer.format(index)


def activation(config: Config, name: str = "hidden_act") -> Activation:
    found = config.get(name, "gelu")
    if not isinstance(found, str) or found not in _ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: {name} {found!r} is not supported ({', '.join(_ACTIVATIONS)} are)"
        )
    return _ACTIVATIONS[found]


def prefix_in(names: Collection[str], prefix: str) -> str:
    """What tensor names begin with: a model saved without a head has its own names bare."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


def num_labels(config: Config) -> int:
    """As transformers reads it: id2label has one entry a label, and two are what a file means that says nothing."""
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.size("num_labels", 2)
    if count != 1:
        raise UnsupportedError(
            f"config.json: a classifier of {count} labels; what gives scores has one (num_labels 1)"
        )
    return count


def score_activation(config: Config) -> Literal["sigmoid", "identity"]:
    """What a cross-encoder does with its logit, which sentence-transformers keeps as the name of torch's module."""
    own = config.get("sentence_transformers", {})
    found = own.get("activation_fn") if isinstance(own, dict) else None
    found = found or config.get("sbert_ce_default_activation_function")
    name = str(found or "torch.nn.Sigmoid").rpartition(".")[2]
    if name == "Sigmoid":
        return "sigmoid"
    if name == "Identity":
        return "identity"
    raise UnsupportedError(
        f"config.json: activation_fn {str(found)!r} is not supported (Sigmoid and Identity are)"
    )


def last_row(config: Config, offset: int) -> int:
    """Tokens that a table of positions has room for, whose first `offset` rows are of none."""
    rows = config.size("max_position_embeddings", 512)
    if rows <= offset:
        raise CheckpointError(
            f"config.json: max_position_embeddings is {rows}, want more than {offset}"
        )
    return rows - offset
