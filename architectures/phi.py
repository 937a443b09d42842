"""Phi 3 and 4: Llama whose q, k, v and gate, up are stored as one matrix each; Phi 4 mini turns a part of each head.

Those with 128k tokens have LongRoPE, which older files call "su" or, like transformers' own, "yarn".
"""

from .base import ModelSpec
from .config import Config, llama_like


def phi3(config: Config) -> ModelSpec:
    config = config.with_defaults(
        max_position_embeddings=4096, original_max_position_embeddings=4096
    )
    window, rope = config.optional_size("sliding_window"), config.rope_values()
    if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):
        rope = {**rope, "rope_type": "longrope"}
    return llama_like(
        config,
        windows=[window] * config.size("num_hidden_layers"),
        ropes=[config.rope(rope)] * config.size("num_hidden_layers"),
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
        fused=True,
    )
