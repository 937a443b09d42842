"""Layers whose kinds the C++ kernels know, and whose sizes they do not take: why not, in words."""

from ....architectures.base import (
    Attention,
    Experts,
    GatedDeltaNet,
    LatentAttention,
    LayerSpec,
    Mamba2,
    Mixer,
    MlpBesideExperts,
    ModelSpec,
    experts_of,
)
from ....kernels.cpu import library as lib

# of the kernels' scratch memory
_MAX_SHARED_HEADS, _MAX_HEAD_DIM, _MAX_WIDTH = 32, 1024, 65536
_MAX_STREAMS = 16  # kernels/cpu/alt_up.h
_MAX_LATENT_HEADS, _MAX_RANK, _MAX_TURNED = 128, 512, 256


def why_not(layer: LayerSpec, model: ModelSpec) -> str | None:
    """None if this layer of the model fits."""
    if reason := _why_not_mix(layer.mixer):
        return reason
    widths = _widths(layer, model)
    if any(width % 16 or width > _MAX_WIDTH for width in widths):
        return f"needs layers in multiples of 16 up to {_MAX_WIDTH}, not {widths}"
    if isinstance(layer.mlp, MlpBesideExperts) and layer.norms.after_mlp is None:
        return "has no MLP beside experts without a norm of their sum"
    if isinstance(layer.mlp, MlpBesideExperts) and _reads_more(layer.mlp.experts):
        return "has no latent space or gated shared expert beside an MLP"
    if model.alt_up is not None and model.alt_up.num_streams > _MAX_STREAMS:
        return f"has room for {_MAX_STREAMS} streams of hidden states"
    if len({each.rotation for each in model.cached.values()}) > lib.MAX_ROPES:
        return f"has room for {lib.MAX_ROPES} kinds of rotary embedding"
    return None


def _reads_more(experts: Experts) -> bool:
    """Whether more than the experts reads what they read."""
    gated = experts.shared is not None and experts.shared.gated
    return gated or experts.latent_size is not None


def _widths(layer: LayerSpec, model: ModelSpec) -> tuple[int, ...]:
    """Of all rows between linears."""
    widths: tuple[int, ...] = (model.hidden_size,)
    if layer.mlp is not None:
        widths += layer.mlp.widths
    if (experts := experts_of(layer.mlp)) is not None and experts.latent_size is not None:
        widths += (experts.latent_size,)
    if layer.mixer is not None:
        widths += (layer.mixer.groups(model.hidden_size)[-1].in_features,)
    if (told := model.per_layer_inputs) is not None:
        widths += (told.width,)
    if layer.laurel is not None:
        widths += (layer.laurel.rank,)
    return widths


def _why_not_mix(mixer: Mixer | None) -> str | None:
    if isinstance(mixer, Attention):
        return _why_not_attend(mixer)
    if isinstance(mixer, LatentAttention):
        return _why_not_attend_to_latents(mixer)
    if isinstance(mixer, GatedDeltaNet) and (mixer.key_dim % 16 or mixer.value_dim % 16):
        return f"has no delta rule for heads of {mixer.key_dim} and {mixer.value_dim} dimensions"
    if isinstance(mixer, Mamba2) and (mixer.head_dim % 16 or mixer.state_dim % 16):
        return f"has no state space for heads of {mixer.head_dim} and {mixer.state_dim} dimensions"
    return None


def _why_not_attend(mixer: Attention) -> str | None:
    shared = mixer.num_heads // mixer.num_kv_heads
    if mixer.head_dim % 16 or mixer.head_dim > _MAX_HEAD_DIM or shared > _MAX_SHARED_HEADS:
        return f"has no attention for {shared} heads of {mixer.head_dim} dimensions on one key-value head"
    if mixer.output_gate == "q_proj" and mixer.qk_norm == "all":
        return "has no norm of all heads where gates lie between them"
    if mixer.keys_are_values and mixer.qk_norm == "all":
        return "has no values that are keys before a norm of all of them"
    return None


def _why_not_attend_to_latents(mixer: LatentAttention) -> str | None:
    dims = (mixer.kv_rank, mixer.nope_dim, mixer.rope_dim, mixer.value_dim)
    whole = not any(dim % 16 for dim in (*dims, mixer.q_rank or 0))
    fits = mixer.num_heads <= _MAX_LATENT_HEADS and mixer.rope_dim <= _MAX_TURNED
    if not whole or not fits or mixer.kv_rank > _MAX_RANK:
        return f"has no attention to latents for {mixer.num_heads} heads with ranks and dimensions of {dims}"
    return None
