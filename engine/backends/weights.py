"""ModelWeights: a checkpoint's tensors as a ModelSpec names them, each checked against the shape that it implies.

Backends lay out what comes from here; none of them knows a tensor's name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...architectures.base import (
    AltUp,
    Attention,
    GatedDeltaNet,
    LatentAttention,
    LinearGroup,
    Mamba2,
    MlpBesideExperts,
    ModelSpec,
    ShortConv,
)
from ...errors import CheckpointError
from ...quant.checkpoint import Checkpoint
from ...quant.weight import QuantizedWeight, fuse, part, scaled_by_row

Weight = QuantizedWeight | Tensor
FIX = "config.json and the weights are not of one model"


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a group: weight [out, in], bias [out] or None."""

    weight: Weight
    bias: Tensor | None

    def parts(self, count: int) -> list["Linear"]:
        """Cut by outputs into so many of the same size."""
        if count == 1:
            return [self]
        weight: Weight
        if isinstance(self.weight, Tensor):
            weight, size = self.weight, len(self.weight) // count
        else:
            weight, size = scaled_by_row(self.weight), self.weight.out_features // count
        cuts = [slice(i * size, (i + 1) * size) for i in range(count)]
        return [
            Linear(part(weight, rows), None if self.bias is None else self.bias[rows])
            for rows in cuts
        ]

    def in_order(self, spans: Sequence[tuple[int, int]]) -> "Linear":
        """Rows from .. to, one span after the other; all as they are where there is none."""
        if not spans:
            return self
        rows, weight = [slice(*span) for span in spans], self.weight
        bias = None if self.bias is None else torch.cat([self.bias[each] for each in rows])
        if isinstance(weight, Tensor):
            return Linear(torch.cat([weight[each] for each in rows]), bias)
        weight = scaled_by_row(weight)
        cut = [part(weight, each) for each in rows]
        return Linear(fuse([each for each in cut if isinstance(each, QuantizedWeight)]), bias)


@dataclass(frozen=True, slots=True)
class DeltaNetWeights:
    """In float32."""

    taps: Tensor  # [conv_kernel, channels], oldest first
    rate: Tensor  # [num_value_heads]: -exp(A_log)
    dt_bias: Tensor  # [num_value_heads]
    norm: Tensor  # [value_dim]


@dataclass(frozen=True, slots=True)
class AltUpWeights:
    """Of one layer, in float32."""

    router: Tensor  # [num_streams, hidden], of normed inputs: the norm's weight is in it
    predictions: Tensor  # [num_streams (to) * num_streams (from), num_streams]
    corrections: Tensor  # [num_streams, num_streams]
    scale: Tensor | None  # [hidden] of what per-layer gates read

    def to(self, device: torch.device) -> "AltUpWeights":
        return AltUpWeights(
            self.router.to(device),
            self.predictions.to(device),
            self.corrections.to(device),
            None if self.scale is None else self.scale.to(device),
        )


@dataclass(frozen=True, slots=True)
class Mamba2Weights:
    """In float32."""

    taps: Tensor  # [conv_kernel, channels], oldest first
    bias: Tensor | None  # [channels], of the convolution
    rate: Tensor  # [num_heads]: -exp(A_log)
    dt_bias: Tensor  # [num_heads]
    skip: Tensor  # [num_heads]: D
    norm: Tensor  # [values]

    def to(self, device: torch.device) -> "Mamba2Weights":
        bias = None if self.bias is None else self.bias.to(device)
        own = (self.rate, self.dt_bias, self.skip, self.norm)
        return Mamba2Weights(self.taps.to(device), bias, *(each.to(device) for each in own))


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Reads lazily: nothing is held."""

    checkpoint: Checkpoint
    model: ModelSpec

    def check(self) -> None:
        """The tensors outside the layers, from headers alone: a wrong file is refused in no time. CheckpointError."""
        model = self.model
        self._check_shape(f"{model.prefix}{model.final_norm}.weight", (model.hidden_size,))
        table = f"{model.prefix}{model.embedding}"
        if not self.checkpoint.is_quantized(table):
            self._check_shape(f"{table}.weight", (model.vocab_size, model.hidden_size))
        if not (model.tie_word_embeddings or self._has_head):
            raise CheckpointError(
                "is missing, and config.json does not tie it to the embedding",
                file=self.checkpoint.path,
                tensor=f"{model.head}.weight",
                fix="set tie_word_embeddings if it is, or get the complete model",
            )

    def check_depth(self) -> None:
        """That the model has every layer that there are weights of: without its last ones it answers, with nonsense.
        CheckpointError."""
        pattern = re.compile(re.escape(f"{self.model.prefix}layers.") + r"(\d+)\.")
        for name in self.checkpoint.names():
            match = pattern.match(name)
            depth = self.model.num_layers + self.model.num_draft_layers
            if match is not None and int(match[1]) >= depth:
                raise CheckpointError(
                    f"is of layer {match[1]}, config.json says that there are {self.model.num_layers}, from 0 on",
                    file=self.checkpoint.path,
                    tensor=name,
                    fix=FIX,
                )

    def embedding(self, dtype: torch.dtype) -> Tensor:
        """[vocab_size, hidden_size]"""
        return self.checkpoint.dense(f"{self.model.prefix}{self.model.embedding}", dtype)

    def per_layer_embedding(self, dtype: torch.dtype) -> Tensor:
        """[vocab_size, num_layers * width] of PerLayerInputs."""
        spec, name = self.model.per_layer_inputs, f"{self.model.prefix}embed_tokens_per_layer"
        if spec is None:
            raise ValueError("a model without inputs for every layer")
        if not self.checkpoint.is_quantized(name):
            self._check_shape(
                f"{name}.weight", (spec.vocab_size, self.model.num_layers * spec.width)
            )
        return self.checkpoint.dense(name, dtype)

    def norm(self, name: str, width: int) -> Tensor:
        """What a normed vector is multiplied by, float32 [width]. name: of the module."""
        weight = self.vector(f"{name}.weight", width)
        return weight + 1.0 if self.model.norm_offset else weight

    def router(self, layer: int, name: str, rows: int) -> Tensor:
        """A matrix that no kernel multiplies by, float32 [rows, hidden_size]. name: of the module in the layer."""
        return self._matrix(f"{self.model.layer_name(layer)}.{name}", rows, self.model.hidden_size)

    def _matrix(self, module: str, rows: int, columns: int) -> Tensor:
        """float32 [rows, columns], by a module's full name."""
        if not self.checkpoint.weight_names(module):
            self._check_shape(f"{module}.weight", ())  # is missing, and says so
        weight = self.checkpoint.dense(module, torch.float32)
        if (found := tuple(weight.shape)) != (want := (rows, columns)):
            raise _wrong_shape(self.checkpoint, f"{module}.weight", found, want)
        return weight

    def router_bias(self, layer: int, name: str, rows: int) -> Tensor | None:
        """float32 [rows], where a router has one."""
        bias = f"{self.model.layer_name(layer)}.{name}.bias"
        return self.vector(bias, rows) if self.checkpoint.has(bias) else None

    def scaled_router(self, layer: int, mlp: MlpBesideExperts) -> Tensor:
        """The router of experts beside an MLP, its columns by what its inputs are multiplied by: float32 [num_experts,
        hidden_size]."""
        name, hidden = f"{self.model.layer_name(layer)}.{mlp.router_scale}", self.model.hidden_size
        router = self.router(layer, mlp.experts.names.router, mlp.experts.num_experts)
        factors: Tensor = self.vector(name, hidden) * hidden**-0.5
        return router * factors

    def correction_bias(self, layer: int, name: str, count: int) -> Tensor:
        """What is added to a router's scores to choose by, float32 [count]."""
        return self.vector(f"{self.model.layer_name(layer)}.{name}", count)

    def vector(self, name: str, width: int) -> Tensor:
        """A tensor that is no module's, float32 [width]."""
        self._check_shape(name, (width,))
        return self.checkpoint.tensor(name).float()

    def head_norms(self, layer: int, mixer: Attention) -> tuple[Tensor | None, Tensor | None]:
        """Of query and key heads, float32: [head_dim], or of all heads at once [heads * head_dim]."""
        prefix = self.model.layer_name(layer)

        def norm(name: str, heads: int) -> Tensor:
            width = mixer.head_dim * (heads if mixer.qk_norm == "all" else 1)
            return self.norm(f"{prefix}.{name}", width)

        if mixer.qk_norm is None:
            return None, None
        has_keys = mixer.kv_source is None
        if mixer.head_norms is None:
            ones = torch.ones(mixer.head_dim)
            return ones, ones if has_keys else None
        q_norm, k_norm = mixer.head_norms
        return norm(q_norm, mixer.num_heads), (
            norm(k_norm, mixer.num_kv_heads) if has_keys else None
        )

    def latent_norms(self, layer: int, mixer: LatentAttention) -> tuple[Tensor | None, Tensor]:
        """Of q_a's outputs, where there are any, and of latents, float32."""
        prefix = f"{self.model.layer_name(layer)}.self_attn"
        q_rank, name = mixer.q_rank, f"{prefix}.q_a_layernorm"
        return (
            None if q_rank is None else self.norm(name, q_rank),
            self.norm(f"{prefix}.kv_a_layernorm", mixer.kv_rank),
        )

    def kv_b(
        self, layer: int, mixer: LatentAttention, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """What makes keys and values of latents, dequantized: [num_heads, nope_dim + value_dim, kv_rank], and its bias
        [num_heads, nope_dim + value_dim]."""
        (linear,) = self.group(layer, mixer.groups(self.model.hidden_size)[-2])
        weight = linear.weight
        dense = weight if isinstance(weight, Tensor) else weight.dequantize(dtype)
        shape = mixer.num_heads, mixer.nope_dim + mixer.value_dim
        bias = None if linear.bias is None else linear.bias.view(shape)
        return dense.to(dtype).view(*shape, mixer.kv_rank), bias

    def value_heads(self, layer: int, mixer: LatentAttention) -> list[Linear]:
        """What makes values of latents, a linear [value_dim, kv_rank] for each head."""
        (linear,) = self.group(layer, mixer.groups(self.model.hidden_size)[-2])
        size = mixer.nope_dim + mixer.value_dim
        spans = [(i * size + mixer.nope_dim, (i + 1) * size) for i in range(mixer.num_heads)]
        return [linear.in_order([span]) for span in spans]

    def sinks(self, layer: int, mixer: Attention) -> Tensor | None:
        """float32 [num_heads], where the mixer has them."""
        if not mixer.sinks:
            return None
        return self.vector(f"{self.model.layer_name(layer)}.{mixer.module}.sinks", mixer.num_heads)

    def gated_delta_net(self, layer: int, mixer: GatedDeltaNet) -> "DeltaNetWeights":
        """What is no linear of such a mixer. Its norm stores the factor itself, whatever the model's others do."""
        prefix, heads = f"{self.model.layer_name(layer)}.linear_attn", mixer.num_value_heads
        return DeltaNetWeights(
            self._filters(f"{prefix}.conv1d", mixer.channels, mixer.conv_kernel),
            -self.vector(f"{prefix}.A_log", heads).exp(),
            self.vector(f"{prefix}.dt_bias", heads),
            self.vector(f"{prefix}.norm.weight", mixer.value_dim),
        )

    def short_conv(self, layer: int, mixer: ShortConv) -> tuple[Tensor, Tensor | None]:
        """Its filters, float32 [conv_kernel, channels], oldest first, and their bias [channels]."""
        name = f"{self.model.layer_name(layer)}.conv.conv"
        bias = self.vector(f"{name}.bias", mixer.channels) if mixer.bias else None
        return self._filters(name, mixer.channels, mixer.conv_kernel), bias

    def mamba2(self, layer: int, mixer: Mamba2) -> Mamba2Weights:
        """What is no linear of such a mixer. Its norm stores the factor itself, whatever the model's others do."""
        prefix, heads = f"{self.model.layer_name(layer)}.{mixer.module}", mixer.num_heads
        bias = self.vector(f"{prefix}.conv1d.bias", mixer.channels) if mixer.conv_bias else None
        return Mamba2Weights(
            self._filters(f"{prefix}.conv1d", mixer.channels, mixer.conv_kernel),
            bias,
            -self.vector(f"{prefix}.A_log", heads).exp(),
            self.vector(f"{prefix}.dt_bias", heads),
            self.vector(f"{prefix}.D", heads),
            self.vector(f"{prefix}.norm.weight", mixer.values),
        )

    def alt_up(self, layer: int, spec: AltUp) -> AltUpWeights:
        """What moves a layer's streams along."""
        prefix, hidden = f"{self.model.layer_name(layer)}.altup", self.model.hidden_size
        count, scale = spec.num_streams, None
        if spec.scaled:
            scale = self.vector(f"{prefix}.correct_output_scale", hidden)
        return AltUpWeights(
            self._matrix(f"{prefix}.modality_router", count, hidden)
            * self.norm(f"{prefix}.router_norm", hidden)
            / hidden,
            self._matrix(f"{prefix}.prediction_coefs", count * count, count),
            self._matrix(f"{prefix}.correction_coefs", count, count),
            scale,
        )

    def _filters(self, name: str, channels: int, taps: int) -> Tensor:
        """Of a convolution, one a channel: float32 [taps, channels], oldest first."""
        self._check_shape(f"{name}.weight", (channels, 1, taps))
        return self.checkpoint.tensor(f"{name}.weight").float()[:, 0].t().contiguous()

    def final_norm(self) -> Tensor:
        """float32 [hidden_size]"""
        model, offset = self.model, self.model.final_norm_offset
        weight = self.vector(f"{model.prefix}{model.final_norm}.weight", model.hidden_size)
        return weight + 1.0 if (model.norm_offset if offset is None else offset) else weight

    def group(self, layer: int, group: LinearGroup, parts: int = 1) -> list[Linear]:
        """The linears of a group of one layer, each cut into so many equal `parts` by rows."""
        linears: list[Linear] = []
        for name, out in zip(group.modules, group.out_features, strict=True):
            module = f"{self.model.layer_name(layer)}.{name}"
            weight = self._linear(module, (out, group.in_features))
            linear = Linear(weight, self.checkpoint.bias(module)).in_order(group.order)
            linears += linear.parts(parts)
        return linears

    def head(self, embedding: Tensor) -> Linear:
        """An output head of its own, a tied quantized one, or the embedding itself."""
        if self._has_head:
            shape = (self.model.vocab_size, self.model.hidden_size)
            head = self.model.head
            return Linear(self._linear(head, shape), self.checkpoint.bias(head))
        tied = f"{self.model.prefix}{self.model.embedding}"
        quantized = self.checkpoint.is_quantized(tied)
        return Linear(self.checkpoint.linear(tied) if quantized else embedding, None)

    @property
    def _has_head(self) -> bool:
        head = self.model.head
        return self.checkpoint.has(f"{head}.weight") or head in self.checkpoint.modules()

    def linear(self, module: str, out_features: int, in_features: int) -> Linear:
        """A linear that is of no group, by its full name."""
        weight = self._linear(module, (out_features, in_features))
        return Linear(weight, self.checkpoint.bias(module))

    def _linear(self, module: str, shape: tuple[int, int]) -> Weight:
        return checked_linear(self.checkpoint, module, shape)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        check_shape(self.checkpoint, name, shape)


def checked_linear(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Weight:
    """A linear's weight [out, in]. CheckpointError if it is missing or not of this shape."""
    if not checkpoint.weight_names(module):
        check_shape(checkpoint, f"{module}.weight", shape)  # is missing, and says so
    weight = checkpoint.linear(module)
    matrix = weight if isinstance(weight, Tensor) else weight.codes
    if (found := tuple(matrix.shape)) != shape:
        raise _wrong_shape(checkpoint, f"{module}.weight", found, shape)
    return weight


def check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """CheckpointError if a tensor is missing or not of this shape."""
    if not checkpoint.has(name):
        raise CheckpointError("is missing", file=checkpoint.path, tensor=name, fix=FIX)
    if (found := tuple(checkpoint.shape(name))) != shape:
        raise _wrong_shape(checkpoint, name, found, shape)


def _wrong_shape(
    checkpoint: Checkpoint, name: str, found: tuple[int, ...], want: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"has shape {found}, config.json implies {want}",
        file=checkpoint.path,
        tensor=name,
        fix=FIX,
    )
