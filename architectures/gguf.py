"""What a family is called in a GGUF file, and how its config.json is made from the metadata.

What llama.cpp's converter changes (convert_hf_to_gguf.py) is said here by family and undone by quant/formats/gguf.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Of mixtures of experts. A stack of matrices [experts, out, in] (biases [experts, out]) is one or more linears of each.
STACKS = {
    "ffn_gate_exps": ("mlp.experts.*.gate_proj",),
    "ffn_up_exps": ("mlp.experts.*.up_proj",),
    "ffn_gate_up_exps": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    "ffn_down_exps": ("mlp.experts.*.down_proj",),
}
ROUTER = {"ffn_gate_inp": "mlp.gate"}
SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
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
    """GGUF names of what a layer has beside LINEARS, its part of config.json, what the converter did to its tensors."""

    modules: dict[str, str]  # GGUF stem -> module's name within the layer
    config: GgufConfig
    tensors: dict[str, str] = field(default_factory=dict)  # of no module: GGUF name -> name
    has_experts: bool = False
    value_heads: bool = False  # those of a gated delta rule are in llama.cpp's order
    interleaved_heads: bool = False  # rows of q and k, weights and biases, are in llama.cpp's order
    norm_offset: float = 0.0  # norms are stored as w + this, but for that of a gated delta rule


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


def gguf_experts(file: GgufSource, family: str) -> dict[str, Any]:
    """What config.json says of experts."""
    width = f"{family}.expert_feed_forward_length"
    return {
        "num_experts": file.number(f"{family}.expert_count"),
        "num_experts_per_tok": file.number(f"{family}.expert_used_count"),
        **({"moe_intermediate_size": file.number(width)} if width in file.metadata else {}),
    }
