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
    FeedForward,
    GatedDeltaNet,
    GatedMlp,
    LatentAttention,
    Laurel,
    LayerSpec,
    LinearGroup,
    Mamba2,
    Mixer,
    MlpBesideExperts,
    ModelSpec,
    Norms,
    PlainMlp,
    Rope,
    ShortConv,
)
from ....quant.checkpoint import Checkpoint
from ..base import KernelReport, Progress, Target, unknown_feature
from ..weights import Linear, ModelWeights
from .alt_up import TorchAltUp, TorchAltUpLayer, TorchLaurel
from .decoder import TorchDecoder, TorchLayer
from .features import FEATURES
from .feed_forward import (
    TorchExperts,
    TorchFeedForward,
    TorchGatedMlp,
    TorchMlpBesideExperts,
    TorchPlainMlp,
)
from .layers import RMSNorm, RopeTable
from .linear import FusedLinear
from .mixers import (
    TorchAttention,
    TorchGatedDeltaNet,
    TorchLatentAttention,
    TorchMamba2,
    TorchMixer,
    TorchShortConv,
)
from .per_layer_inputs import TorchPerLayerInput, TorchPerLayerInputs


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """Torch's operators, with the best kernel that there is for each linear (kernels/select.py)."""

    target: Target
    name = "torch"
    features = FEATURES

    def unavailable(self) -> str | None:
        return None

    def why_not(self, layer: LayerSpec, model: ModelSpec) -> str | None:
        return unknown_feature(self.features, layer, model)

    def load(
        self, checkpoint: Checkpoint, model: ModelSpec, layers: range, progress: Progress
    ) -> TorchDecoder:
        return Loader(ModelWeights(checkpoint, model), self.target, KernelReport()).load(
            layers, progress
        )


@dataclass(slots=True)
class Loader:
    """Reads a layer at a time and prepares it. A backend with layers of its own overrides how those are made."""

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
            self._norm(torch.ones(model.hidden_size)) if model.embedding_norm and first else None,
            self._norm(self.weights.final_norm()) if last else None,
            head,
            self._per_layer_inputs(),
            self._alt_up(),
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
            self._feed_forward(index, spec.mlp),
            per_layer_input=self._per_layer_input(index),
            scalar=scalar,
            laurel=self._laurel(index, spec.laurel),
            alt_up=self._alt_up_layer(index),
            **norms,
        )

    def _mixer(self, index: int, mixer: Mixer | None) -> TorchMixer | None:
        if mixer is None:
            return None
        if isinstance(mixer, Attention):
            return self._attention(index, mixer)
        if isinstance(mixer, LatentAttention):
            return self._latent_attention(index, mixer)
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

    def _latent_attention(self, index: int, mixer: LatentAttention) -> TorchLatentAttention:
        target = self.target
        inputs, *q_b, _, out = mixer.groups(self.weights.model.hidden_size)
        kv_b, bias = self.weights.kv_b(index, mixer, target.dtype)
        q_norm, kv_norm = (
            None
            if weight is None
            else RMSNorm(weight.to(target.device, target.dtype), mixer.norm_eps)
            for weight in self.weights.latent_norms(index, mixer)
        )
        if kv_norm is None:
            raise ValueError("latents have a norm")
        prepared = self._groups(index, [inputs, *q_b, out])
        return TorchLatentAttention(
            mixer,
            prepared[0],
            prepared[1] if q_b else None,
            kv_b.to(target.device),
            None if bias is None else bias.to(target.device, target.dtype),
            prepared[-1],
            q_norm,
            kv_norm,
        )

    def _feed_forward(self, index: int, mlp: FeedForward | None) -> TorchFeedForward | None:
        if mlp is None:
            return None
        if isinstance(mlp, MlpBesideExperts):
            return self._mlp_beside_experts(index, mlp)
        if isinstance(mlp, Experts):
            router = self.weights.router(index, mlp.names.router, mlp.num_experts)
            return self._experts(index, mlp, router)
        return self._mlp(index, mlp)

    def _mlp(self, index: int, mlp: GatedMlp | PlainMlp) -> TorchGatedMlp | TorchPlainMlp:
        up, down = self._groups(index, mlp.groups(self.weights.model.hidden_size))
        if isinstance(mlp, PlainMlp):
            return TorchPlainMlp(mlp.activation, up, down)
        return TorchGatedMlp(mlp.activation, up, down, deviations=mlp.deviations)

    def _mlp_beside_experts(self, index: int, spec: MlpBesideExperts) -> TorchMlpBesideExperts:
        weights, hidden = self.weights, self.weights.model.hidden_size
        prefix = f"{weights.model.layer_name(index)}."
        experts = self._experts(index, spec.experts, weights.scaled_router(index, spec))
        scales = weights.vector(f"{prefix}{spec.expert_scales}", spec.experts.num_experts)
        experts.scales = scales.to(self.target.device)
        before_mlp, after_mlp, before_experts, after_experts = (
            self._norm(weights.norm(prefix + name, hidden)) for name in spec.norms
        )
        return TorchMlpBesideExperts(
            self._mlp(index, spec.mlp),
            experts,
            before_mlp,
            after_mlp,
            before_experts,
            after_experts,
            before_router=self._norm(torch.ones(hidden)),
        )

    def _experts(self, index: int, mlp: Experts, router: Tensor) -> TorchExperts:
        found = self._around_experts(index, mlp, router)
        members = mlp.members(self.weights.model.hidden_size)[: mlp.num_experts]
        each: list[Any] = [self._member(index, mlp, pair) for pair in members]
        found.experts = each
        return found

    def _member(
        self, index: int, mlp: Experts, pair: tuple[LinearGroup, LinearGroup]
    ) -> TorchGatedMlp | TorchPlainMlp:
        """One expert, or the shared one."""
        up, down = self._groups(index, pair)
        if mlp.plain:
            return TorchPlainMlp(mlp.activation, up, down)
        return TorchGatedMlp(mlp.activation, up, down, mlp.clamp)

    def _around_experts(self, index: int, mlp: Experts, router: Tensor) -> TorchExperts:
        """All but the experts themselves."""
        device, names = self.target.device, mlp.names
        bias = gate = None
        if mlp.correction_bias:
            bias = self.weights.correction_bias(index, names.correction_bias, mlp.num_experts)
            bias = bias.to(device)
        if mlp.shared is not None and mlp.shared.gated:
            gate = self.weights.router(index, names.shared_gate, 1).to(device)
        hidden_size = self.weights.model.hidden_size
        shared = None
        if mlp.shared is not None:
            shared = self._member(index, mlp, mlp.members(hidden_size)[-1])
        own = self.weights.router_bias(index, names.router, mlp.num_experts)
        own = None if own is None else own.to(device)
        latent = self._groups(index, mlp.latent_groups(hidden_size))
        return TorchExperts(mlp, router.to(device), own, bias, [], shared, gate, latent)

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

    def _alt_up(self) -> TorchAltUp | None:
        model = self.weights.model
        if (spec := model.alt_up) is None:
            return None
        into, back = (
            [self.weights.linear(model.prefix + name, *[model.hidden_size] * 2) for name in names]
            for names in (spec.projections, spec.unprojections)
        )
        return TorchAltUp(spec, self._fused(into), [self._fused([each]) for each in back])

    def _alt_up_layer(self, index: int) -> TorchAltUpLayer | None:
        model = self.weights.model
        if (spec := model.alt_up) is None:
            return None
        weights = self.weights.alt_up(index, spec).to(self.target.device)
        return TorchAltUpLayer(spec, weights, model.norm_eps)

    def _laurel(self, index: int, spec: Laurel | None) -> TorchLaurel | None:
        if spec is None:
            return None
        hidden, prefix = self.weights.model.hidden_size, self.weights.model.layer_name(index)
        left, right = self._groups(index, spec.groups(hidden))
        norm = self.weights.norm(f"{prefix}.{spec.norm}", hidden)
        return TorchLaurel(left, right, self._norm(norm))

    def _groups(self, index: int, groups: Iterable[LinearGroup]) -> list[FusedLinear]:
        return [self._fused(self.weights.group(index, group)) for group in groups]

    def _norms(self, prefix: str, norms: Norms) -> dict[str, RMSNorm | None]:
        model = self.weights.model
        names = {each.name: getattr(norms, each.name) for each in fields(norms)}

        def norm(place: str, name: str) -> RMSNorm:
            eps = model.after_norm_eps if place.startswith("after") else None
            return self._norm(self.weights.norm(prefix + name, model.hidden_size), eps)

        return {place: None if name is None else norm(place, name) for place, name in names.items()}

    def _norm(self, weight: Tensor, eps: float | None = None) -> RMSNorm:
        """In float32 where 1 was added to it, as the architectures that do so compute it. eps: None is the model's."""
        model, target = self.weights.model, self.target
        dtype = torch.float32 if model.norm_offset else target.dtype
        return RMSNorm(weight.to(target.device, dtype), model.norm_eps if eps is None else eps)

    def _fused(self, linears: list[Linear]) -> FusedLinear:
        return FusedLinear.build(linears, self.target.dtype, self.target.device, self.report)

    def _rope_tables(self, layers: range) -> dict[tuple[Rope | None, int], RopeTable]:
        model, target = self.weights.model, self.target
        mixers = [model.cached[index] for index in layers if index in model.cached]
        length = model.max_position_embeddings
        return {
            (rope, dim): RopeTable.build(dim, rope, length, target.dtype, target.device)
            for rope, dim in dict.fromkeys(mixer.rotation for mixer in mixers)
        }
