"""Fields of config.json that make no sense, for every architecture: an error that says so, whatever they are."""

import math
from typing import Any

import pytest

from nibble.architectures.registry import ARCHITECTURES, model_spec
from nibble.errors import UserError

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
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_nonsense_is_an_error_or_a_model(architecture: Any) -> None:
    good = GOOD | {"architectures": [architecture.name], "hidden_act": "silu"}
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
                    numbers = (mixer.scale, mixer.rope.theta, mixer.soft_cap or 1.0, spec.norm_eps)
                    assert all(isinstance(n, float | int) and math.isfinite(n) and n > 0 for n in numbers), (
                        field, value, numbers)  # fmt: skip


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_size_beyond_its_bound_is_named(field: str) -> None:
    with pytest.raises(UserError, match=f"config.json: {field} is more than"):
        model_spec(GOOD | {"architectures": ["LlamaForCausalLM"], field: 10**9})
