"""The C++ backend: which layers its kernels compute, and a checkpoint's weights in their layout.

Nothing is fused here: the linears of a group lie side by side in one call whatever their formats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ....architectures.base import (
    Attention,
    Experts,
    GatedMlp,
    LatentAttention,
    Laurel,
    LayerSpec,
    LinearGroup,
    Mamba2,
    MlpBesideExperts,
    ModelSpec,
    PlainMlp,
    ShortConv,
)
from ....kernels.cpu import library as lib
from ....kernels.cpu.arena import Arena
from ....kernels.cpu.prepared import Prepared, PreparedGroup, prepare, quantize_head
from ....quant.checkpoint import Checkpoint
from ..base import KernelReport, Progress, Target, unknown_feature
from ..weights import Linear, ModelWeights
from . import sizes
from .alt_up import CppAltUp, CppAltUpLayer, CppLaurel
from .decoder import CppDecoder
from .features import FEATURES
from .layers import (
    CppExperts,
    CppGatedMlp,
    CppLayer,
    CppMlpBesideExperts,
    CppPerLayerInput,
    CppPerLayerInputs,
)
from .mixers import (
    CppAttention,
    CppDeltaNet,
    CppLatentAttention,
    CppMamba2,
    CppShortConv,
)
from .prepared_cache import PreparedCache


class CppBackend:
    """The C++ kernels, in bfloat16 on a CPU."""

    name = "cpp"
    features = FEATURES

    def __init__(self, target: Target):
        self.target = target

    @cached_property
    def pool(self) -> lib.Pool:
        config = self.target.config
        return lib.Pool(config.num_threads or torch.get_num_threads(), config.cpu_isa)

    def unavailable(self) -> str | None:
        config, dtype = self.target.config, self.target.dtype
        if self.target.device.type != "cpu":
            return f"runs on a CPU, not on {self.target.device.type}"
        if config.cpu_isa == "none":
            return "--cpu-isa none"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not in {dtype}; serve with --dtype bfloat16"
        if reason := lib.why_missing():
            return reason
        if config.block_size % 16:
            return f"needs KV blocks of a multiple of 16 tokens, not {config.block_size}"
        return None

    def why_not(self, layer: LayerSpec, model: ModelSpec) -> str | None:
        return unknown_feature(self.features, layer, model) or sizes.why_not(layer, model)

    def load(
        self, checkpoint: Checkpoint, model: ModelSpec, layers: range, progress: Progress
    ) -> CppDecoder:
        config = self.target.config
        head_bits = config.lm_head_bits or self._head_bits(checkpoint)
        # what is quantized at load has no path
        folder = config.prepared_cache if config.quantize is None else None
        options = f"head {head_bits}, layers {layers.start} to {layers.stop}"
        cache = PreparedCache.of(checkpoint, folder, options) if folder else None
        weights = ModelWeights(checkpoint, model)
        return _Loader(weights, self.target, self.pool, head_bits, cache).load(layers, progress)

    def _head_bits(self, checkpoint: Checkpoint) -> int:
        """Of a 16-bit output head: 8 beside weights of at most 4 bits and int8 activations, whose own error is far
        larger."""
        weights = checkpoint.scheme.default if checkpoint.scheme else None
        few = weights is not None and weights.kind in ("int", "fp4") and weights.bits <= 4
        return 8 if few and self.target.config.cpu_activations == "int8" else 16


@dataclass(slots=True)
class _Loader:
    weights: ModelWeights
    target: Target
    pool: lib.Pool
    head_bits: int  # 8: a dense output head is quantized
    cache: PreparedCache | None
    arena: Arena = field(default_factory=Arena)
    report: KernelReport = field(default_factory=KernelReport)

    def load(self, layers: range, progress: Progress) -> CppDecoder:
        model = self.weights.model
        first, last = layers.start == 0, layers.stop == model.num_layers
        loaded = []
        for index in layers:
            loaded.append(self._layer(index))
            progress(index)
        embedding = None
        if first or last:
            embedding = self.weights.embedding(torch.bfloat16).contiguous()
        head = None
        if last:
            shape = (model.vocab_size, model.hidden_size)
            head = self._prepared("lm_head", [shape], lambda: [self._head(embedding)])
        if self.cache is not None:
            self.cache.save()
        config = self.target.config
        return CppDecoder(
            model,
            self.pool,
            loaded,
            layers.start,
            config.block_size,
            config.kv_cache_dtype == "int8",
            embedding if first else None,
            torch.ones(model.hidden_size) if model.embedding_norm and first else None,
            self.weights.final_norm() if last else None,
            head,
            self._per_layer_inputs(),
            self._alt_up(),
            self.report,
        )

    def _layer(self, index: int) -> CppLayer:
        model, weights = self.weights.model, self.weights
        spec, prefix = model.layers[index], f"{model.layer_name(index)}."
        norms = spec.norms

        def norm(name: str | None, scale: float = 1.0) -> Tensor | None:
            return None if name is None else weights.norm(prefix + name, model.hidden_size) * scale

        # What is added to the residual is scaled by what makes it: its norm, else its linear.
        scale = model.residual_scale
        before_mlp = norms.before_mlp
        if isinstance(spec.mlp, MlpBesideExperts):
            before_mlp = spec.mlp.norms[0]
        return CppLayer(
            self._mixer(index, 1.0 if norms.after_mixer else scale),
            self._feed_forward(index, 1.0 if norms.after_mlp else scale),
            norm(norms.before_mixer),
            norm(norms.after_mixer, scale),
            norm(before_mlp),
            norm(norms.after_mlp, scale),
            self._per_layer_input(index),
            float(weights.vector(f"{prefix}layer_scalar", 1)) if spec.scalar else 1.0,
            self._laurel(index, spec.laurel),
            None if model.alt_up is None else CppAltUpLayer(weights.alt_up(index, model.alt_up)),
        )

    def _per_layer_input(self, index: int) -> CppPerLayerInput | None:
        model = self.weights.model
        if (spec := model.per_layer_inputs) is None:
            return None
        prefix, hidden = f"{model.layer_name(index)}.", model.hidden_size
        return CppPerLayerInput(
            self._lone(f"{prefix}per_layer_input_gate", spec.width, hidden),
            self._lone(f"{prefix}per_layer_projection", hidden, spec.width),
            self.weights.norm(f"{prefix}post_per_layer_input_norm", hidden),
        )

    def _mixer(
        self, index: int, scale: float
    ) -> CppAttention | CppLatentAttention | CppDeltaNet | CppMamba2 | CppShortConv | None:
        """scale: of what it gives."""
        mixer = self.weights.model.layers[index].mixer
        if mixer is None:
            return None
        if isinstance(mixer, LatentAttention):
            return self._latent_attention(index, mixer, scale)
        *inputs, out = mixer.groups(self.weights.model.hidden_size)
        groups = [self._layer_group(index, group) for group in inputs]
        last = self._layer_group(index, out, scale)
        together = PreparedGroup(
            [linear for group in groups for linear in group.linears], groups[0].int8
        )
        if isinstance(mixer, Attention):
            norms = self.weights.head_norms(index, mixer)
            v_norm = torch.ones(mixer.head_dim) if mixer.v_norm else None
            sinks = self.weights.sinks(index, mixer)
            return CppAttention(mixer, together, last, *norms, v_norm, sinks)
        if isinstance(mixer, ShortConv):
            return CppShortConv(mixer, together, last, *self.weights.short_conv(index, mixer))
        if isinstance(mixer, Mamba2):
            return CppMamba2(mixer, together, last, self.weights.mamba2(index, mixer))
        return CppDeltaNet(mixer, together, last, self.weights.gated_delta_net(index, mixer))

    def _latent_attention(
        self, index: int, mixer: LatentAttention, scale: float
    ) -> CppLatentAttention:
        """What meets queries is dequantized: along its inputs, scales are of single columns. What makes values stays as
        it is."""
        inputs, *q_b, kv_b, out = mixer.groups(self.weights.model.hidden_size)
        name = f"{self.weights.model.layer_name(index)}.{kv_b.modules[0]}"
        shapes = [(mixer.value_dim, mixer.kv_rank)] * mixer.num_heads
        made, _ = self.weights.kv_b(index, mixer, torch.bfloat16)
        keys = [prepare(each[: mixer.nope_dim].t().contiguous()) for each in made]
        return CppLatentAttention(
            mixer,
            self._layer_group(index, inputs),
            self._layer_group(index, q_b[0]) if q_b else None,
            self._group(keys),
            self._prepared(name, shapes, partial(self.weights.value_heads, index, mixer)),
            self._layer_group(index, out, scale),
            *self.weights.latent_norms(index, mixer),
        )

    def _layer_group(
        self, index: int, group: LinearGroup, scale: float = 1.0, parts: int = 1
    ) -> PreparedGroup:
        """One of a layer's, each linear in so many parts."""
        shapes = [
            (out // parts, group.in_features) for out in group.out_features for _ in range(parts)
        ]
        name = f"{self.weights.model.layer_name(index)}.{group.modules[0]}"
        read = partial(self.weights.group, index, group, parts)
        return self._prepared(name, shapes, read, scale)

    def _per_layer_inputs(self) -> CppPerLayerInputs | None:
        model = self.weights.model
        if (spec := model.per_layer_inputs) is None:
            return None
        width = model.num_layers * spec.width
        return CppPerLayerInputs(
            spec,
            self.weights.per_layer_embedding(torch.bfloat16).contiguous(),
            self._lone(f"{model.prefix}per_layer_model_projection", width, model.hidden_size),
            self.weights.norm(f"{model.prefix}per_layer_projection_norm", spec.width),
        )

    def _alt_up(self) -> CppAltUp | None:
        model = self.weights.model
        if (spec := model.alt_up) is None:
            return None
        names = [model.prefix + name for name in spec.projections]
        shape = model.hidden_size, model.hidden_size
        into = self._prepared(
            names[0], [shape] * len(names), lambda: [self.weights.linear(n, *shape) for n in names]
        )
        return CppAltUp(
            spec, into, [self._lone(model.prefix + name, *shape) for name in spec.unprojections]
        )

    def _laurel(self, index: int, spec: Laurel | None) -> CppLaurel | None:
        if spec is None:
            return None
        model = self.weights.model
        left, right = (self._layer_group(index, each) for each in spec.groups(model.hidden_size))
        norm = self.weights.norm(f"{model.layer_name(index)}.{spec.norm}", model.hidden_size)
        return CppLaurel(left, right, norm)

    def _lone(self, module: str, out_features: int, in_features: int) -> PreparedGroup:
        """A linear that is of no group."""
        shape = (out_features, in_features)
        return self._prepared(module, [shape], lambda: [self.weights.linear(module, *shape)])

    def _feed_forward(
        self, index: int, scale: float
    ) -> CppGatedMlp | CppExperts | CppMlpBesideExperts | None:
        spec = self.weights.model.layers[index].mlp
        if spec is None:
            return None
        if isinstance(spec, MlpBesideExperts):
            return self._mlp_beside_experts(index, spec)
        if isinstance(spec, Experts):
            router = self.weights.router(index, spec.names.router, spec.num_experts)
            return self._experts(index, spec, router, scale)
        return self._mlp(index, spec, spec.groups(self.weights.model.hidden_size), scale)

    def _mlp_beside_experts(self, index: int, spec: MlpBesideExperts) -> CppMlpBesideExperts:
        weights, hidden = self.weights, self.weights.model.hidden_size
        prefix = f"{weights.model.layer_name(index)}."
        experts = self._experts(index, spec.experts, weights.scaled_router(index, spec), 1.0)
        _, after_mlp, before_experts, after_experts = (
            weights.norm(prefix + name, hidden) for name in spec.norms
        )
        scales = weights.vector(f"{prefix}{spec.expert_scales}", spec.experts.num_experts)
        experts = replace(experts, norm=before_experts, scales=scales)
        mlp = self._mlp(index, spec.mlp, spec.mlp.groups(hidden), 1.0)
        return CppMlpBesideExperts(mlp, experts, after_mlp, after_experts, torch.ones(hidden))

    def _experts(self, index: int, spec: Experts, router: Tensor, scale: float) -> CppExperts:
        model, weights = self.weights.model, self.weights
        names, bias, gate = spec.names, None, None
        if spec.correction_bias:
            bias = weights.correction_bias(index, names.correction_bias, spec.num_experts)
        if spec.shared is not None and spec.shared.gated:
            gate = weights.router(index, names.shared_gate, 1)
        experts = [
            self._mlp(
                index, spec, pair, 1.0 if spec.latent_size and i < spec.num_experts else scale
            )
            for i, pair in enumerate(spec.members(model.hidden_size))
        ]
        shared = experts.pop() if spec.shared is not None else None
        own = weights.router_bias(index, names.router, spec.num_experts)
        latent = [
            self._layer_group(index, group, of)
            for group, of in zip(spec.latent_groups(model.hidden_size), (1.0, scale), strict=False)
        ]
        return CppExperts(spec, router, own, bias, experts, shared, gate, latent)

    def _mlp(
        self,
        index: int,
        spec: GatedMlp | PlainMlp | Experts,
        pair: tuple[LinearGroup, LinearGroup],
        scale: float,
    ) -> CppGatedMlp:
        """spec: which kind it is, or its experts are."""
        up, down = pair
        plain = isinstance(spec, PlainMlp) or (isinstance(spec, Experts) and spec.plain)
        parts = 1 if plain else 2 // len(up.modules)  # gates and ups, however stored
        return CppGatedMlp(
            spec.activation,
            self._layer_group(index, up, parts=parts),
            self._layer_group(index, down, scale),
            spec.clamp if isinstance(spec, Experts) else None,
            spec.deviations if isinstance(spec, GatedMlp) else None,
        )

    def _prepared(
        self,
        name: str,
        shapes: list[tuple[int, int]],
        read: Callable[[], list[Linear]],
        scale: float = 1.0,
    ) -> PreparedGroup:
        """The group from the cache; else made, and kept there unless it is dense, which is a copy and no more. Its
        products are multiplied by `scale`."""
        linears = self.cache.group(name, shapes) if self.cache is not None else None
        if linears is None:
            linears = [prepare(linear.weight, linear.bias) for linear in read()]
            if self.cache is not None and any(linear.format != lib.DENSE for linear in linears):
                self.cache.add(name, linears)
        return self._group([linear.scaled(scale) for linear in linears])

    def _group(self, linears: list[Prepared]) -> PreparedGroup:
        int8 = self.target.config.cpu_activations == "int8"
        for linear in linears:
            linear.move(self.arena)
            self.report.used[f"cpu-{self.pool.isa} {linear.describe(int8)}"] += 1
        return PreparedGroup(linears, int8)

    def _head(self, embedding: Tensor | None) -> Linear:
        if embedding is None:
            raise ValueError(
                "the last layers come with the embedding, to which the head may be tied"
            )
        head = self.weights.head(embedding)
        if self.head_bits == 8 and isinstance(head.weight, Tensor):
            return Linear(quantize_head(head.weight), head.bias)
        return head
