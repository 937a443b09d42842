"""What each architecture's layers are called, and which may be scaled together. Data, not code.

A decoder block is a list of stages in the order in which they run; the linears of a stage read the same input. A fold
moves a factor per channel from the input side of some linears into what produces that input, which changes no output:

    norm   y = norm(x) * w      w / s,  linear columns * s        (w + 1 where the norm stores an offset)
    rows   up_proj -> down_proj  producer rows / s, consumer columns * s: only where what lies between is elementwise
                                 and linear in the producer (the gate of a gated MLP is not the producer)
    heads  v_proj -> o_proj      as rows; every query head that reads a kv channel shares its factor, so it is exact
                                 under grouped-query attention too (softmax weights mix positions, never channels)

q_norm/k_norm act after q_proj and k_proj, so folding into the norm before them stays exact.
"""

from dataclasses import dataclass
from typing import Literal

from ..errors import UnsupportedError

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)


@dataclass(frozen=True, slots=True)
class Fold:
    """source may be divided per output channel if the columns of consumers are multiplied."""

    kind: Literal["norm", "rows", "heads"]
    source: str
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The parts of a decoder block, by names relative to `blocks.{i}.`"""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    scaled_embedding: bool = (
        False  # embeddings are multiplied by sqrt(hidden_size), rounded to the model's dtype
    )
    norm_offset: float = 0.0  # norms multiply by weight + norm_offset
    stages: tuple[tuple[str, ...], ...] = (QKV, OUT, GATE_UP, DOWN)
    folds: tuple[Fold, ...] = (
        Fold("norm", "input_layernorm", QKV),
        Fold("heads", "self_attn.v_proj", OUT),
        Fold("norm", "post_attention_layernorm", GATE_UP),
        Fold("rows", "mlp.up_proj", DOWN),
    )


GEMMA3 = LayerMap(
    scaled_embedding=True,
    norm_offset=1.0,
    folds=(
        Fold("norm", "input_layernorm", QKV),
        Fold("heads", "self_attn.v_proj", OUT),
        Fold("norm", "pre_feedforward_layernorm", GATE_UP),
        Fold("rows", "mlp.up_proj", DOWN),
    ),
)

LAYER_MAPS: dict[str, LayerMap] = {
    "llama": LayerMap(),
    "mistral": LayerMap(),
    "qwen2": LayerMap(),
    "qwen3": LayerMap(),
    "gemma3_text": GEMMA3,
}


def layer_map(model_type: object) -> LayerMap:
    """Of config.json's model_type. Raises UnsupportedError for an architecture that is not in the table."""
    if not isinstance(model_type, str) or model_type not in LAYER_MAPS:
        raise UnsupportedError(
            f"model_type {model_type!r} cannot be converted yet (known: "
            f"{', '.join(sorted(LAYER_MAPS))}; add a line to architectures/layer_map.py)"
        )
    return LAYER_MAPS[model_type]
