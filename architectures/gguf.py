"""What a family is called in a GGUF file, and how its config.json is made from the metadata.

What llama.cpp's converter changes (convert_hf_to_gguf.py) is said here by family and undone by quant/formats/gguf.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UnsupportedError

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource(Protocol):
    """What a family reads of a GGUF file."""

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def number(self, key: str, default: Any = None) -> Any: ...

    def rows(self, name: str) -> Any: ...


GgufConfig = Callable[[GgufSource, dict[str, Any]], dict[str, Any]]  # a family's part of it


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """GGUF names of a layer's norms, its part of config.json, and what the converter did to its tensors."""

    norms: dict[str, str]  # GGUF stem -> name within the layer
    config: GgufConfig
    interleaved_heads: bool = False  # rows of q and k, weights and biases, are in llama.cpp's order
    norm_offset: float = 0.0  # norms are stored as w + this


def tidy(value: float) -> float:
    """The short decimal that a float32 in the metadata was written from (1e-05, not 9.999999747378752e-06)."""
    return float(f"{value:.6g}")


def rope_scaling(file: GgufSource, family: str) -> dict[str, Any] | None:
    """As config.json has it; None where there is none. Raises UnsupportedError for a kind that is not known."""
    prefix = f"{family}.rope.scaling"
    kind = file.metadata.get(f"{prefix}.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{file.path}: rope scaling {kind!r} is not supported (linear and yarn are)"
        )
    scaling = {"rope_type": kind, "factor": tidy(file.number(f"{prefix}.factor"))}
    if kind == "yarn":
        context = file.number(f"{prefix}.original_context_length")
        scaling["original_max_position_embeddings"] = context
    return scaling
