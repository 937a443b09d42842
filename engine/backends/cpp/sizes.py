"""Layers whose kinds the C++ kernels know, and whose sizes they do not take: why not, in words."""

from ....architectures.base import (
    Attention,
    Experts,
    GatedDeltaNet,
    LayerSpec,
    Mamba2,
    Mixer,
    ModelSpec,
)
from ....kernels.cpu import library as lib

# of the kernels' scratch memory
_MAX_SHARED_HEADS, _MAX_HEAD_DIM, _MAX_WIDTH = 32, 1024, 65536


def why_not(layer: LayerSpec, model: ModelSpec) -> str | None:
    """None if this layer of the model fits."""
    if reason := _why_not_mix(layer.mixer):
        return reason
    widths = _widths(layer, model)
    if any(width % 16 or width > _MAX_WIDTH for width in widths):
        return f"needs layers in multiples of 16 up to {_MAX_WIDTH}, not {widths}"
    ropes = {(each.rope, each.head_dim) for each in model.attention.values()}
    if len(ropes) > lib.MAX_ROPES:
        return f"has room for {lib.MAX_ROPES} kinds of rotary embedding"
    return None


def _widths(layer: LayerSpec, model: ModelSpec) -> tuple[int, ...]:
    """Of all rows between linears."""
    widths: tuple[int, ...] = (model.hidden_size,)
    if layer.mlp is not None:
        widths += layer.mlp.widths
    if isinstance(layer.mlp, Experts) and layer.mlp.latent_size is not None:
        widths += (layer.mlp.latent_size,)
    if layer.mixer is not None:
        widths += (layer.mixer.groups(model.hidden_size)[-1].in_features,)
    if (told := model.per_layer_inputs) is not None:
        widths += (told.width,)
    return widths


def _why_not_mix(mixer: Mixer | None) -> str | None:
    if isinstance(mixer, Attention):
        return _why_not_attend(mixer)
    if isinstance(mixer, GatedDeltaNet) and (mixer.key_dim % 16 or mixer.value_dim % 16):
        return f"has no delta rule for heads of {mixer.key_dim} and {mixer.value_dim} dimensions"
    if isinstance(mixer, Mamba2) and (mixer.head_dim % 16 or mixer.state_dim % 16):
        return f"has no state space for heads of {mixer.head_dim} and {mixer.state_dim} dimensions"
    return None


def _why_not_attend(mixer: Attention) -> str | None:
    shared = mixer.num_heads // mixer.num_kv_heads
    if mixer.head_dim % 16 or mixer.head_dim > _MAX_HEAD_DIM or shared > _MAX_SHARED_HEADS:
        return f"has no attention for {shared} heads of {mixer.head_dim} dimensions on one key-value head"
    if mixer.output_gate and mixer.qk_norm == "all":
        return "has no norm of all heads where gates lie between them"
    return None
