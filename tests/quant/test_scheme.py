"""Every spelling of quantization_config that other tools write, and what they make of ours."""

import pytest
from compressed_tensors.quantization import QuantizationConfig
from transformers import AwqConfig, FineGrainedFP8Config, GPTQConfig

from nibble.errors import UnsupportedError
from nibble.quant.scheme import LayerScheme, QuantScheme, exactly

AWQ = LayerScheme("int", 4, 128, symmetric=False)
LAYER = "model.layers.3.mlp.up_proj"


@pytest.mark.parametrize(
    "config",
    [
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
        },
        {
            "quant_method": "awq",
            "w_bit": 4,
            "q_group_size": 128,
            "zero_point": True,
            "version": "GEMM",
        },
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "modules_to_not_convert": None,
        },
    ],
)
def test_awq_spellings(config):
    scheme = QuantScheme.from_config(config)
    assert (
        scheme.format == "gemm"
        and scheme.layer(LAYER) == AWQ
        and scheme.describe() == "awq int4 g128 asym"
    )
    assert scheme.layer("lm_head") is None and scheme.layer("model.embed_tokens") is None


def test_awq_ignores_named_modules_and_what_is_inside_them_only():
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": ["visual", "layers.1"],
    }
    scheme = QuantScheme.from_config(config)
    assert (
        scheme.layer("visual.blocks.0.proj") is None
        and scheme.layer("model.layers.1.mlp.up_proj") is None
    )
    assert scheme.layer("model.layers.11.mlp.up_proj") is not None


def test_gptq_of_auto_gptq_and_gptqmodel():
    scheme = QuantScheme.from_config(
        {
            "quant_method": "gptq",
            "bits": 3,
            "group_size": -1,
            "sym": False,
            "desc_act": True,
            "damp_percent": 0.01,
            "static_groups": False,
        }
    )
    assert scheme.format == "gptq" and scheme.describe() == "gptq int3 channel asym act-order"
    v2 = QuantScheme.from_config(
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}
    )
    assert v2.format == "gptq_v2" and v2.layer(LAYER) == LayerScheme("int", 8, 32, symmetric=True)


def test_gptq_dynamic_first_match_wins_and_skips():
    scheme = QuantScheme.from_config(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "lm_head": True,
            "dynamic": {
                r"-:.*\.q_proj": {},
                r"+:.*layers\.3\..*": {"bits": 8, "group_size": 32},
                r".*": {"bits": 2},
            },
        }
    )
    assert scheme.layer("model.layers.3.self_attn.q_proj") is None
    assert scheme.layer(LAYER) == LayerScheme("int", 8, 32, symmetric=True)
    assert (
        scheme.layer("model.layers.4.mlp.up_proj").bits == 2 and scheme.layer("lm_head").bits == 2
    )


def test_fp8_tensor_and_block():
    tensor = QuantScheme.from_config(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["x"]}
    )
    assert tensor.layer(LAYER).act_quant == "tensor" and tensor.layer(LAYER).strategy == "tensor"
    assert tensor.layer("x") is None
    block = QuantScheme.from_config({"quant_method": "fp8", "weight_block_size": [128, 64]})
    assert (
        block.layer(LAYER).block == (128, 64)
        and block.describe() == "fp8 block 128x64, group activations"
    )


def ct_config(weights, inputs=None, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | more


def test_compressed_tensors_groups_targets_and_ignore():
    config = ct_config(
        {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64},
        format="pack-quantized",
        ignore=["lm_head", r"re:.*\.q_proj$"],
    )
    config["config_groups"]["group_1"] = {
        "targets": [r"re:.*down_proj$", "model.layers.0.mlp.up_proj"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    }
    scheme = QuantScheme.from_config(config)
    assert scheme.layer(LAYER) == LayerScheme("int", 4, 64, symmetric=False)
    assert scheme.layer("model.layers.9.mlp.down_proj").bits == 8
    assert scheme.layer("model.layers.0.mlp.up_proj").group_size == -1
    assert (
        scheme.layer("model.layers.0.self_attn.q_proj") is None and scheme.layer("lm_head") is None
    )


@pytest.mark.parametrize(
    "layer, fmt",
    [
        (LayerScheme("int", 4, 128, symmetric=False), "pack-quantized"),
        (LayerScheme("int", 8, -1, symmetric=True, strategy="channel"), "pack-quantized"),
        (LayerScheme("fp8", 8, -1, True, strategy="channel", act_quant="token"), "float-quantized"),
        (
            LayerScheme("fp8", 8, 128, True, block=(128, 128), strategy="block", act_quant="group"),
            "float-quantized",
        ),
        (LayerScheme("fp8", 8, -1, True, strategy="tensor", act_quant="tensor"), "float-quantized"),
    ],
)
def test_compressed_tensors_reads_our_config(layer, fmt):
    other = LayerScheme("int", 8, 32, symmetric=True)
    scheme = QuantScheme(
        "compressed-tensors", fmt, layer, overrides=((exactly(LAYER), other),), ignore=("lm_head",)
    )
    config = scheme.to_config()
    theirs = QuantizationConfig.model_validate(config)
    weights = theirs.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric, weights.strategy) == (
        layer.bits,
        layer.symmetric,
        layer.strategy,
    )
    again = QuantScheme.from_config(theirs.model_dump(mode="json"))
    assert again.layer("model.layers.0.mlp.up_proj") == layer and again.layer(LAYER) == other
    assert again.layer("lm_head") is None


def test_transformers_reads_our_configs():
    awq = AwqConfig(**QuantScheme("awq", "gemm", AWQ, ignore=("lm_head",)).to_config())
    assert (awq.bits, awq.group_size, awq.zero_point, awq.format) == (4, 128, True, "gemm")
    gptq_layer = LayerScheme("int", 4, 64, symmetric=True)
    gptq = GPTQConfig(**QuantScheme("gptq", "gptq", gptq_layer).to_config())
    assert (gptq.bits, gptq.group_size, gptq.sym, gptq.desc_act, gptq.format) == (
        4,
        64,
        True,
        False,
        "gptq",
    )
    block = LayerScheme("fp8", 8, 128, True, block=(128, 128), strategy="block", act_quant="group")
    fp8 = FineGrainedFP8Config(**QuantScheme("fp8", "fp8", block, ignore=("lm_head",)).to_config())
    assert list(fp8.weight_block_size) == [128, 128] and fp8.modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme("awq", "gemm", AWQ, ignore=("model.layers.0.mlp.down_proj",)),
        QuantScheme(
            "gptq",
            "gptq",
            LayerScheme("int", 4, 128, True),
            overrides=((exactly(LAYER), LayerScheme("int", 4, 64, True)), (r".*\.o_proj$", None)),
        ),
    ],
)
def test_our_configs_come_back(scheme):
    assert QuantScheme.from_config(scheme.to_config()) == scheme


@pytest.mark.parametrize(
    "config, named",
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({}, "quant_method ''"),
        ({"quant_method": "awq", "bits": 3}, "bits 3"),
        ({"quant_method": "awq", "bits": 4, "version": "exllama"}, "version 'exllama'"),
        ({"quant_method": "gptq", "bits": "4"}, "bits '4'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, r"dynamic '\('"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
        (
            ct_config({"num_bits": 6, "type": "float", "strategy": "group", "group_size": 16}),
            "num_bits 6",
        ),
        (
            ct_config(
                {"num_bits": 4, "type": "int"}, sparsity_config={"format": "sparse-24-bitmask"}
            ),
            "sparse-24",
        ),
    ],
)
def test_what_is_not_supported_is_named(config, named):
    with pytest.raises(UnsupportedError, match=named):
        QuantScheme.from_config(config)


def test_awq_cannot_say_two_schemes():
    scheme = QuantScheme("awq", "gemm", AWQ, overrides=((".*", LayerScheme("int", 4, 64, False)),))
    with pytest.raises(ValueError, match="one scheme"):
        scheme.to_config()


def test_auto_round_names_its_packing_and_what_differs() -> None:
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {
            "model.layers.0.mlp.up_proj": {"bits": 8},
            ".*down_proj": {"group_size": 32, "sym": False},
            "model.layers.1.mlp.up_proj": {"bits": 16, "data_type": "float"},
        },
    }
    scheme = QuantScheme.from_config(config)
    assert (scheme.method, scheme.format) == ("gptq", "gptq")
    assert scheme.layer(LAYER) == LayerScheme("int", 4, 128, True)
    assert scheme.layer("model.layers.0.mlp.up_proj").bits == 8
    assert scheme.layer("model.layers.2.mlp.down_proj") == LayerScheme("int", 4, 32, False)
    assert scheme.layer("model.layers.1.mlp.up_proj") is None
    assert scheme.layer("lm_head") is None
    packings = {"auto_round": ("gptq", "gptq_v2"), "auto_round:auto_awq": ("awq", "gemm")}
    for packing, want in packings.items():
        other = QuantScheme.from_config(config | {"packing_format": packing})
        assert (other.method, other.format) == want
    with pytest.raises(UnsupportedError, match="auto_round:llm_compressor"):
        QuantScheme.from_config(config | {"packing_format": "auto_round:llm_compressor"})
    with pytest.raises(UnsupportedError, match="data_type 'mx_fp'"):
        QuantScheme.from_config(config | {"data_type": "mx_fp"})
