"""Tiny seeded transformers models, saved as checkpoints: the oracle for the engine's device side."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    GraniteMoeSWAConfig,
    GraniteSWAConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Lfm3Config,
    LlamaConfig,
    Mamba2Config,
    MiniCPM3Config,
    Ministral3Config,
    MinistralConfig,
    Mistral4Config,
    Mistral4ForCausalLM,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    YoutuConfig,
)

# which transformers 5.24 lists only as the text model of what also sees
AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

_DELTA_NET = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2}
# time_step_min: transformers 5.24 takes it for what time_step_limit says (architectures/nemotron.py)
_NEMOTRON = {k: v for k, v in _SIZES.items() if k != "num_hidden_layers"} | {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "n_groups": 2,
    "time_step_min": 1e-12,
}
_QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}

_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_DEEPSEEK = _SIZES | {
    **_LATENT,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
}

CONFIGS = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama3-rope": LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE),
    "llama-linear-rope": LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral-window": MistralConfig(**_SIZES, sliding_window=24, head_dim=16),
    "ministral": MinistralConfig(
        **_SIZES,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "ministral3": Ministral3Config(
        **_SIZES,
        head_dim=16,
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    ),
    "smollm3": SmolLM3Config(**_SIZES),
    "phi3-partial": Phi3Config(
        **_SIZES,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "phi3-longrope": Phi3Config(
        **_SIZES,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + i / 8 for i in range(6)],
            "long_factor": [1.5 + i for i in range(6)],
        },
    ),
    "granite": GraniteConfig(**_SIZES, **_MULTIPLIERS),
    "granite-swa": GraniteSWAConfig(
        **_SIZES, **_MULTIPLIERS, sliding_window=24, layer_rope_theta=[0, 1e4, 5e4, 1e4]
    ),
    "olmo2": Olmo2Config(**_SIZES),
    "olmo3": Olmo3Config(
        **_SIZES,
        sliding_window=24,
        rope_parameters={
            "full_attention": _YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "seed-oss": SeedOssConfig(**_SIZES, head_dim=32, attention_bias=True),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32),
    "qwen2-moe": Qwen2MoeConfig(
        **_SIZES,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **_SIZES,
        head_dim=32,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "gpt-oss": GptOssConfig(
        **_SIZES | {"intermediate_size": 64},
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=24,
        swiglu_limit=0.7,
        rope_parameters=_YARN | {"truncate": False},
    ),
    "olmoe": OlmoeConfig(**_SIZES, num_experts=8, num_experts_per_tok=3),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, sliding_window=24),
    "granitemoe": GraniteMoeConfig(
        **_SIZES,
        num_local_experts=8,
        **_MULTIPLIERS,
    ),
    "granitemoe-shared": GraniteMoeSharedConfig(
        **_SIZES, **_MULTIPLIERS, num_local_experts=8, shared_intermediate_size=80
    ),
    "granitemoe-swa": GraniteMoeSWAConfig(
        **_SIZES,
        **_MULTIPLIERS,
        num_local_experts=8,
        shared_intermediate_size=80,
        sliding_window=24,
        layer_rope_theta=[0, 1e4, 5e4, 1e4],
    ),
    "bamba": BambaConfig(**_SIZES, **_MAMBA, attn_layer_indices=[1]),
    "mamba2": Mamba2Config(
        **{
            k: v for k, v in _SIZES.items() if k not in ("num_attention_heads", "intermediate_size")
        },
        num_heads=8,
        head_dim=16,
        state_size=32,
        n_groups=2,
        use_bias=True,
        tie_word_embeddings=True,
    ),
    "granite4": GraniteMoeHybridConfig(
        **_SIZES,
        **_MULTIPLIERS,
        **_MAMBA,
        num_local_experts=8,
        shared_intermediate_size=80,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    ),
    "granite4-dense": GraniteMoeHybridConfig(
        **_SIZES,
        **_MULTIPLIERS,
        **_MAMBA | {"mamba_d_conv": 3, "mamba_conv_bias": False},
        num_local_experts=0,
        shared_intermediate_size=96,
        position_embedding_type="rope",
        time_step_limit=(0.3, 1.2),
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    ),
    "nemotron-h": NemotronHConfig(
        **_NEMOTRON,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
    ),
    "nemotron3": NemotronHConfig(
        **_NEMOTRON,
        layers_block_type=["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.8,
    ),
    "nemotron3-latent": NemotronHConfig(
        **_NEMOTRON,
        layers_block_type=["moe", "linear_attention", "full_attention", "moe"],
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80,
        moe_latent_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
    ),
    "dots1": Dots1Config(
        **_SIZES,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        first_k_dense_replace=1,
        sliding_window=24,
        max_window_layers=2,
    ),
    "deepseek-v2": DeepseekV2Config(
        **_DEEPSEEK,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "deepseek-v2-lite": DeepseekV2Config(
        **_DEEPSEEK | {"q_lora_rank": None, "moe_intermediate_size": 64}
    ),
    "deepseek-v3": DeepseekV3Config(
        **_DEEPSEEK,
        n_group=4,
        topk_group=2,
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "youtu": YoutuConfig(**_SIZES | _LATENT, rope_interleave=False, attention_bias=True),
    "glm4-moe": Glm4MoeConfig(
        **{k: v for k, v in _DEEPSEEK.items() if k not in _LATENT},
        num_key_value_heads=2,
        head_dim=32,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "glm4-moe-lite": Glm4MoeLiteConfig(
        **{k: v for k, v in _DEEPSEEK.items() if k != "first_k_dense_replace"}
    ),
    "minicpm3": MiniCPM3Config(
        **_SIZES | _LATENT,
        scale_emb=3.0,
        scale_depth=1.4,
        dim_model_base=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 4 for i in range(8)],
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 256,
        },
    ),
    "mistral4": Mistral4Config(
        **_DEEPSEEK,
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    ),
    "qwen3.5": Qwen3_5TextConfig(
        **_SIZES,
        **_DELTA_NET,
        tie_word_embeddings=True,
        rope_parameters=_QUARTER | {"mrope_section": [2, 1, 1]},
    ),
    "lfm2": Lfm2Config(
        **_SIZES | {"intermediate_size": 120},
        block_multiple_of=16,
        layer_types=["conv", "full_attention", "conv", "conv"],
    ),
    "lfm2-biased": Lfm2Config(
        **_SIZES,
        block_auto_adjust_ff_dim=False,
        conv_L_cache=4,
        conv_bias=True,
        tie_word_embeddings=False,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "lfm3": Lfm3Config(
        **_SIZES | {"num_hidden_layers": 5},
        head_dim=16,
        sliding_window=24,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "lfm3-plain": Lfm3Config(
        **_SIZES,
        head_dim=32,
        sliding_window=24,
        conv_bias=True,
        attention_bias=True,
        use_sandwich_norm=False,
        use_attention_gate=False,
        layer_types=["sliding_attention", "conv", "full_attention", "conv"],
    ),
    "lfm2-moe": Lfm2MoeConfig(
        **_SIZES,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        num_dense_layers=1,
        routed_scaling_factor=1.7,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(
        **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
        **_DELTA_NET,
        rope_parameters=_QUARTER,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        num_experts=8,
        num_experts_per_tok=3,
    ),
    "qwen3-next": Qwen3NextConfig(
        **_SIZES,
        **_DELTA_NET,
        rope_parameters=_QUARTER,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "qwen2-upper-window": Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=2
    ),
    "gemma": GemmaConfig(**_SIZES, head_dim=32),
    "gemma2": Gemma2Config(
        **_SIZES,
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3n": Gemma3nTextConfig(
        **_SIZES | {"num_hidden_layers": 6},
        head_dim=32,
        sliding_window=24,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=150,
        num_kv_shared_layers=2,
        laurel_rank=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.9, 0.6, 0.0, 0.5, 0.0, 0.0],
        final_logit_softcapping=5.0,
    ),
    "gemma3n-second": Gemma3nTextConfig(
        **_SIZES,
        head_dim=32,
        sliding_window=24,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=199,
        num_kv_shared_layers=0,
        laurel_rank=16,
        altup_num_inputs=3,
        altup_active_idx=1,
        altup_correct_scale=False,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4": Gemma4TextConfig(
        **_SIZES | {"num_hidden_layers": 6},
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=24,
        hidden_size_per_layer_input=0,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
        final_logit_softcapping=5.0,
    ),
    "gemma4-shared": Gemma4TextConfig(
        **_SIZES | {"num_hidden_layers": 6},
        head_dim=16,
        global_head_dim=32,
        sliding_window=24,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=199,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "gemma4-moe": Gemma4TextConfig(
        **_SIZES,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=24,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=3,
        moe_intermediate_size=48,
    ),
    "gemma4-unified": Gemma4UnifiedTextConfig(
        **_SIZES,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma3": Gemma3TextConfig(
        **_SIZES,
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


MOE = {"qwen2-moe", "qwen3-moe", "olmoe", "mixtral", "granitemoe", "dots1"}
MOE |= {"qwen3.5-moe", "qwen3-next", "lfm2-moe", "gpt-oss", "gemma4-moe"}
MOE |= {"deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "glm4-moe", "glm4-moe-lite"}
MOE |= {"mistral4"}
MOE |= {"granite4", "nemotron3", "nemotron3-latent", "granitemoe-shared", "granitemoe-swa"}
LATENT = {"deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "glm4-moe-lite", "mistral4"}
LATENT |= {"youtu", "minicpm3"}
RECURRENT = {"qwen3.5", "qwen3.5-moe", "qwen3-next", "lfm2", "lfm2-biased", "lfm2-moe"}
RECURRENT |= {"lfm3", "lfm3-plain", "bamba", "mamba2"}
RECURRENT |= {"granite4", "granite4-dense", "nemotron-h", "nemotron3", "nemotron3-latent"}


def build(name: str, folder: Path, **changes) -> PreTrainedModel:
    """A float32 model with weights large enough that mistakes show, saved into `folder`. changes: to its config."""
    torch.manual_seed(7)
    config = CONFIGS[name].from_dict(CONFIGS[name].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.5 + torch.rand(()).item())
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    model.save_pretrained(folder)
    return model
