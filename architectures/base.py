"""What a decoder is, as data: where the architectures of the family differ."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    theta: float
    scaling: tuple[tuple[str, object], ...] = ()  # the checkpoint's rope_scaling, frozen


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Where the architectures of the family differ. Built by `models/registry.py` from config.json."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: dict[str, RopeConfig]  # by layer type
    layer_types: tuple[str, ...]  # "full_attention" or "sliding_attention", one per layer
    sliding_window: int | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None  # None: head_dim ** -0.5
    norm_offset: bool = False  # Gemma: the stored norm weight is w, the factor 1 + w
    qk_norm: bool = False  # RMSNorm of every query and key head
    sandwich_norms: bool = False  # Gemma: norms after attention and after the MLP too
    embedding_scale: float = 1.0
    norm_names: tuple[str, str] = (
        "input_layernorm",
        "post_attention_layernorm",
    )  # before attention, before the MLP
    prefix: str = "model."  # of the checkpoint's tensor names

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None
