"""QuantScheme: how a checkpoint is quantized, the only reader and writer of `quantization_config`.

A scheme is frozen and complete: a LayerScheme for a typical layer, overrides by module name, and the modules that stay
dense. `from_config` understands every spelling on disk (`quant_method` awq, gptq, fp8, compressed-tensors, and the
older side files quantize_config.json / quant_config.json, passed in as the same dict); `to_config` writes the spelling
that transformers and vLLM read.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["awq", "gptq", "fp8", "compressed-tensors", "gguf"]


@dataclass(frozen=True, slots=True)
class LayerScheme:
    """How one linear layer is quantized."""

    kind: Literal["int", "fp8"]
    bits: int
    group_size: int  # input columns per scale; -1: the whole row
    symmetric: bool
    desc_act: bool = False
    block: tuple[int, int] | None = None  # FP8 block scales, e.g. (128, 128); None: see strategy
    strategy: Literal["tensor", "channel", "group", "block"] = "group"
    act_quant: Literal["none", "token", "group", "tensor"] = "none"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How one checkpoint is quantized."""

    method: Method
    format: str  # awq: "gemm"; gptq: "gptq" (v1) or "gptq_v2"; compressed-tensors: "pack-quantized", ...
    default: LayerScheme | None
    overrides: tuple[tuple[str, LayerScheme | None], ...] = ()  # (regex on the module name, scheme); None: dense
    ignore: tuple[str, ...] = ()  # module names, or "re:..." patterns, that stay dense
    lm_head: bool = False
    raw: dict[str, Any] = field(default_factory=dict, compare=False)  # as read; for the model card

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantScheme":
        raise NotImplementedError

    def layer(self, module: str) -> LayerScheme | None:
        return self.default

    def describe(self) -> str:
        return f"{self.method} {self.format}"
