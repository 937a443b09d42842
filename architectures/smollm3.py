"""SmolLM 3: Llama with layers that encode no positions, each fourth unless the file says which."""

from ..errors import CheckpointError
from .base import ModelSpec
from .config import FULL, SLIDING, Config, llama_like


def spec(config: Config) -> ModelSpec:
    layers, every = config.size("num_hidden_layers"), config.size("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if not isinstance(turned, list) or len(turned) < layers:
        raise CheckpointError(f"config.json: no_rope_layers has no {layers} entries")
    turned = turned[:layers]
    windowed = config.flag("use_sliding_window", False)
    window = config.optional_size("sliding_window") if windowed else None
    types = config.layer_types([FULL if window is None or t else SLIDING for t in turned])
    rope = config.rope(theta=2e6)
    return llama_like(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        ropes=[rope if t else None for t in turned],
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
    )
