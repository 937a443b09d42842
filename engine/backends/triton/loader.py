"""The Triton backend: which layers its kernels compute where. Weights are loaded as torch's are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....architectures.base import (
    Attention,
    Experts,
    GatedDeltaNet,
    LatentAttention,
    LayerSpec,
    Mamba2,
    Mixer,
    ModelSpec,
    experts_of,
)
from ....kernels.device import cuda_capability, why_no_triton
from ....kernels.moe.routing import MAX_EXPERTS
from ....quant.checkpoint import Checkpoint
from ..base import KernelReport, Progress, Target, unknown_feature
from ..weights import ModelWeights

if TYPE_CHECKING:
    from .decoder import TritonDecoder

_MAX_NORM_WIDTH = 32768  # kernels/fused/norm.py: a row in the registers of one program
_MAX_RANK = 512  # kernels/attention/latent.py
_MAX_STATE_ROWS = 512  # kernels/recurrent: some columns of a state in the registers of one warp


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """Triton's kernels and CUDA graphs, in 16 bits on a CUDA device."""

    target: Target
    name = "triton"
    features = frozenset(
        {
            "model",
            "model.norm_offset",
            "model.embedding_scale",
            "model.residual_scale",
            "model.logits_scale",
            "model.final_soft_cap",
            "model.final_norm_offset",
            "model.after_norm_eps",
            "model.embedding_norm",
            "per_layer_inputs",
            "per_layer_inputs.activation=silu",
            "per_layer_inputs.activation=gelu_tanh",
            "alt_up",
            "alt_up.scaled",
            "laurel",
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
            "attention.output_gate=q_proj",
            "attention.output_gate=gate_proj",
            "attention.head_gate",
            "latent_attention",
            "latent_attention.q_rank=None",
            "latent_attention.query_scaling",
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
            "rope.scaling=longrope",
            "rope.scaling=proportional",
            "rope.dim",
            "rope.attention_factor",
            "rope.interleaved",
            "long_factors",
            "gated_mlp",
            "gated_mlp.activation=silu",
            "gated_mlp.activation=gelu_tanh",
            "gated_mlp.activation=relu2",
            "gated_mlp.sparsity",
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
            "experts.group_rank",
            "shared_expert",
            "shared_expert.gated",
            "mlp_beside_experts",
        }
    )

    def unavailable(self) -> str | None:
        if self.target.device.type != "cuda":
            return f"runs on a CUDA device, not on {self.target.device.type}"
        return why_no_triton(self.target.device, self.target.dtype)

    def why_not(self, layer: LayerSpec, model: ModelSpec) -> str | None:
        if reason := unknown_feature(self.features, layer, model):
            return reason
        if layer.mixer is not None and (reason := _why_not_mixer(layer.mixer)):
            return reason
        if isinstance(layer.mixer, LatentAttention) and (reason := self._why_no_latents()):
            return reason
        if (width := _widest_norm(layer.mixer, model)) > _MAX_NORM_WIDTH:
            return f"has no norm for {width} numbers"
        found = experts_of(layer.mlp)
        return None if found is None else _why_not_routed(found)

    def _why_no_latents(self) -> str | None:
        if self.target.config.kv_cache_dtype != "auto":
            return "keeps latents in 16 bits alone"
        cc = cuda_capability(self.target.device)
        if cc is not None and cc < 80:
            return f"attends to latents from compute capability 8.0 on, this card has {cc / 10}"
        return None

    def load(
        self, checkpoint: Checkpoint, model: ModelSpec, layers: range, progress: Progress
    ) -> "TritonDecoder":
        # imports Triton, which a machine without a GPU need not have
        from .decoder import TritonDecoder
        from .feed_forward import TritonLoader

        loader = TritonLoader(ModelWeights(checkpoint, model), self.target, KernelReport())
        return TritonDecoder(loader.load(layers, progress), self.target.config)


def _why_not_mixer(mixer: Mixer) -> str | None:
    if isinstance(mixer, Attention):
        if not 16 <= mixer.head_dim <= 256 or mixer.head_dim % 2:
            return f"has no attention for heads of {mixer.head_dim} dimensions"
    elif isinstance(mixer, LatentAttention):
        if mixer.kv_rank > _MAX_RANK:
            return f"has no attention over latents of {mixer.kv_rank} dimensions"
    elif isinstance(mixer, GatedDeltaNet | Mamba2):
        rows = mixer.state_shapes[1][1]
        if rows > _MAX_STATE_ROWS:
            return f"has no recurrence for states of {rows} rows"
    return None


def _widest_norm(mixer: Mixer | None, model: ModelSpec) -> int:
    """Numbers that one program norms."""
    widest = model.hidden_size
    if isinstance(mixer, Attention) and mixer.qk_norm == "all":
        widest = max(widest, mixer.num_heads * mixer.head_dim)
    elif isinstance(mixer, Mamba2):
        widest = max(widest, mixer.values // mixer.num_groups)
    return widest


def _why_not_routed(experts: Experts) -> str | None:
    if experts.num_experts > MAX_EXPERTS:
        return f"does not choose among {experts.num_experts} experts"
    if experts.limited_groups is not None:
        groups, best = experts.limited_groups
        if experts.top_k > (left := best * experts.num_experts // groups):
            return f"does not choose {experts.top_k} experts of the {left} in the best groups"
    return None
