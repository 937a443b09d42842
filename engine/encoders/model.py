"""An encoder's forward pass: rows of tokens in, rows of hidden states out; and the head of a cross-encoder.

All of it is one function of an EncoderSpec (architectures/encoder.py draws the two kinds of layer). Rows of different
texts meet in attention alone, and there each text sees itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...architectures.base import Rope
from ...architectures.encoder import EncoderSpec
from ..backends.torch.layers import RopeTable, apply_rope
from .attention import Masks, attend
from .batch import EncoderBatch
from .linears import ACTIVATIONS, Apply, LinearBuilder
from .weights import EncoderWeights


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    qkv: Apply
    out: Apply
    up: Apply
    down: Apply
    attention_norm: Apply
    mlp_norm: LayerNorm
    rope: Rope | None
    window: int | None


@dataclass(frozen=True, slots=True)
class Head:
    """A cross-encoder's: the scores of pooled texts."""

    pooling: str
    dense: Apply
    activation: Apply
    norm: LayerNorm | None
    out: Apply
    sigmoid: bool

    def __call__(self, pooled: Tensor) -> Tensor:
        """[n, hidden_size] -> float32 [n, 1]"""
        x = self.activation(self.dense(pooled))
        logits = self.out(x if self.norm is None else self.norm(x)).float()
        return logits.sigmoid() if self.sigmoid else logits


@dataclass(frozen=True, slots=True)
class EncoderModel:
    spec: EncoderSpec
    word: Tensor  # [vocab_size, hidden_size]; float16 beside quantized weights
    dtype: torch.dtype  # of everything else
    position: Tensor | None  # [max_tokens, hidden_size]: rows of no token are cut off
    token_type: Tensor | None  # [token_types, hidden_size]
    embedding_norm: LayerNorm
    layers: tuple[EncoderLayer, ...]
    final_norm: LayerNorm | None
    biases: Tensor | None  # [buckets, heads]
    ropes: dict[Rope, RopeTable]
    head: Head | None

    @torch.inference_mode()
    def __call__(self, batch: EncoderBatch) -> Tensor:
        """[T, hidden_size]"""
        x = self._embedded(batch)
        masks = Masks(x.device, x.dtype, self.biases)
        turns = {rope: table.at(batch.positions) for rope, table in self.ropes.items()}
        for layer in self.layers:
            turn = None if layer.rope is None else turns[layer.rope]
            if self.spec.norms_first:
                x = x + self._attention(layer, layer.attention_norm(x), batch, masks, turn)
                x = x + self._mlp(layer, layer.mlp_norm(x))
            else:
                x = layer.attention_norm(self._attention(layer, x, batch, masks, turn).add_(x))
                x = layer.mlp_norm(self._mlp(layer, x).add_(x))
        return x if self.final_norm is None else self.final_norm(x)

    def _embedded(self, batch: EncoderBatch) -> Tensor:
        x = self.word[batch.tokens].to(self.dtype)
        if self.token_type is not None:
            # of a model that has one type, the second text is of that too
            x += self.token_type[batch.types.clamp_max(len(self.token_type) - 1)]
        if self.position is not None:
            x += self.position[batch.positions]
        return self.embedding_norm(x)

    def _attention(
        self,
        layer: EncoderLayer,
        x: Tensor,
        batch: EncoderBatch,
        masks: Masks,
        turn: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        heads = self.spec.num_heads
        q, k, v = (each.unflatten(1, (heads, -1)) for each in layer.qkv(x).chunk(3, dim=1))
        if turn is not None:
            apply_rope(q, *turn)
            apply_rope(k, *turn)
        return layer.out(attend(q, k, v, batch, masks, layer.window))

    def _mlp(self, layer: EncoderLayer, x: Tensor) -> Tensor:
        activation, inner = ACTIVATIONS[self.spec.activation], layer.up(x)
        if not self.spec.gated:
            return layer.down(activation(inner))
        activated, factor = inner.chunk(2, dim=1)
        return layer.down(activation(activated).mul_(factor))

    @torch.inference_mode()
    def scores(self, hidden: Tensor) -> Tensor:
        """Whole texts of one length [n, length, hidden_size] -> float32 [n, 1]. ValueError without a head."""
        if self.head is None:
            raise ValueError("a model without a classifier")
        return self.head(hidden.mean(1) if self.head.pooling == "mean" else hidden[:, 0])


@dataclass(frozen=True, slots=True)
class Loader:
    """Reads and prepares a layer at a time."""

    weights: EncoderWeights
    build: LinearBuilder

    def load(self) -> EncoderModel:
        spec, names, weights = self.weights.spec, self.weights.spec.names, self.weights
        hidden, offset = spec.hidden_size, spec.position_offset
        weights.check_depth()
        position = token_type = biases = None
        if offset is not None:
            table = weights.table(names.position, spec.max_tokens + offset, hidden)
            position = self._place(table[offset:])
        if spec.token_types:
            token_type = self._place(weights.table(names.token_type, spec.token_types, hidden))
        if names.relative is not None:
            biases = weights.table(names.relative, spec.relative_buckets, spec.num_heads)
            biases = self._place(biases)
        final = None if names.final_norm is None else self._norm(spec.prefix + names.final_norm)
        return EncoderModel(
            spec,
            self._place(weights.table(names.word, spec.vocab_size, hidden), self._word_dtype),
            self.build.dtype,
            position,
            token_type,
            self._norm(spec.prefix + names.embedding_norm),
            tuple(self._layer(index) for index in range(spec.num_layers)),
            final,
            biases,
            self._ropes(),
            self._head(),
        )

    def _layer(self, index: int) -> EncoderLayer:
        spec, names = self.weights.spec, self.weights.spec.names
        prefix = spec.layer_name(index)
        qkv, out, up, down = (self.build(self.weights.group(index, g)) for g in spec.groups())
        first = spec.norms_first and index == 0  # what was embedded is normed already
        return EncoderLayer(
            qkv,
            out,
            up,
            down,
            _as_it_is if first else self._norm(f"{prefix}.{names.attention_norm}"),
            self._norm(f"{prefix}.{names.mlp_norm}"),
            spec.ropes[index] if spec.ropes else None,
            spec.windows[index] if spec.windows else None,
        )

    def _head(self) -> Head | None:
        spec, head = self.weights.spec, self.weights.spec.classifier
        if head is None:
            return None
        hidden = spec.hidden_size
        return Head(
            head.pooling,
            self.build([self.weights.linear(head.dense, hidden, hidden)]),
            ACTIVATIONS[head.activation],
            None if head.norm is None else self._norm(head.norm),
            self.build([self.weights.linear(head.out, head.num_labels, hidden)]),
            head.score == "sigmoid",
        )

    def _ropes(self) -> dict[Rope, RopeTable]:
        spec, place = self.weights.spec, (self.build.dtype, self.build.device)
        return {
            rope: RopeTable.build(spec.head_dim, rope, spec.max_tokens, *place)
            for rope in dict.fromkeys(spec.ropes)
        }

    def _norm(self, module: str) -> LayerNorm:
        weight, bias = self.weights.norm(module)
        placed = None if bias is None else self._place(bias)
        return LayerNorm(self._place(weight), placed, self.weights.spec.norm_eps)

    @property
    def _word_dtype(self) -> torch.dtype:
        """The widest table, of which a text reads a few rows: whoever wants 8-bit weights wants it small."""
        quantized = self.weights.checkpoint.scheme is not None
        return torch.float16 if quantized else self.build.dtype

    def _place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        placed = tensor.to(self.build.device, dtype or self.build.dtype)
        self.build.weight_bytes += placed.nbytes
        return placed


def _as_it_is(x: Tensor) -> Tensor:
    return x
