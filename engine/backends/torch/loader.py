"""The torch backend: any layer that there is, on any device. It loads one layer at a time, so that no more than one is
ever held in two forms.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ....architectures.base import (
    Attention,
    Experts,
    GatedDeltaNet,
    LayerSpec,
    LinearGroup,
    Mamba2,
    Mixer,
    ModelSpec,
    Norms,
    PlainMlp,
    Rope,
    ShortConv,
)
from ....quant.checkpoint import Checkpoint
from ..base import KernelReport, Progress, Target, unknown_feature
from ..weights import Linear, ModelWeights
from .decoder import TorchDecoder, TorchLayer
from .feed_forward import TorchExperts, TorchGatedMlp, TorchPlainMlp
from .layers import RMSNorm, RopeTable
from .linear import FusedLinear
from .mixers import TorchAttention, TorchGatedDeltaNet, TorchMamba2, TorchShortConv
from .per_layer_inputs import TorchPerLayerInput, TorchPerLayerInputs


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
            "per_layer_inputs",
            "per_layer_inputs.activation=silu",
            "per_layer_inputs.activation=gelu_tanh",
            "layer",
            "layer.mixer=None",
            "layer.mlp=None",
            "layer.scalar",
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
            "attention.v_norm",
            "attention.keys_are_values",
            "attention.kv_source",
            "attention.output_gate",
            "attention.head_gate",
            "gated_delta_net",
            "short_conv",
            "short_conv.bias",
            "mamba2",
            "mamba2.conv_bias",
            "mamba2.time_step_limit",
            "rope",
            "rope.scaling=default",
            "rope.scaling=linear",
            "rope.scaling=llama3",
            "rope.scaling=yarn",
            "rope.scaling=proportional",
            "rope.dim",
            "rope.attention_factor",
            "gated_mlp",
            "gated_mlp.activation=silu",
            "gated_mlp.activation=gelu_tanh",
            "gated_mlp.activation=relu2",
            "plain_mlp",
            "plain_mlp.activation=silu",
            "plain_mlp.activation=gelu_tanh",
            "plain_mlp.activation=relu2",
            "experts",
            "experts.activation=silu",
            "experts.activation=gelu_tanh",
            "experts.activation=relu2",
            "experts.plain",
            "experts.latent_size",
            "experts.scoring=softmax",
            "experts.scoring=sigmoid",
            "experts.norm_weights",
            "experts.routed_scale",
            "experts.correction_bias",
            "experts.clamp",
            "experts.limited_groups",
            "shared_expert",
            "shared_expert.gated",
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
            self._per_layer_inputs(),
            self.report,
        )

    def _layer(self, index: int) -> TorchLayer:
        model = self.weights.model
        spec = model.layers[index]
        norms = self._norms(f"{model.layer_name(index)}.", spec.norms)
        scalar = None
        if spec.scalar:
            scalar = self.weights.vector(f"{model.layer_name(index)}.layer_scalar", 1)
            scalar = scalar.to(self.target.device, self.target.dtype)
        return TorchLayer(
            spec,
            self._mixer(index, spec.mixer),
            self._feed_forward(index),
            per_layer_input=self._per_layer_input(index),
            scalar=scalar,
            **norms,
        )

    def _mixer(
        self, index: int, mixer: Mixer | None
    ) -> TorchAttention | TorchGatedDeltaNet | TorchMamba2 | TorchShortConv | None:
        if mixer is None:
            return None
        if isinstance(mixer, Attention):
            return self._attention(index, mixer)
        if isinstance(mixer, GatedDeltaNet):
            return self._gated_delta_net(index, mixer)
        if isinstance(mixer, Mamba2):
            return self._mamba2(index, mixer)
        return self._short_conv(index, mixer)

    def _mamba2(self, index: int, mixer: Mamba2) -> TorchMamba2:
        inputs, out = self._groups(index, mixer.groups(self.weights.model.hidden_size))
        weights = self.weights.mamba2(index, mixer).to(self.target.device)
        return TorchMamba2(mixer, inputs, out, weights, self.weights.model.norm_eps)

    def _short_conv(self, index: int, mixer: ShortConv) -> TorchShortConv:
        inputs, out = self._groups(index, mixer.groups(self.weights.model.hidden_size))
        taps, bias = self.weights.short_conv(index, mixer)
        device = self.target.device
        return TorchShortConv(
            mixer, inputs, out, taps.to(device), None if bias is None else bias.to(device)
        )

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
        v_norm = self._norm(torch.ones(mixer.head_dim)) if mixer.v_norm else None
        sinks = self.weights.sinks(index, mixer)
        sinks = None if sinks is None else sinks.to(self.target.device)
        qkv, *gates, o = self._groups(index, mixer.groups(model.hidden_size))
        head_gate = gates[0] if gates else None
        return TorchAttention(mixer, qkv, o, q_norm, k_norm, v_norm, sinks, head_gate)

    def _feed_forward(self, index: int) -> TorchGatedMlp | TorchPlainMlp | TorchExperts | None:
        mlp = self.weights.model.layers[index].mlp
        if mlp is None:
            return None
        if isinstance(mlp, Experts):
            return self._experts(index, mlp)
        up, down = self._groups(index, mlp.groups(self.weights.model.hidden_size))
        kind = TorchPlainMlp if isinstance(mlp, PlainMlp) else TorchGatedMlp
        return kind(mlp.activation, up, down)

    def _experts(self, index: int, mlp: Experts) -> TorchExperts:
        device, names = self.target.device, mlp.names
        router = self.weights.router(index, names.router, mlp.num_experts).to(device)
        bias = gate = None
        if mlp.correction_bias:
            bias = self.weights.correction_bias(index, names.correction_bias, mlp.num_experts)
            bias = bias.to(device)
        if mlp.shared is not None and mlp.shared.gated:
            gate = self.weights.router(index, names.shared_gate, 1).to(device)
        hidden_size = self.weights.model.hidden_size
        pairs = (self._groups(index, pair) for pair in mlp.members(hidden_size))
        each: list[Any] = [
            TorchPlainMlp(mlp.activation, up, down)
            if mlp.plain
            else TorchGatedMlp(mlp.activation, up, down, mlp.clamp)
            for up, down in pairs
        ]
        shared = each.pop() if mlp.shared is not None else None
        own = self.weights.router_bias(index, names.router, mlp.num_experts)
        own = None if own is None else own.to(device)
        latent = self._groups(index, mlp.latent_groups(hidden_size))
        return TorchExperts(mlp, router, own, bias, each, shared, gate, latent)

    def _per_layer_input(self, index: int) -> TorchPerLayerInput | None:
        model, prefix = self.weights.model, self.weights.model.layer_name(index)
        if (spec := model.per_layer_inputs) is None:
            return None
        hidden = model.hidden_size
        gate = self.weights.linear(f"{prefix}.per_layer_input_gate", spec.width, hidden)
        projection = self.weights.linear(f"{prefix}.per_layer_projection", hidden, spec.width)
        norm = self.weights.norm(f"{prefix}.post_per_layer_input_norm", hidden)
        return TorchPerLayerInput(
            spec, self._fused([gate]), self._fused([projection]), self._norm(norm)
        )

    def _per_layer_inputs(self) -> TorchPerLayerInputs | None:
        model, weights = self.weights.model, self.weights
        if (spec := model.per_layer_inputs) is None:
            return None
        width = model.num_layers * spec.width
        projection = weights.linear(
            f"{model.prefix}per_layer_model_projection", width, model.hidden_size
        )
        norm = weights.norm(f"{model.prefix}per_layer_projection_norm", spec.width)
        table = weights.per_layer_embedding(self.target.dtype).to(self.target.device)
        return TorchPerLayerInputs(spec, table, self._fused([projection]), self._norm(norm))

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

    def _rope_tables(self, layers: range) -> dict[tuple[Rope | None, int], RopeTable]:
        model, target = self.weights.model, self.target
        mixers = [m for index in layers if isinstance(m := model.layers[index].mixer, Attention)]
        length = model.max_position_embeddings
        return {
            (rope, dim): RopeTable.build(dim, rope, length, target.dtype, target.device)
            for rope, dim in dict.fromkeys((mixer.rope, mixer.head_dim) for mixer in mixers)
        }
