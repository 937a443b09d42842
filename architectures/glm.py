"""GLM 4.5 to 4.7: grouped-query attention of which half of a head turns, experts as DeepSeek V3 has them; Flash
("lite") has its latent attention, too."""

from collections.abc import Sequence

from ..errors import CheckpointError
from .base import FeedForward, ModelSpec
from .config import Config, llama_like
from .deepseek import draft_layers, latent_like, routed

_DENSE, _SPARSE = "dense", "sparse"
_MOE = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "norm_topk_prob": True,
}
_LITE = {
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 202752,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "norm_topk_prob": True,
}


def glm4_moe(config: Config) -> ModelSpec:
    config = config.with_defaults(**_MOE)
    return llama_like(
        config,
        attention={"qk_norm": "head"} if config.flag("use_qk_norm", False) else None,
        mlps=routed(config, width=1408, shared=1),
        num_draft_layers=draft_layers(config, 1),
    )


def glm4_moe_lite(config: Config) -> ModelSpec:
    q_rank = config.optional_size("q_lora_rank", 768)
    config = config.with_defaults(**_LITE)
    return latent_like(config, q_rank, _mlps(config), num_draft_layers=draft_layers(config, 0))


def _mlps(config: Config) -> Sequence[FeedForward]:
    """One a layer, as mlp_layer_types says; without it, the first is dense."""
    layers = config.size("num_hidden_layers")
    types = config.get("mlp_layer_types", [_DENSE] + [_SPARSE] * (layers - 1))
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"config.json: mlp_layer_types is no list of {layers} layers")
    if unknown := [kind for kind in types if kind not in (_DENSE, _SPARSE)]:
        raise CheckpointError(
            f"config.json: mlp_layer_types has {unknown[0]!r}, want {_DENSE} or {_SPARSE}"
        )
    return routed(config, width=1536, shared=1, sparse=lambda layer: types[layer] == _SPARSE)
