"""Checkpoint -> Decoder: names are looked up, projections fused, every weight prepared for its kernel, one layer at a
time, so that no more than one layer is ever held in two forms.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....architectures.base import DecoderConfig
from ....errors import CheckpointError
from ....kernels.select import Choice
from ....kernels.spec import LinearSpec
from ....quant.checkpoint import Checkpoint
from ....quant.weight import QuantizedWeight
from .decoder import Decoder, DecoderLayer
from .layers import RMSNorm, RopeTable, inverse_frequencies
from .linear import Linear


@dataclass(slots=True)
class KernelReport:
    """Which kernels the layers got, and why better ones were refused (one reason per kernel is enough to act on)."""

    used: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, spec: LinearSpec, choice: Choice) -> None:
        self.used[choice.kernel.name] += 1
        if spec.kind != "dense":
            for name, reason in choice.refused:
                self.refused.setdefault(name, reason)


@dataclass(slots=True)
class Loader:
    """Builds a Decoder from a checkpoint."""

    checkpoint: Checkpoint
    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device
    report: KernelReport = field(default_factory=KernelReport)

    def load(self, progress: Callable[[int, int], None] | None = None) -> Decoder:
        """progress(done, total) is called after every layer. Raises CheckpointError naming file and tensor."""
        config = self.config
        layers = self._layers(DecoderLayer, progress)
        embedding = self._embedding()
        return Decoder(
            config,
            embedding,
            layers,
            self._norm(f"{config.prefix}norm", config.hidden_size),
            self._lm_head(embedding),
            self._rope_tables(),
        )

    def _layers(
        self, kind: Callable[..., Any], progress: Callable[[int, int], None] | None
    ) -> list[Any]:
        """Every layer, made by `kind`, which takes what DecoderLayer takes."""
        self._check_shapes()
        layers = []
        for index in range(self.config.num_layers):
            layers.append(self._layer(f"{self.config.prefix}layers.{index}.", kind))
            if progress is not None:
                progress(index + 1, self.config.num_layers)
        return layers

    def _embedding(self) -> Tensor:
        return self.checkpoint.dense(f"{self.config.prefix}embed_tokens", self.dtype).to(
            self.device
        )

    def _layer(self, prefix: str, kind: Callable[..., Any]) -> Any:
        config = self.config
        before_attention, before_mlp = config.norm_names

        def norm(name: str, wanted: bool = True, width: int = config.hidden_size) -> Any:
            return self._norm(prefix + name, width) if wanted else None

        return kind(
            input_norm=self._norm(prefix + before_attention, config.hidden_size),
            mlp_norm=self._norm(prefix + before_mlp, config.hidden_size),
            qkv=self._linear(*(f"{prefix}self_attn.{p}_proj" for p in "qkv")),
            o=self._linear(f"{prefix}self_attn.o_proj"),
            gate_up=self._linear(f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"),
            down=self._linear(f"{prefix}mlp.down_proj"),
            q_norm=norm("self_attn.q_norm", config.qk_norm, config.head_dim),
            k_norm=norm("self_attn.k_norm", config.qk_norm, config.head_dim),
            post_attention_norm=norm("post_attention_layernorm", config.sandwich_norms),
            post_mlp_norm=norm("post_feedforward_layernorm", config.sandwich_norms),
        )

    def _linear(self, *modules: str) -> Any:
        """The modules' weights, which read the same input, side by side."""
        return self._build(
            [self._checked(m) for m in modules], [self.checkpoint.bias(m) for m in modules]
        )

    def _build(self, weights: list[QuantizedWeight | Tensor], biases: list[Tensor | None]) -> Any:
        return Linear.build(weights, biases, self.dtype, self.device, self.report.add)

    def _checked(self, module: str) -> QuantizedWeight | Tensor:
        weight = self.checkpoint.linear(module)
        shape = (
            tuple(weight.shape)
            if isinstance(weight, Tensor)
            else (weight.out_features, weight.in_features)
        )
        want = self._linear_shape(module.rpartition(".")[2])
        if shape != want:
            raise CheckpointError(
                f"has shape {shape}, config.json implies {want}",
                file=self.checkpoint.path,
                tensor=f"{module}.weight",
                fix="download the checkpoint again",
            )
        return weight

    def _linear_shape(self, name: str) -> tuple[int, int]:
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
            "lm_head": (config.vocab_size, hidden),
        }[name]

    def _check_shapes(self) -> None:
        """The tensors that need no decoding, from headers alone: a wrong file is refused in no time."""
        config = self.config
        want = {f"{config.prefix}norm.weight": (config.hidden_size,)}
        if not self.checkpoint.is_quantized(f"{config.prefix}embed_tokens"):
            want[f"{config.prefix}embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
        for name, shape in want.items():
            if self.checkpoint.shape(name) != shape:
                raise CheckpointError(
                    f"has shape {self.checkpoint.shape(name)}, config.json implies {shape}",
                    file=self.checkpoint.path,
                    tensor=name,
                    fix="download the checkpoint again",
                )

    def _norm(self, name: str, width: int) -> Any:
        weight = self._norm_weight(name, width)
        return RMSNorm(
            weight.to(self.device, weight.dtype if self.config.norm_offset else self.dtype),
            self.config.rms_norm_eps,
        )

    def _norm_weight(self, name: str, width: int) -> Tensor:
        """What a normed vector is multiplied by, float32 [width]."""
        weight = self.checkpoint.tensor(f"{name}.weight")
        if tuple(weight.shape) != (width,):
            raise CheckpointError(
                f"has shape {tuple(weight.shape)}, config.json implies ({width},)",
                file=self.checkpoint.path,
                tensor=f"{name}.weight",
                fix="download it again",
            )
        return weight.float() + 1.0 if self.config.norm_offset else weight.float()

    def _lm_head(self, embedding: Tensor) -> Any:
        """An untied head, a tied quantized one, or the embedding itself."""
        if self.checkpoint.has("lm_head.weight") or "lm_head" in self.checkpoint.modules():
            weight, bias = self._checked("lm_head"), self.checkpoint.bias("lm_head")
        else:
            tied, bias = f"{self.config.prefix}embed_tokens", None
            weight = (
                self.checkpoint.linear(tied) if self.checkpoint.is_quantized(tied) else embedding
            )
        return self._build([self._head_weight(weight)], [bias])

    def _head_weight(self, weight: QuantizedWeight | Tensor) -> QuantizedWeight | Tensor:
        return weight

    def _rope_tables(self) -> dict[str, RopeTable]:
        config = self.config
        return {
            kind: RopeTable.build(
                inverse_frequencies(config.head_dim, rope.theta, dict(rope.scaling)),
                config.max_position_embeddings,
                self.dtype,
                self.device,
            )
            for kind, rope in config.rope.items()
        }
