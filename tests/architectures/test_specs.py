"""config.json -> ModelSpec: what transformers would compute, or one clear line. Logits: tests/engine/test_runner.py."""

import math

import pytest
from transformers import AutoConfig

from nibble.architectures.base import (
    AltUp,
    Attention,
    Experts,
    GatedMlp,
    LatentAttention,
    Laurel,
    LayerSpec,
    LongFactors,
    ModelSpec,
    Norms,
    Rope,
    SharedExpert,
    features,
)
from nibble.architectures.multimodal import CLASSES
from nibble.architectures.registry import ARCHITECTURES, Architecture, find, model_spec
from nibble.architectures.rope import switch_of
from nibble.errors import CheckpointError, UnsupportedError, UserError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "hidden_act": "silu",
}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GEMMA3 = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_act": None,
}


LONGROPE = {
    "max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64},
}
SHORT = {
    "type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
}
NEEDED = {  # by model_type: what a file must say
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}


def windows(config: dict) -> list[int | None]:
    return [layer.mixer.window for layer in model_spec(config).layers]


def test_qwen_has_its_window_from_max_window_layers_on() -> None:
    """As transformers' Qwen2Config without layer_types: 0.7 of the logits' norm if every layer had it."""
    sliding = QWEN | {"use_sliding_window": True, "sliding_window": 8}
    assert windows(sliding | {"max_window_layers": 3}) == [None, None, None, 8]
    assert windows(sliding | {"max_window_layers": 0}) == [8] * 4
    assert windows(sliding) == [None] * 4  # 28 layers without
    assert windows(sliding | {"use_sliding_window": False, "max_window_layers": 0}) == [None] * 4
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(sliding | {"layer_types": types}) == [8, None] * 2


def test_mistral_has_a_window_of_4096_unless_it_says_null() -> None:
    assert windows(MISTRAL) == [4096] * 4
    assert windows(MISTRAL | {"sliding_window": None}) == [None] * 4
    assert windows(MISTRAL | {"sliding_window": 7}) == [7] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, want a positive integer"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4', want a positive integer"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', want a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', want true or false"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope scaling 'dynamic' is not supported"),
        (LONGROPE, "longrope rope scaling needs short_factor, a list of 8 numbers"),
        (
            LONGROPE | {"rope_scaling": SHORT | {"long_factor": [1.0] * 7}},
            "longrope rope scaling needs long_factor, a list of 8 numbers",
        ),
        (
            LONGROPE | {"rope_scaling": SHORT | {"long_factor": [1.0] * 7 + [0]}},
            "long_factor[7] is 0.0, want a positive number",
        ),
        (
            LONGROPE | {"rope_scaling": SHORT, "original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1, want more than that",
        ),
        (
            LONGROPE | {"rope_scaling": SHORT | {"original_max_position_embeddings": 32.5}},
            "original_max_position_embeddings is 32.5, want a positive integer",
        ),
        ({"rope_scaling": {"type": "linear"}}, "linear rope scaling needs factor"),
        ({"rope_parameters": [1]}, "no JSON object"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor is 0, want a share"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, want a share"),
        ({"partial_rotary_factor": 0.2}, "an even number of a head's 16 dimensions"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_names_the_field(change: dict, said: str) -> None:
    with pytest.raises(UserError, match="config.json") as error:
        model_spec(LLAMA | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_longrope_has_the_factors_and_the_length_of_transformers() -> None:
    """The file's own length goes before that of the parameters; without a longer context there is one set."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    parameters = {"type": "longrope", "original_max_position_embeddings": 32, **factors}
    config = LLAMA | {"rope_scaling": parameters, "max_position_embeddings": 64}
    for change, length in (({}, 32), ({"original_max_position_embeddings": 16}, 16)):
        spec = model_spec(config | change)
        rope = spec.layers[0].mixer.rope
        assert rope.long == LongFactors(length, (2.0,) * 8) and spec.rope_switch == length
        sharpness = math.sqrt(1 + math.log(64 / length) / math.log(length))
        assert rope.attention_factor == pytest.approx(sharpness)
    for change in ({"max_position_embeddings": 32}, {"original_max_position_embeddings": 64}):
        spec = model_spec(config | change)
        rope = spec.layers[0].mixer.rope
        assert (rope.long, rope.attention_factor, spec.rope_switch) == (None, 1.0, None)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi_3_knows_longrope_by_older_names_and_a_length_of_4096(kind: str) -> None:
    phi = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi |= {"max_position_embeddings": 131072, "rope_scaling": {"type": kind, **factors}}
    rope = model_spec(phi).layers[0].mixer.rope
    assert (rope.scaling, rope.long) == ("longrope", LongFactors(4096, (2.0,) * 8))


def test_layers_whose_longrope_switches_at_several_lengths_are_refused() -> None:
    ropes = [Rope(1e4, long=LongFactors(length, (2.0,))) for length in (32, 64)]
    with pytest.raises(UnsupportedError, match=r"switches at \[32, 64\] tokens"):
        switch_of(ropes)


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_what_a_file_does_not_say_is_as_in_transformers(entry: Architecture) -> None:
    said = {name: LLAMA[name] for name in LLAMA if isinstance(LLAMA[name], int)}
    said |= {"max_position_embeddings": 512, **NEEDED.get(entry.model_type, {})}
    names = None if entry.name in CLASSES else [entry.name]  # a part of what also sees has none
    named = {"architectures": names, "model_type": entry.model_type}
    defaults = AutoConfig.for_model(entry.model_type, **said).to_dict()
    assert model_spec(said | named) == model_spec(defaults | named)


MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def sparse(config: dict) -> list[bool]:
    return [isinstance(layer.mlp, Experts) for layer in model_spec(config).layers]


def test_some_layers_of_qwen_are_dense() -> None:
    """transformers' decoder_sparse_step counts layers from 1; mlp_only_layers from 0."""
    assert sparse(MOE) == [True] * 4
    assert sparse(MOE | {"decoder_sparse_step": 2}) == [False, True] * 2
    assert sparse(MOE | {"mlp_only_layers": [0, 3]}) == [False, True, True, False]
    dense = model_spec(MOE | {"mlp_only_layers": [0]}).layers[0].mlp
    assert dense == GatedMlp(96, "silu")


def test_qwen2_moe_has_its_window_in_every_second_layer_below_max_window_layers() -> None:
    qwen = MOE | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    assert windows(qwen | {"sliding_window": 0}) == [None] * 4  # as transformers writes it
    sliding = qwen | {"use_sliding_window": True, "sliding_window": 8}
    assert windows(sliding | {"max_window_layers": 3}) == [8, None, 8, None]
    assert windows(sliding | {"max_window_layers": 2}) == [8, None, None, None]


def test_the_number_of_experts_has_several_names() -> None:
    for name in ("num_experts", "num_local_experts"):
        assert model_spec(MOE | {name: 6, "num_experts_per_tok": 2}).layers[0].mlp.num_experts == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 4}, "num_experts_per_tok is 8, of 4 experts"),
        ({"num_experts": 2**31}, "num_experts is more than 4096"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, want a positive integer"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, want a positive integer"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is no list"),
    ],
)
def test_experts_that_make_no_sense_are_one_line(change: dict, said: str) -> None:
    with pytest.raises(UserError, match="config.json") as error:
        model_spec(MOE | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_groups_of_experts_that_make_no_sense_are_refused() -> None:
    dots = LLAMA | {"architectures": ["Dots1ForCausalLM"], **NEEDED["dots1"]}
    assert model_spec(dots | {"n_group": 4, "topk_group": 2}).layers[0].mlp.limited_groups == (4, 2)
    for change in ({"n_group": 3}, {"topk_group": 2}, {"n_group": 8}):
        with pytest.raises(CheckpointError, match=r"8 experts in . groups, the best . of them"):
            model_spec(dots | change)


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 199,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}


def test_latent_attention_is_read_as_the_families_mean_it() -> None:
    mixer = model_spec(DEEPSEEK).layers[0].mixer
    assert (mixer.q_rank, mixer.kv_rank, mixer.value_dim) == (1536, 512, 128)
    assert mixer.rope == Rope(10000.0, interleaved=True) and mixer.norm_eps == 1e-6
    said = {"q_lora_rank": None, "rope_interleave": False, "rms_norm_eps": 1e-5}
    mixer = model_spec(DEEPSEEK | said).layers[0].mixer
    assert mixer.q_rank is None and not mixer.rope.interleaved and mixer.norm_eps == 1e-6
    v2 = DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy"}
    limited = v2 | {"topk_method": "group_limited_greedy"}
    assert model_spec(v2 | said).layers[0].mixer.rope.interleaved
    assert model_spec(v2).layers[0].mlp.limited_groups is None
    mlp = model_spec(limited).layers[0].mlp
    assert (mlp.limited_groups, mlp.group_rank, mlp.scoring) == ((4, 2), 1, "softmax")


def test_long_contexts_sharpen_latent_attention() -> None:
    """As transformers' yarn_apply_mscale: by the square of 0.1 * mscale_all_dim * log(factor) + 1."""
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    plain, sharp = (
        model_spec(DEEPSEEK | {"rope_scaling": yarn | more}).layers[0].mixer
        for more in ({"mscale": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.5})
    )
    assert plain.scale == 192**-0.5
    assert sharp.scale == pytest.approx(192**-0.5 * (0.05 * math.log(40) + 1) ** 2)
    assert sharp.rope.attention_factor == pytest.approx(
        (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    )


def test_values_of_heads_are_rows_between_those_that_make_keys() -> None:
    mixer = LatentAttention(3, 48, 32, 16, 8, 24, 0.1, Rope(1e4), 1e-6)
    before, queries, latents, values = mixer.folds("a_norm")
    assert before.consumers == ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    assert queries.consumers == ("self_attn.q_b_proj",)
    assert latents.consumers == (values.source,) == ("self_attn.kv_b_proj",)
    assert values.rows == ((16, 40), (56, 80), (96, 120))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15, want an even number"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0, want a positive integer"),
        ({"kv_lora_rank": 2**20}, "kv_lora_rank is more than"),
        ({"rope_interleave": 1}, "rope_interleave is 1, want true or false"),
        ({"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux_tc"}, "noaux_tc"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"], "mlp_layer_types": ["moe"] * 4}, "'moe'"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"], "mlp_layer_types": []}, "of 4 layers"),
    ],
)
def test_latents_that_make_no_sense_are_one_line(change: dict, said: str) -> None:
    with pytest.raises(UserError, match="config.json") as error:
        model_spec(DEEPSEEK | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_experts_are_groups_of_linears_with_names_of_their_own() -> None:
    mlp = Experts(3, 2, 96, "silu", shared=SharedExpert(32))
    experts, shared, down, shared_down = mlp.groups(64)
    assert (experts.num_experts, experts.in_features, experts.out_features) == (3, 64, (96, 96))
    assert [member.modules for member in experts.members()] == [
        (f"mlp.experts.{i}.gate_proj", f"mlp.experts.{i}.up_proj") for i in range(3)
    ]
    assert shared.members() == (shared,) and shared_down.in_features == 32
    assert down.members()[2].modules == ("mlp.experts.2.down_proj",)
    norm, *rows = mlp.folds("a_norm")
    assert norm.source == "a_norm" and norm.dense == ("mlp.gate",) and norm.reads == "mlp.gate"
    assert norm.consumers[:2] == experts.members()[0].modules and len(norm.consumers) == 8
    assert [(fold.source, fold.consumers) for fold in rows][-2:] == [
        ("mlp.experts.2.up_proj", ("mlp.experts.2.down_proj",)),
        ("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
    ]


def test_layer_types_are_known_and_one_for_each_layer() -> None:
    qwen = QWEN | {"use_sliding_window": True, "sliding_window": 8}
    with pytest.raises(UnsupportedError, match="'chunked_attention' is not supported"):
        model_spec(qwen | {"layer_types": ["chunked_attention"] * 4})
    with pytest.raises(CheckpointError, match="3 entries for 4 layers"):
        model_spec(qwen | {"layer_types": ["full_attention"] * 3})


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        model_spec(GEMMA3 | {"use_bidirectional_attention": True})


def test_the_architecture_is_looked_up_in_one_table() -> None:
    assert find({"model_type": "qwen3"}).name == "Qwen3ForCausalLM"
    assert (
        find({"architectures": ["LlamaForCausalLM"], "model_type": "internlm3"}).name
        == "LlamaForCausalLM"
    )
    with pytest.raises(
        UnsupportedError, match=r"MambaForCausalLM is not supported.*Llama, Mistral"
    ):
        find({"architectures": ["MambaForCausalLM"], "model_type": "llama"})
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        find({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"})
    with pytest.raises(UnsupportedError, match="model_type 'mamba'"):
        find({"model_type": "mamba"})
    assert len({entry.name for entry in ARCHITECTURES}) == len(ARCHITECTURES)


def test_rope_scaling_is_read_in_both_spellings() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    ropes = {model_spec(config).layers[0].mixer.rope for config in (old, new)}
    assert len(ropes) == 1 and ropes.pop().theta == 5e5


def test_features_name_kinds_choices_and_what_differs_from_its_default() -> None:
    plain = Attention(4, 2, 16, 0.25, Rope(1e4))
    mlp = GatedMlp(96, "silu")
    layer = LayerSpec(plain, mlp)
    plain_features = features(layer)
    assert plain_features == {
        "layer",
        "norms",
        "attention",
        "rope",
        "rope.scaling=default",
        "gated_mlp",
        "gated_mlp.activation=silu",
    }
    other = LayerSpec(
        Attention(4, 2, 16, 0.25, Rope(1e4, "yarn"), window=8, sinks=True),
        GatedMlp(96, "gelu_tanh"),
        Norms(before_mixer=None, after_mlp="x"),
    )
    assert features(other) - plain_features == {
        "attention.window",
        "attention.sinks",
        "rope.scaling=yarn",
        "gated_mlp.activation=gelu_tanh",
        "norms.before_mixer=None",
        "norms.after_mlp",
    }
    assert features(LayerSpec(plain, mlp, Norms(before_mlp="another_name"))) == plain_features
    model = ModelSpec(64, 199, 256, 1e-6, (layer,), True, embedding_scale=8.0)
    assert features(model) == {"model", "model.embedding_scale"}


GEMMA4_MOE = LLAMA | {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "hidden_act": None,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 48,
}


def test_gemma_4_has_experts_beside_its_mlps() -> None:
    both = model_spec(GEMMA4_MOE).layers[0].mlp
    assert (both.mlp.intermediate_size, both.experts.intermediate_size) == (96, 48)
    names = {name for fold in both.folds(None) for name in (fold.source, *fold.dense, fold.reads)}
    assert "pre_feedforward_layernorm_2" in names and "experts" in names
    assert not any("router" in name for name in names)  # it reads none of the norms
    routers = [f"model.layers.{i}.router.proj" for i in range(4)]
    assert model_spec(GEMMA4_MOE).dense_modules() == tuple(routers)
    with pytest.raises(CheckpointError, match="top_k_experts is 9, of 8 experts"):
        model_spec(GEMMA4_MOE | {"top_k_experts": 9})


GEMMA3N = LLAMA | {"architectures": None, "model_type": "gemma3n_text", "hidden_act": None}


def test_gemma_3n_has_streams_sparse_gates_and_a_way_around_attention() -> None:
    """What a file does not say is as in transformers."""
    spec = model_spec(GEMMA3N | {"num_hidden_layers": 20, "head_dim": None})
    assert spec.alt_up == AltUp(4, 0, scaled=True) and spec.final_soft_cap == 30.0
    assert [layer.mlp.sparsity for layer in spec.layers] == [0.95] * 10 + [0.0] * 10
    assert spec.layers[0].mlp.deviations == pytest.approx(1.644854, rel=1e-6)
    assert spec.layers[15].mlp.deviations is None
    assert [m.window for m in spec.attention.values()] == [512, 512, 512, 512, None] * 4
    # the last layer of each kind below the last 15
    assert [m.kv_source for m in spec.attention.values()] == [None] * 5 + [3, 3, 3, 3, 4] * 3
    assert {layer.laurel for layer in spec.layers} == {Laurel(64)}
    assert spec.attention[0].head_dim == 256 and spec.attention[0].scale == 1.0
    # what the mixer reads is added, too: no factor may leave the norm before it
    assert [fold.kind for fold in spec.folds(0)] == ["norm", "rows"]
    told = model_spec(GEMMA3N | {"intermediate_size": [32, 64, 96, 128], "num_kv_shared_layers": 0})
    assert [layer.mlp.intermediate_size for layer in told.layers] == [32, 64, 96, 128]
    few = GEMMA3N | {"num_kv_shared_layers": 0}
    assert [x.mlp.sparsity for x in model_spec(few).layers] == [0.0] * 4
    same = model_spec(few | {"activation_sparsity_pattern": 0.5})
    assert [layer.mlp.sparsity for layer in same.layers] == [0.5] * 4


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"altup_active_idx": 4}, "altup_active_idx is 4, of 4 streams"),
        ({"altup_num_inputs": 1}, "altup_num_inputs 1 is not supported"),
        ({"activation_sparsity_pattern": [0, 0, 0, 1.0]}, "want shares from 0 to below 1"),
        ({"activation_sparsity_pattern": [0.5]}, "no list of 4 numbers"),
        ({"intermediate_size": [64]}, "no list of 4 numbers"),
        ({"num_kv_shared_layers": 4}, "leaves no sliding_attention layer"),
    ],
)
def test_what_gemma_3n_cannot_be_is_refused(wrong: dict, why: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=why):
        model_spec(GEMMA3N | {"num_kv_shared_layers": 0} | wrong)


MUSE = LLAMA | {"architectures": None, "model_type": "muse_glimmer_text", "hidden_act": None}


def test_muse_glimmer_turns_where_it_has_a_window() -> None:
    """Counted from the last layer; a base of 0 is none, any other the model's, as transformers computes."""
    spec = model_spec(MUSE | {"num_hidden_layers": 6})
    assert [m.window for m in spec.attention.values()] == [2048, None, 2048, 2048, 2048, None]
    assert [m.rope is None for m in spec.attention.values()] == [False, True] + [False] * 3 + [True]
    told = model_spec(MUSE | {"layer_rope_theta": [0, 5, 0, 0]})
    assert [m.rope for m in told.attention.values()] == [None, Rope(10000.0), None, None]
    with pytest.raises(CheckpointError, match="layer_rope_theta is no list of 4 numbers"):
        model_spec(MUSE | {"layer_rope_theta": [0]})
