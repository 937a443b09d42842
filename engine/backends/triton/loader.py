"""The Triton backend: which layers its kernels compute where. Weights are loaded as torch's are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....architectures.base import Attention, Experts, LayerSpec, ModelSpec, experts_of
from ....kernels.device import why_no_triton
from ....kernels.moe.routing import MAX_EXPERTS
from ....quant.checkpoint import Checkpoint
from ..base import KernelReport, Progress, Target, unknown_feature
from ..weights import ModelWeights

if TYPE_CHECKING:
    from .decoder import TritonDecoder

_MAX_NORM_WIDTH = 32768  # kernels/fused/norm.py: a row in the registers of one program


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
            "layer",
            "norms",
            "norms.after_mixer",
            "norms.after_mlp",
            "attention",
            "attention.window",
            "attention.rope=None",
            "attention.qk_norm=head",
            "attention.query_scaling",
            "attention.soft_cap",
            "attention.sinks",
            "rope",
            "rope.scaling=default",
            "rope.scaling=linear",
            "rope.scaling=llama3",
            "rope.scaling=yarn",
            "rope.scaling=longrope",
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
        mixer = layer.mixer
        if not isinstance(mixer, Attention):
            return "computes no mixer but attention"
        if mixer.query_scaling is not None and mixer.qk_norm is not None:
            return "does not scale queries that are normed"
        if model.residual_scale != 1.0 and (layer.norms.after_mixer or layer.norms.after_mlp):
            return "does not scale what was normed before it is added"
        if not 16 <= mixer.head_dim <= 256 or mixer.head_dim % 2:
            return f"has no attention for heads of {mixer.head_dim} dimensions"
        if model.hidden_size > _MAX_NORM_WIDTH:
            return f"has no norm for a hidden size of {model.hidden_size}"
        found = experts_of(layer.mlp)
        return None if found is None else _why_not_routed(found)

    def load(
        self, checkpoint: Checkpoint, model: ModelSpec, layers: range, progress: Progress
    ) -> "TritonDecoder":
        # imports Triton, which a machine without a GPU need not have
        from .decoder import TritonDecoder
        from .feed_forward import TritonLoader

        loader = TritonLoader(ModelWeights(checkpoint, model), self.target, KernelReport())
        return TritonDecoder(loader.load(layers, progress), self.target.config)


def _why_not_routed(experts: Experts) -> str | None:
    if experts.num_experts > MAX_EXPERTS:
        return f"does not choose among {experts.num_experts} experts"
    if experts.limited_groups is not None:
        groups, best = experts.limited_groups
        if experts.top_k > (left := best * experts.num_experts // groups):
            return f"does not choose {experts.top_k} experts of the {left} in the best groups"
    return None
