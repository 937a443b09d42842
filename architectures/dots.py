"""dots.llm1: Qwen 3's attention; experts chosen as DeepSeek V3 does (sigmoid, a bias to choose by, within groups),
shared ones beside them, the first layers dense."""

from .base import ExpertNames, ModelSpec, SharedExpert
from .config import FULL, SLIDING, Config, llama_like
from .experts import experts, in_layers, limited_groups

_WIDTH = 1408  # of an expert, where config.json says nothing


def dots1(config: Config) -> ModelSpec:
    layers, first = config.size("num_hidden_layers"), config.get("max_window_layers", 62)
    null = config.values.get("sliding_window", 0) is None
    window = None if null else config.size("sliding_window", 4096)
    types = config.layer_types(
        [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    )
    dense = config.get("first_k_dense_replace", 0)
    shared = config.size("n_shared_experts") * config.size("moe_intermediate_size", _WIDTH)
    found = experts(
        config,
        "moe_intermediate_size",
        count=None,
        top_k=None,
        width=_WIDTH,
        scoring="sigmoid",
        norm_weights=config.flag("norm_topk_prob", False),
        routed_scale=config.positive("routed_scaling_factor", 1.0),
        correction_bias=True,
        limited_groups=limited_groups(config, config.size("n_routed_experts")),
        shared=SharedExpert(shared),
        names=ExpertNames(shared="mlp.shared_experts"),
    )
    return llama_like(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        attention={"qk_norm": "head"},
        mlps=in_layers(config, lambda layer: layer >= dense, found, 10944),
    )
