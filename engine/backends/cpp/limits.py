"""What the C++ kernels have room for in a mixer, in words where it is more."""

from ....architectures.base import Attention, GatedDeltaNet, LatentAttention, ShortConv

# of the kernels' scratch memory
_MAX_SHARED_HEADS, _MAX_HEAD_DIM = 32, 1024
_MAX_LATENT_HEADS, _MAX_RANK, _MAX_TURNED = 128, 512, 256


def why_not_mix(mixer: Attention | LatentAttention | GatedDeltaNet | ShortConv) -> str | None:
    """None if a mixer's sizes are what the kernels are made for."""
    if isinstance(mixer, Attention):
        return _why_not_attend(mixer)
    if isinstance(mixer, LatentAttention):
        return _why_not_attend_to_latents(mixer)
    if isinstance(mixer, GatedDeltaNet) and (mixer.key_dim % 16 or mixer.value_dim % 16):
        return f"has no delta rule for heads of {mixer.key_dim} and {mixer.value_dim} dimensions"
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
