"""The Triton backend: which layers its kernels compute where. Weights are loaded as torch's are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....architectures.base import (
    Attention,
    GatedDeltaNet,
    LatentAttention,
    LayerSpec,
    Mamba2,
    Mixer,
    ModelSpec,
)
from ....kernels.device import cuda_capability, why_no_triton
from ....quant.checkpoint import Checkpoint
from ..base import Progress, Target, unknown_feature
from ..torch.loader import TorchBackend

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
            "plain_mlp",
            "plain_mlp.activation=silu",
            "plain_mlp.activation=gelu_tanh",
            "plain_mlp.activation=relu2",
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
        return None

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
        from .decoder import (
            TritonDecoder,
        )  # imports Triton, which a machine without a GPU need not have

        weights = TorchBackend(self.target).load(checkpoint, model, layers, progress)
        return TritonDecoder(weights, self.target.config)


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
