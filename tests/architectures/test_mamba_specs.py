"""Models with Mamba-2 layers: config.json -> ModelSpec, in each family's spelling, or one clear line. Logits:
tests/engine/backends, the sweep."""

import math

import pytest

from nibble.architectures.base import Attention, Experts, GatedMlp, LayerSpec, Mamba2, PlainMlp
from nibble.architectures.registry import model_spec
from nibble.errors import UserError

NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"],
    "hidden_size": 64,
    "vocab_size": 199,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "n_groups": 2,
}
GRANITE = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "hidden_size": 64,
    "vocab_size": 199,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
}


def kinds(config: dict) -> list[tuple[type, type]]:
    return [(type(layer.mixer), type(layer.mlp)) for layer in model_spec(config).layers]


def test_a_layer_of_nemotron_is_one_thing_behind_one_norm() -> None:
    """In the words of transformers, those of before, and the letters of published files, which say it in all cases."""
    nothing = type(None)
    want = [(Mamba2, nothing), (nothing, Experts), (Attention, nothing), (nothing, PlainMlp)]
    words = ["linear_attention", "moe", "full_attention", "mlp"]
    assert kinds(NEMOTRON | {"layers_block_type": words, "num_hidden_layers": 99}) == want
    assert kinds(NEMOTRON | {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}) == want
    assert kinds(NEMOTRON | {"hybrid_override_pattern": "ME*-"}) == want
    assert kinds(NEMOTRON) == want  # where the file says nothing
    mamba, moe, *_ = model_spec(NEMOTRON).layers
    assert (mamba.norms.before_mixer, mamba.norms.before_mlp) == ("norm", None)
    assert (moe.norms.before_mixer, moe.norms.before_mlp) == (None, "norm")
    assert moe.mlp.plain and moe.mlp.activation == "relu2"


def test_the_steps_of_nemotron_have_the_limit_of_the_published_implementation() -> None:
    """Not time_step_min, which training starts from, and transformers 5.24 takes for it in prompts alone."""

    def limit(**said: object) -> tuple[float, float]:
        return model_spec(NEMOTRON | said).layers[0].mixer.time_step_limit

    assert limit(time_step_min=0.001) == (0.0, math.inf)
    assert limit(time_step_limit=[0.0, math.inf]) == (0.0, math.inf)
    assert limit(time_step_limit=[0.1, {"__float__": "Infinity"}]) == (0.1, math.inf)
    assert limit(time_step_limit=[0, 2]) == (0.0, 2.0)


def test_granite_4_has_its_mlp_beside_experts_or_alone() -> None:
    both = GRANITE | {"layer_types": ["mamba", "attention"], "num_local_experts": 4}
    assert kinds(both) == [(Mamba2, Experts), (Attention, Experts)]
    first, second = model_spec(both).layers
    assert first.mlp.shared.intermediate_size == 80 and first.mlp.intermediate_size == 48
    assert first.mixer.head_dim == 16 and second.mixer.rope is None
    assert kinds(both | {"num_local_experts": 0}) == [(Mamba2, GatedMlp), (Attention, GatedMlp)]
    turns = model_spec(both | {"position_embedding_type": "rope"})
    assert turns.layers[1].mixer.rope is not None


def test_a_layer_without_a_part_has_nothing_of_it() -> None:
    whole, mixer, mlp = (
        LayerSpec(a, b)
        for a, b in (
            (Mamba2(2, 16, 16, 1, 4), PlainMlp(32, "relu2")),
            (Mamba2(2, 16, 16, 1, 4), None),
            (None, PlainMlp(32, "relu2")),
        )
    )
    assert whole.groups(64) == mixer.groups(64) + mlp.groups(64)
    assert whole.folds(64) == mixer.folds(64) + mlp.folds(64)
    assert mixer.state_shapes == ((3, 64), (2, 16, 16)) and mlp.state_shapes == ()
    assert mixer.as_stored == ("mamba.A_log", "mamba.dt_bias", "mamba.D") and mlp.as_stored == ()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (NEMOTRON | {"n_groups": 3}, "3 groups cannot serve 8 Mamba heads"),
        (NEMOTRON | {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern is 'MX'"),
        (NEMOTRON | {"hybrid_override_pattern": ""}, "hybrid_override_pattern is ''"),
        (NEMOTRON | {"layers_block_type": []}, "layers_block_type is '[]', want layer types"),
        (NEMOTRON | {"layers_block_type": ["conv"]}, "layer type 'conv' is not supported"),
        (NEMOTRON | {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported"),
        (NEMOTRON | {"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu' is not supported"),
        (NEMOTRON | {"time_step_limit": [1.0, 0.5]}, "time_step_limit is [1.0, 0.5]"),
        (NEMOTRON | {"time_step_limit": [0.0]}, "time_step_limit is [0.0]"),
        (NEMOTRON | {"time_step_limit": [0.0, "a"]}, "time_step_limit is [0.0, 'a']"),
        (NEMOTRON | {"mamba_num_heads": 10**6}, "mamba_num_heads is more than 4096"),
        (GRANITE | {"mamba_d_head": 8}, "8 Mamba heads of 8 are not the 128"),
        (GRANITE | {"mamba_n_heads": 7}, "7 Mamba heads of 18 are not the 128"),
        (GRANITE | {"layer_types": ["mamba"]}, "layer_types has 1 entries for 2 layers"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_names_the_field(config: dict, said: str) -> None:
    with pytest.raises(UserError, match="config.json") as error:
        model_spec(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_theta_of_zero_is_a_layer_of_granite_without_positions() -> None:
    swa = {
        "architectures": ["GraniteSWAForCausalLM"],
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "vocab_size": 199,
    }
    layers = model_spec(swa | {"layer_rope_theta": [0, 500, 1e4]}).layers
    assert [each.mixer.rope and each.mixer.rope.theta for each in layers] == [None, 500.0, 1e4]
    assert [each.mixer.window for each in layers] == [None, 128, 128]
    assert all(each.mixer.sinks for each in layers)
    for wrong in ([1e4], "x", [0, -1, 1e4], [0, "a", 1], [0, True, 1]):
        with pytest.raises(UserError, match="layer_rope_theta"):
            model_spec(swa | {"layer_rope_theta": wrong})
