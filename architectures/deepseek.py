"""DeepSeek V2 and V3, and who is built like them: latent attention, the first layers dense, then experts beside a
shared one. Youtu: V3's attention with dense layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from .base import ExpertNames, FeedForward, LatentAttention, ModelSpec, SharedExpert
from .config import Config, llama_like, yarn_sharpness
from .experts import experts, in_layers, limited_groups

_NORM_EPS = 1e-6  # of the norms of latents, whatever the file says of the others
_V3 = {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V2 = {
    "n_routed_experts": 64,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_YOUTU = {name: _V3[name] for name in _V3 if name.endswith(("_rank", "_dim"))}


def deepseek_v2(config: Config) -> ModelSpec:
    q_rank = config.optional_size("q_lora_rank", 1536)
    config = config.with_defaults(**_V2)
    config.refuse("norm_topk_prob", "weights are those of the softmax over all experts")
    limited, method = None, config.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        limited = limited_groups(config, config.size("n_routed_experts"), group_rank=1)
    elif method != "greedy":
        config.refuse("topk_method", "greedy and group_limited_greedy are")
    mlps = routed(
        config,
        width=1407,
        shared=2,
        scoring="softmax",
        correction_bias=False,
        limited_groups=limited,
        group_rank=2 if limited is None else 1,
    )
    return latent_like(config, q_rank, mlps, interleaved=True)


def deepseek_v3(config: Config) -> ModelSpec:
    q_rank = config.optional_size("q_lora_rank", 1536)
    config = config.with_defaults(**_V3, norm_topk_prob=True)
    mlps = routed(config, width=2048, shared=1)
    return latent_like(config, q_rank, mlps, num_draft_layers=draft_layers(config, 1))


def youtu(config: Config) -> ModelSpec:
    q_rank = config.optional_size("q_lora_rank", 1536)
    more = {"max_position_embeddings": 131072, "tie_word_embeddings": True}
    return latent_like(config.with_defaults(**_YOUTU, **more), q_rank, None)


def routed(
    config: Config,
    *,
    width: int,
    shared: int,
    sparse: Callable[[int], bool] | None = None,
    **more: Any,
) -> Sequence[FeedForward]:
    """One feed-forward a layer, V3's unless `more` says otherwise: fields of Experts. width, shared: an expert's, and
    how many of them the shared one is made of, where the file says nothing. sparse: whether a layer has experts,
    instead of first_k_dense_replace."""
    dense = config.count("first_k_dense_replace", 0)
    inner = config.size("moe_intermediate_size", width)
    fields: dict[str, Any] = {
        "scoring": "sigmoid",
        "correction_bias": True,
        "norm_weights": config.flag("norm_topk_prob", False),
        "routed_scale": config.positive("routed_scaling_factor", 1.0),
        "shared": SharedExpert(config.size("n_shared_experts", shared) * inner),
        "names": ExpertNames(shared="mlp.shared_experts"),
    }
    if "limited_groups" not in more:
        fields["limited_groups"] = limited_groups(config, config.size("n_routed_experts"))
    found = experts(
        config, "moe_intermediate_size", count=None, top_k=None, width=width, **fields | more
    )
    return in_layers(config, sparse or (lambda layer: layer >= dense), found, None)


def latent_like(
    config: Config,
    q_rank: int | None,
    mlps: Sequence[FeedForward] | None,
    *,
    interleaved: bool | None = None,
    rope_values: Mapping[str, Any] | None = None,
    **model: Any,
) -> ModelSpec:
    """A decoder with latent attention in every layer. interleaved: None where the file says it. mlps: one a layer, or
    those of intermediate_size. model: fields of ModelSpec."""
    spec = llama_like(heads_alone(config), mlps=mlps, **model)
    mixer = latent_attention(config, q_rank, interleaved, rope_values)
    return replace(spec, layers=tuple(replace(layer, mixer=mixer) for layer in spec.layers))


def heads_alone(config: Config) -> Config:
    """As llama_like reads it: all heads have keys of their own, and no rope is read."""
    heads = config.size("num_attention_heads")
    plain = {"num_key_value_heads": heads, "head_dim": 2, "partial_rotary_factor": None}
    return Config({**config.values, **plain, "rope_parameters": {}, "rope_scaling": None})


def draft_layers(config: Config, default: int) -> int:
    """Behind the others, in the checkpoints of those who predict several tokens."""
    return config.count("num_nextn_predict_layers", config.count("num_mtp_layers", default))


def latent_attention(
    config: Config,
    q_rank: int | None,
    interleaved: bool | None,
    rope_values: Mapping[str, Any] | None,
) -> LatentAttention:
    """rope_values: where the file has none."""
    rope_dim, nope_dim = config.size("qk_rope_head_dim"), config.size("qk_nope_head_dim")
    if rope_dim % 2:
        raise CheckpointError(f"config.json: qk_rope_head_dim is {rope_dim}, want an even number")
    said = Config(config.rope_values() or rope_values or {})
    turning = {name: said.values[name] for name in said.values if name != "partial_rotary_factor"}
    of_rope = Config({**config.values, "head_dim": rope_dim, "partial_rotary_factor": 1.0})
    if interleaved is None:
        interleaved = config.flag("rope_interleave", True)
    rope = replace(of_rope.rope(turning), interleaved=interleaved)
    scale = (nope_dim + rope_dim) ** -0.5
    if rope.scaling != "default" and (strength := said.number("mscale_all_dim", 0.0)):
        scale *= yarn_sharpness(said.positive("factor", 1.0), strength) ** 2
    beta = said.number("llama_4_scaling_beta", 0.0)
    return LatentAttention(
        config.size("num_attention_heads"),
        q_rank,
        config.size("kv_lora_rank"),
        nope_dim,
        rope_dim,
        config.size("v_head_dim"),
        scale,
        rope,
        _NORM_EPS,
        (beta, said.size("original_max_position_embeddings")) if beta else None,
    )
