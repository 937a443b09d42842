"""Muse Glimmer (text): three layers with a window and a rotation to one that sees everything and has no positions;
linears of their own that gate what heads give, norms of heads without weights, norms around mixers and feed-forwards,
and of what is embedded."""

from .base import SANDWICH, ModelSpec
from .config import FULL, SLIDING, Config, head_dim, llama_like


def spec(config: Config) -> ModelSpec:
    config = config.with_defaults(head_dim=128, num_key_value_heads=2)
    layers = config.size("num_hidden_layers")
    every_fourth = [(layers - 1 - i) % 4 == 0 for i in range(layers)]
    types = config.layer_types([FULL if last else SLIDING for last in every_fourth])
    window, rope = config.optional_size("sliding_window", 2048), config.rope()
    turned = config.numbers_by_layer("layer_rope_theta", [not last for last in every_fourth])
    return llama_like(
        config,
        windows=[None if kind == FULL else window for kind in types],
        ropes=[rope if theta else None for theta in turned],  # as transformers: 0 or the model's
        attention={
            "scale": config.positive("qk_scale_factor", 3.87) * head_dim(config) ** -0.5,
            "qk_norm": "head",
            "head_norms": None,
            "output_gate": "gate_proj",
        },
        activation=config.activation("hidden_activation"),
        norms=SANDWICH,
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
        norm_offset=True,
        final_norm_offset=False,
        after_norm_eps=config.epsilon("post_norm_eps", 1e-8),
        embedding_norm=True,
        logits_scale=config.positive("output_multiplier", 0.19611613513818404),
        final_soft_cap=config.positive("final_logit_softcapping", 20.0),
    )
