"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: each layer has one thing behind one norm, which is Mamba-2, attention
that encodes no positions, experts, or an MLP; MLPs have no gates."""

from dataclasses import replace

from ..errors import CheckpointError, UnsupportedError
from .base import (
    ExpertNames,
    Experts,
    LayerSpec,
    Mamba2,
    ModelSpec,
    Norms,
    PlainMlp,
    SharedExpert,
)
from .config import FULL, LINEAR, Config, llama_like
from .experts import experts, limited_groups
from .mamba import layer_types, mamba2

MOE, MLP = "moe", "mlp"
_LETTERS = {"M": LINEAR, "E": MOE, "*": FULL, "-": MLP}  # of hybrid_override_pattern
_DEFAULTS = {
    "hidden_size": 4096,
    "vocab_size": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
}
_MIXER = Norms(before_mixer="norm", before_mlp=None)
_MLP = Norms(before_mixer=None, before_mlp="norm")
_NAMES = ExpertNames(
    up="mixer.experts.*.up_proj",
    down="mixer.experts.*.down_proj",
    router="mixer.gate",
    correction_bias="mixer.gate.e_score_correction_bias",
    shared="mixer.shared_experts",
    shared_linears=("up_proj", "down_proj"),
    latent=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
)


def nemotron_h(config: Config) -> ModelSpec:
    for name, known in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if (value := config.get(name, known)) != known:
            raise UnsupportedError(f"config.json: {name} {value!r} is not supported ({known} is)")
    types = _types(config)
    config = config.with_defaults(**_DEFAULTS)
    config = Config({**config.values, "num_hidden_layers": len(types)})
    mlp = PlainMlp(config.size("intermediate_size"), "relu2", ("mixer.up_proj", "mixer.down_proj"))
    model = llama_like(
        config,
        ropes=[None] * config.size("num_hidden_layers"),
        attention={"module": "mixer", "out": "mixer.o_proj"},
        mlps=[mlp] * len(types),
        norm_eps=config.epsilon("layer_norm_epsilon", 1e-5),
        prefix="backbone.",
        embedding="embeddings",
        final_norm="norm_f",
    )
    kinds = {
        LINEAR: LayerSpec(_mamba2(config), None, _MIXER) if LINEAR in types else None,
        FULL: LayerSpec(model.layers[0].mixer, None, _MIXER),
        MOE: LayerSpec(None, _experts(config), _MLP) if MOE in types else None,
        MLP: LayerSpec(None, mlp, _MLP),
    }
    return replace(model, layers=tuple(layer for kind in types if (layer := kinds[kind])))


def _types(config: Config) -> list[str]:
    pattern = config.get("hybrid_override_pattern")
    fields = ("layers_block_type", "layer_types")
    if pattern is None or any(config.get(name) is not None for name in fields):
        return layer_types(config, fields, [LINEAR, MOE, FULL, MLP], (LINEAR, FULL, MOE, MLP))
    if not isinstance(pattern, str) or not pattern or set(pattern) - _LETTERS.keys():
        raise CheckpointError(
            f"config.json: hybrid_override_pattern is {str(pattern)[:80]!r}, want letters of {''.join(_LETTERS)}"
        )
    return [_LETTERS[letter] for letter in pattern]


def _mamba2(config: Config) -> Mamba2:
    """Its time_step_limit is the published implementation's; transformers 5.24 has time_step_min instead, which was
    meant for what training starts from (pull request 48989 there)."""
    return mamba2(
        config,
        heads=config.size("mamba_num_heads", 128),
        head_dim=config.size("mamba_head_dim", 64),
        state_dim=config.size("ssm_state_size", 128),
        num_groups=config.size("n_groups", config.size("mamba_n_groups", 8)),
        conv_kernel=config.size("conv_kernel", config.size("mamba_d_conv", 4)),
        conv_bias=config.flag("use_conv_bias", config.flag("mamba_conv_bias", True)),
        module="mixer",
    )


def _experts(config: Config) -> Experts:
    found = experts(
        config,
        "moe_intermediate_size",
        count=8,
        top_k=2,
        width=7688,
        activation="relu2",
        scoring="sigmoid",
        norm_weights=config.flag("norm_topk_prob", True),
        routed_scale=config.positive("routed_scaling_factor", 1.0),
        correction_bias=True,
        shared=SharedExpert(config.size("moe_shared_expert_intermediate_size", 7688)),
        plain=True,
        latent_size=config.optional_size("moe_latent_size"),
        names=_NAMES,
    )
    return replace(found, limited_groups=limited_groups(config, found.num_experts))
