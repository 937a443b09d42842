"""Fields of config.json that make no sense, for every architecture: an error that says so, whatever they are."""

import dataclasses
import math
from typing import Any

import pytest

from nibble.architectures.base import (
    Attention,
    FeedForward,
    GatedMlp,
    LatentAttention,
    PlainMlp,
)
from nibble.architectures.multimodal import CLASSES
from nibble.architectures.registry import ARCHITECTURES, model_spec
from nibble.errors import UserError

from .test_specs import NEEDED

GOOD: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
NONSENSE = ["x", [], ["a"], {"a": 1}, -1, 0, 2.5, True, 10**9, 10**400, math.nan, math.inf]
FIELDS = [
    *GOOD,
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rope_local_base_freq",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_bias",
    "tie_word_embeddings",
    "hidden_act",
    "hidden_activation",
    "enable_moe_block",
    "top_k_experts",
    "qk_scale_factor",
    "output_multiplier",
    "post_norm_eps",
    "partial_rotary_factor",
    "no_rope_layers",
    "no_rope_layer_interval",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "decoder_sparse_step",
    "mlp_only_layers",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "full_attention_interval",
    "swiglu_alpha",
    "swiglu_limit",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "topk_method",
    "mlp_layer_types",
    "num_nextn_predict_layers",
    "scale_emb",
    "scale_depth",
    "dim_model_base",
    "use_qk_norm",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_conv_kernel_dim",
    "layers_block_type",
    "hybrid_override_pattern",
    "layer_rope_theta",
    "position_embedding_type",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
    "use_conv_bias",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_n_groups",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_conv_bias",
    "num_heads",
    "state_size",
    "expand",
    "attn_layer_indices",
    "use_sandwich_norm",
    "use_attention_gate",
    "conv_L_cache",
    "time_step_limit",
    "layer_norm_epsilon",
    "mlp_hidden_act",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_nonsense_is_an_error_or_a_model(architecture: Any) -> None:
    names = None if architecture.name in CLASSES else [architecture.name]  # None: by model_type
    good = GOOD | {"architectures": names, "model_type": architecture.model_type}
    good |= {"hidden_act": "silu"}
    good |= NEEDED.get(architecture.model_type, {})
    if "gemma" in architecture.model_type:
        good["hidden_activation"] = "gelu_pytorch_tanh"
    assert model_spec(good).num_layers == 4
    for field in FIELDS:
        for value in NONSENSE:
            try:
                spec = model_spec(good | {"use_sliding_window": True} | {field: value})
            except UserError as error:
                assert "\n" not in str(error), (field, value)
            else:
                assert 0 < spec.num_layers <= 1024, (field, value)
                for layer in spec.layers:
                    mixer = layer.mixer
                    if mixer is None:
                        assert all(map(is_positive, _sizes(layer.mlp))), (field, value)
                        continue
                    if isinstance(mixer, LatentAttention):
                        numbers = (mixer.num_heads, mixer.q_rank or 1, mixer.kv_rank)
                        numbers += (mixer.nope_dim, mixer.rope_dim, mixer.value_dim, mixer.scale)
                        numbers += (mixer.rope.theta, *_sizes(layer.mlp))
                        numbers += (spec.embedding_scale, spec.residual_scale, spec.logits_scale)
                        assert all(map(is_positive, numbers)), (field, value, numbers)
                        continue
                    if not isinstance(mixer, Attention):
                        sizes = [
                            n for n in dataclasses.astuple(mixer)[:5] if not isinstance(n, bool)
                        ]
                        assert all(map(is_positive, sizes)), (field, value, mixer)
                        continue
                    theta = mixer.rope.theta if mixer.rope else 1.0
                    numbers = (mixer.scale, theta, mixer.soft_cap or 1.0, spec.norm_eps)
                    window = 1 if mixer.window is None else mixer.window
                    numbers += (spec.embedding_scale, window, _turning(mixer))
                    numbers += _sizes(layer.mlp)
                    good_ones = (is_positive(number) for number in numbers)
                    assert all(good_ones), (field, value, numbers)


def _sizes(mlp: FeedForward | None) -> tuple[float, ...]:
    if mlp is None:
        return ()
    if isinstance(mlp, GatedMlp | PlainMlp):
        return (mlp.intermediate_size,)
    sizes = (mlp.num_experts, mlp.top_k, mlp.intermediate_size, mlp.routed_scale)
    return (*sizes, mlp.num_experts + 1 - mlp.top_k)


def _turning(mixer: Attention) -> int:
    """Dimensions of a head that turn, where they make no sense 0; all of them also where none do."""
    if mixer.rope is None or mixer.rope.dim is None:
        return mixer.head_dim
    return mixer.rope.dim if mixer.rope.dim % 2 == 0 and mixer.rope.dim < mixer.head_dim else 0


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_size_beyond_its_bound_is_named(field: str) -> None:
    with pytest.raises(UserError, match=f"config.json: {field} is more than"):
        model_spec(GOOD | {"architectures": ["LlamaForCausalLM"], field: 10**9})
