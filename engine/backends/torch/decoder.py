"""The plain decoder, in torch's operators: every kind that a ModelSpec knows, and the oracle of the other backends.

One layer, on a flat batch of T tokens from many requests (there is no batch or padding axis outside attention):

    x [T, hidden] -> (norm) -> mixer -> (norm) -> + x -> (norm) -> feed-forward -> (norm) -> + x

What is added to x is multiplied by the model's residual_scale. With AltUp, x is one of several streams (alt_up.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import LayerSpec, ModelSpec, Rope
from ....architectures.rope import switch_of
from ...memory import tensor_bytes
from ..base import HostSampling, KernelReport
from ..batch import Batch
from ..images import with_images
from ..kv_groups import layer_groups
from .alt_up import TorchAltUp, TorchAltUpLayer, TorchLaurel
from .attention import AttentionMetadata, KVCache
from .feed_forward import TorchFeedForward
from .layers import RMSNorm, RopeTable, scaled, soft_cap
from .linear import FusedLinear
from .mixers import Step, TorchMixer
from .per_layer_inputs import TorchPerLayerInput, TorchPerLayerInputs
from .states import StateCache, StateStep


@dataclass(slots=True)
class TorchLayer:
    """One layer's weights. What the layer does not have is None."""

    spec: LayerSpec
    mixer: TorchMixer | None
    mlp: TorchFeedForward | None
    before_mixer: RMSNorm | None
    after_mixer: RMSNorm | None
    before_mlp: RMSNorm | None
    after_mlp: RMSNorm | None
    per_layer_input: TorchPerLayerInput | None
    scalar: Tensor | None  # [1]
    laurel: TorchLaurel | None
    alt_up: TorchAltUpLayer | None


@dataclass(frozen=True, slots=True)
class TorchCache:
    """Keys and values of the layers that attend, states of the others."""

    kv: KVCache
    states: StateCache

    def clear(self, blocks: Sequence[list[int]], state_slot: int | None) -> None:
        self.kv.clear(blocks)
        if state_slot is not None:
            self.states.clear(state_slot)


@dataclass(slots=True)
class TorchDecoder(HostSampling):
    """Consecutive layers; embedding, norm and head where they are the model's first or last."""

    looks_ahead = True

    model: ModelSpec
    layers: list[TorchLayer]
    ropes: dict[tuple[Rope | None, int], RopeTable]  # of a rope and a size of heads
    block_size: int
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor | None  # [vocab, hidden]
    embedding_norm: RMSNorm | None
    norm: RMSNorm | None
    head: FusedLinear | None
    per_layer_inputs: TorchPerLayerInputs | None
    alt_up: TorchAltUp | None
    report: KernelReport

    @property
    def weight_bytes(self) -> int:
        parts = [self.layers, self.embedding, self.head, self.per_layer_inputs, self.alt_up]
        return tensor_bytes(parts)

    def new_cache(self, num_blocks: Sequence[int], num_states: int = 1) -> TorchCache:
        specs = [layer.spec for layer in self.layers]
        mixers = replace(self.model, layers=tuple(specs)).cached
        groups = layer_groups(self.model, specs, len(num_blocks))
        return TorchCache(
            KVCache.allocate(mixers, groups, num_blocks, self.block_size, self.dtype, self.device),
            StateCache.allocate(specs, num_states, self.device),
        )

    def forward(self, batch: Batch, cache: TorchCache, hidden: Tensor | None = None) -> Tensor:
        x = self._embed(batch) if hidden is None else hidden.to(self.device, self.dtype)
        step = self._step(batch, cache)
        given = None
        if self.per_layer_inputs is not None:
            given = self.per_layer_inputs(torch.tensor(batch.token_ids, device=self.device), x)
        if self.alt_up is not None:
            x = self.alt_up.start(x)
        for index, layer in enumerate(self.layers):
            told = None if given is None else given[:, index]
            if layer.alt_up is None:
                x = self._told(layer, self._computed(layer, x, index, step), told)
            else:
                x = self._streams(layer, layer.alt_up, x, index, step, told)
            if layer.scalar is not None:
                x = x * layer.scalar
        if self.alt_up is not None:
            x = self.alt_up.end(x)
        return _normed(self.norm, x)

    def _computed(self, layer: TorchLayer, x: Tensor, index: int, step: Step) -> Tensor:
        """x [T, hidden] with what the layer's mixer and feed-forward add."""
        if layer.mixer is not None:
            h = _normed(layer.before_mixer, x)
            mixed = layer.mixer(h, index, step)
            x = x + scaled(_normed(layer.after_mixer, mixed), self.model.residual_scale)
            if layer.laurel is not None:
                x = (x + layer.laurel(h)) * 2.0**-0.5
        if layer.mlp is not None:
            mixed = layer.mlp(_normed(layer.before_mlp, x))
            x = x + scaled(_normed(layer.after_mlp, mixed), self.model.residual_scale)
        return x

    def _streams(
        self,
        layer: TorchLayer,
        alt_up: TorchAltUpLayer,
        streams: Tensor,
        index: int,
        step: Step,
        told: Tensor | None,
    ) -> Tensor:
        """Streams after the layer."""
        predicted = alt_up.predict(streams)
        streams = alt_up.correct(
            predicted, self._computed(layer, predicted[alt_up.spec.active], index, step)
        )
        if layer.per_layer_input is not None and told is not None:
            streams[1:] += layer.per_layer_input(alt_up.told(streams), told)
        return streams

    @staticmethod
    def _told(layer: TorchLayer, x: Tensor, told: Tensor | None) -> Tensor:
        """x [T, hidden] with what the layer is told once more, told [T, width]."""
        if layer.per_layer_input is None or told is None:
            return x
        return x + layer.per_layer_input(x, told)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            raise ValueError("these are not the model's last layers")
        logits = scaled(self.head(hidden).float(), self.model.logits_scale)
        return soft_cap(logits, self.model.final_soft_cap)

    def _step(self, batch: Batch, cache: TorchCache) -> Step:
        positions = torch.tensor(batch.positions, device=self.device)
        long = None
        if (switch := switch_of(rope for rope, _ in self.ropes)) is not None:
            long = torch.tensor(batch.long_rows(switch), device=self.device)
        angles = {kind: table.at(positions, long) for kind, table in self.ropes.items()}
        attention = {
            group: AttentionMetadata.build(batch, group, self.dtype, self.device)
            for group in set(cache.kv.groups.values())
        }
        states = StateStep.build(batch, self.device) if cache.states.layers else None
        return Step(positions, angles, attention, cache.kv, states, cache.states)

    def _embed(self, batch: Batch) -> Tensor:
        if self.embedding is None:
            raise ValueError("these are not the model's first layers")
        x = F.embedding(torch.tensor(batch.token_ids, device=self.device), self.embedding)
        x = _normed(self.embedding_norm, x)
        if self.model.embedding_scale != 1.0:
            x = x * torch.tensor(self.model.embedding_scale, dtype=x.dtype)
        return with_images(x, batch)


def _normed(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
