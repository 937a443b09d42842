"""The torch backend: any layer that there is, on any device. It loads one layer at a time, so that no more than one is
ever held in two forms.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ....architectures.base import (
    Attention,
    GatedDeltaNet,
    LayerSpec,
    LinearGroup,
    ModelSpec,
    Norms,
    Rope,
)
from ....quant.checkpoint import Checkpoint
from ..base import KernelReport, Progress, Target, unknown_feature
from ..weights import Linear, ModelWeights
from .decoder import TorchDecoder, TorchLayer
from .feed_forward import TorchGatedMlp
from .layers import RMSNorm, RopeTable
from .linear import FusedLinear
from .mixers import TorchAttention, TorchGatedDeltaNet


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """Torch's operators, with the best kernel that there is for each linear (kernels/select.py)."""

    target: Target
    name = "torch"
    features = frozenset(
        {
            "model",
            "model.norm_offset",
            "model.embedding_scale",
            "model.residual_scale",
            "model.logits_scale",
            "model.final_soft_cap",
            "layer",
            "norms",
            "norms.before_mixer=None",
            "norms.after_mixer",
            "norms.before_mlp=None",
            "norms.after_mlp",
            "attention",
            "attention.window",
            "attention.rope=None",
            "attention.qk_norm=head",
            "attention.qk_norm=all",
            "attention.query_scaling",
            "attention.soft_cap",
            "attention.sinks",
            "attention.output_gate",
            "gated_delta_net",
            "rope",
            "rope.scaling=default",
            "rope.scaling=linear",
            "rope.scaling=llama3",
            "rope.scaling=yarn",
            "rope.dim",
            "rope.attention_factor",
            "gated_mlp",
            "gated_mlp.activation=silu",
            "gated_mlp.activation=gelu_tanh",
        }
    )

    def unavailable(self) -> str | None:
        return None

    def why_not(self, layer: LayerSpec, model: ModelSpec) -> str | None:
        return unknown_feature(self.features, layer, model)

    def load(
        self, checkpoint: Checkpoint, model: ModelSpec, layers: range, progress: Progress
    ) -> TorchDecoder:
        return _Loader(ModelWeights(checkpoint, model), self.target, KernelReport()).load(
            layers, progress
        )


@dataclass(slots=True)
class _Loader:
    weights: ModelWeights
    target: Target
    report: KernelReport

    def load(self, layers: range, progress: Progress) -> TorchDecoder:
        model, target = self.weights.model, self.target
        first, last = layers.start == 0, layers.stop == model.num_layers
        loaded = []
        for index in layers:
            loaded.append(self._layer(index))
            progress(index)
        embedding = self.weights.embedding(target.dtype) if first or last else None
        head = (
            self._fused([self.weights.head(embedding)]) if embedding is not None and last else None
        )
        return TorchDecoder(
            model,
            loaded,
            self._rope_tables(layers),
            target.config.block_size,
            target.dtype,
            target.device,
            embedding.to(target.device) if embedding is not None and first else None,
            self._norm(self.weights.final_norm()) if last else None,
            head,
            self.report,
        )

    def _layer(self, index: int) -> TorchLayer:
        model = self.weights.model
        spec = model.layers[index]
        norms = self._norms(f"{model.layer_name(index)}.", spec.norms)
        if isinstance(spec.mixer, Attention):
            mixer: TorchAttention | TorchGatedDeltaNet = self._attention(index, spec.mixer)
        else:
            mixer = self._gated_delta_net(index, spec.mixer)
        return TorchLayer(spec, mixer, self._gated_mlp(index), **norms)

    def _gated_delta_net(self, index: int, mixer: GatedDeltaNet) -> TorchGatedDeltaNet:
        device, weights = self.target.device, self.weights.gated_delta_net(index, mixer)
        qkv_z, b_a, out = self._groups(index, mixer.groups(self.weights.model.hidden_size))
        return TorchGatedDeltaNet(
            mixer,
            qkv_z,
            b_a,
            out,
            weights.taps.to(device),
            weights.rate.to(device),
            weights.dt_bias.to(device),
            RMSNorm(weights.norm.to(device), self.weights.model.norm_eps),
        )

    def _attention(self, index: int, mixer: Attention) -> TorchAttention:
        model = self.weights.model
        q_norm, k_norm = (
            None if weight is None else self._norm(weight)
            for weight in self.weights.head_norms(index, mixer)
        )
        sinks = None
        if mixer.sinks:
            name = f"{model.layer_name(index)}.self_attn.sinks"
            sinks = self.weights.vector(name, mixer.num_heads).to(self.target.device)
        qkv, o = self._groups(index, mixer.groups(model.hidden_size))
        return TorchAttention(mixer, qkv, o, q_norm, k_norm, sinks)

    def _gated_mlp(self, index: int) -> TorchGatedMlp:
        model = self.weights.model
        mlp = model.layers[index].mlp
        return TorchGatedMlp(mlp, *self._groups(index, mlp.groups(model.hidden_size)))

    def _groups(self, index: int, groups: Iterable[LinearGroup]) -> list[FusedLinear]:
        return [self._fused(self.weights.group(index, group)) for group in groups]

    def _norms(self, prefix: str, norms: Norms) -> dict[str, RMSNorm | None]:
        width = self.weights.model.hidden_size
        names = {each.name: getattr(norms, each.name) for each in fields(norms)}
        return {
            place: None if name is None else self._norm(self.weights.norm(prefix + name, width))
            for place, name in names.items()
        }

    def _norm(self, weight: Tensor) -> RMSNorm:
        """In float32 where 1 was added to it, as the architectures that do so compute it."""
        model, target = self.weights.model, self.target
        dtype = torch.float32 if model.norm_offset else target.dtype
        return RMSNorm(weight.to(target.device, dtype), model.norm_eps)

    def _fused(self, linears: list[Linear]) -> FusedLinear:
        return FusedLinear.build(linears, self.target.dtype, self.target.device, self.report)

    def _rope_tables(self, layers: range) -> dict[Rope | None, RopeTable]:
        model, target = self.weights.model, self.target
        found = [model.layers[index].mixer for index in layers]
        mixers = {mixer.rope: mixer for mixer in found if isinstance(mixer, Attention)}
        return {
            rope: RopeTable.build(
                mixer.head_dim,
                rope,
                model.max_position_embeddings,
                target.dtype,
                target.device,
            )
            for rope, mixer in mixers.items()
        }
