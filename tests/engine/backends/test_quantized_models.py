"""Every quantized format through the whole engine: logits against a transformers model that holds the dequantized
weights. In float32 both compute the same sums in another order, hence a tolerance of 1e-4 of the largest logit; in
bfloat16 the engine may err as much as transformers' own bfloat16 does (checked on real models in tests/interop).
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from safetensors.torch import load_file, save_file

from nibble.engine.backends.cpp.decoder import CppDecoder
from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.kernels.cpu import library
from nibble.quant import formats
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.scheme import LayerScheme, QuantScheme
from nibble.quant.weight import QuantizedWeight

from .. import models

IDS = torch.randint(3, 199, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def integer(bits: int, group: int, symmetric: bool, **more) -> LayerScheme:
    return LayerScheme("int", bits, group, symmetric, **more)


def fp8(strategy: str, **more) -> LayerScheme:
    return LayerScheme("fp8", 8, -1, True, strategy=strategy, **more)


def fp4(strategy: str, group_size: int) -> QuantScheme:
    weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights}
    return QuantScheme.from_config(
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    )


SCHEMES = {
    "awq": QuantScheme("awq", "gemm", integer(4, 32, False)),
    "gptq-4-sym": QuantScheme("gptq", "gptq", integer(4, 32, True)),
    "gptq-4-asym-v2": QuantScheme("gptq", "gptq_v2", integer(4, 32, False)),
    "gptq-4-act-order": QuantScheme("gptq", "gptq", integer(4, 32, True, desc_act=True)),
    "gptq-2": QuantScheme("gptq", "gptq", integer(2, 32, False)),
    "gptq-3": QuantScheme("gptq", "gptq", integer(3, 32, True)),
    "gptq-8": QuantScheme("gptq", "gptq", integer(8, 32, False)),
    "gptq-channel": QuantScheme("gptq", "gptq", integer(4, -1, True)),
    "fp8-tensor": QuantScheme("fp8", "fp8", fp8("tensor", act_quant="token")),
    "fp8-block": QuantScheme("fp8", "fp8", fp8("block", block=(32, 32), act_quant="group")),
    "ct-fp8-channel": QuantScheme(
        "compressed-tensors", "float-quantized", fp8("channel", act_quant="token")
    ),
    "ct-int4-sym": QuantScheme("compressed-tensors", "pack-quantized", integer(4, 32, True)),
    "ct-int4-asym": QuantScheme("compressed-tensors", "pack-quantized", integer(4, 32, False)),
    "ct-int8": QuantScheme("compressed-tensors", "pack-quantized", integer(8, 32, True)),
    "ct-nvfp4": fp4("tensor_group", 16),
    "ct-mxfp4": fp4("group", 32),
}


def quantize(weight: torch.Tensor, layer: LayerScheme, seed: int) -> QuantizedWeight:
    """Round to nearest, however roughly: the codes only have to be of every kind."""
    generator = torch.Generator().manual_seed(seed)
    out, inner = weight.shape
    if layer.kind == "fp8":
        rows, cols = layer.block or ((out, inner) if layer.strategy == "tensor" else (1, inner))
        grid = -(-out // rows), -(-inner // cols)
        scales = torch.rand(grid, generator=generator) * 0.002 + 0.001
        full = scales.repeat_interleave(rows, 0)[:out].repeat_interleave(cols, 1)[:, :inner]
        return QuantizedWeight(
            (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn),
            scales,
            kind="fp8",
            bits=8,
            block=(rows, cols),
            act_quant=layer.act_quant,
        )
    size = inner if layer.group_size == -1 else layer.group_size
    perm = torch.randperm(inner, generator=generator) if layer.desc_act else None
    groups = (weight if perm is None else weight[:, perm]).reshape(out, -1, size)
    top = 2**layer.bits - 1
    scales = (2 * groups.abs().amax(-1) / top).half()
    zeros = None
    if not layer.symmetric:
        zeros = torch.randint(1, top + 1, scales.shape, generator=generator, dtype=torch.uint8)
    middle = 2 ** (layer.bits - 1) if zeros is None else zeros.float()[..., None]
    codes = (groups / scales.float()[..., None] + middle).round().clamp(0, top).to(torch.uint8)
    return QuantizedWeight(
        codes.reshape(out, inner), scales, zeros, perm=perm, bits=layer.bits, block=(1, size)
    )


def fp4_tensors(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """As compressed-tensors writes NVFP4 (groups of 16) and MXFP4 (of 32)."""
    groups = weight.reshape(len(weight), -1, group_size)
    scales = groups.abs().amax(-1) / 6
    if group_size == 16:
        stored = (scales * 100).to(torch.float8_e4m3fn)
        more, scales = {"weight_global_scale": torch.tensor([100.0])}, stored.float() / 100
    else:
        exponents = scales.log2().ceil()
        stored, more, scales = (exponents + 127).to(torch.uint8), {}, exponents.exp2()
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / scales[..., None]
    nearest = values[(scaled.abs()[..., None] - values).abs().argmin(-1)] * scaled.sign()
    packed = pack_fp4_to_uint8(nearest.reshape(weight.shape))
    return {"weight_packed": packed, "weight_scale": stored} | more


def write_checkpoint(
    folder: Path, scheme: QuantScheme, name: str, head: bool = False, **changes
) -> torch.nn.Module:
    """A tiny model with every projection quantized, in `folder`, and its output head if asked; returned: the same
    model, dequantized. changes: to its config."""
    models.CONFIGS["wide"] = type(models.CONFIGS[name])(
        **models.CONFIGS[name].to_dict() | {"intermediate_size": 128} | changes
    )
    reference = models.build("wide", folder)
    tensors = load_file(folder / "model.safetensors")
    writer = formats.by_method(scheme.method)
    for index, (prefix, linear) in enumerate(sorted(reference.named_modules())):
        if not isinstance(linear, torch.nn.Linear) or (prefix == "lm_head" and not head):
            continue
        # act-order shards that are fused must share one order; seeds by layer give them that for q, k, v
        layer = scheme.default
        seed = int(prefix.split(".")[2]) if layer.desc_act else index
        if layer.kind == "fp4":
            written = fp4_tensors(linear.weight.detach(), layer.group_size)
            weight = writer.read(written, layer)
        else:
            weight = quantize(linear.weight.detach(), layer, seed)
            written = writer.write(weight, scheme.format)
        del tensors[f"{prefix}.weight"]
        tensors |= {f"{prefix}.{s}": t.contiguous() for s, t in written.items()}
        linear.weight.data = weight.dequantize()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    ignore = () if head else ("lm_head",)
    config["quantization_config"] = scheme.raw or replace(scheme, ignore=ignore).to_config()
    (folder / "config.json").write_text(json.dumps(config))
    return reference


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", list(SCHEMES))
def test_logits_equal_the_dequantized_model(tmp_path, kind: str, name: str) -> None:
    reference = write_checkpoint(tmp_path, SCHEMES[kind], name)
    with torch.inference_mode():
        want = reference(torch.tensor([IDS])).logits[0]
    runner = Runner(EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_memory=1 << 23))
    assert runner.quantization != "none"
    assert torch.allclose(runner.logits(IDS), want, atol=1e-4 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in SCHEMES if "fp8" in kind])
def test_an_output_head_in_fp8(tmp_path, kind: str) -> None:
    """As it is stored: neither left dense nor rounded to 8-bit integers, which is done to a head in 16 bits."""
    untied = {"tie_word_embeddings": False}
    reference = write_checkpoint(tmp_path, SCHEMES[kind], "llama", head=True, **untied)
    assert open_checkpoint(tmp_path).is_quantized("lm_head")
    exact, theirs = bfloat16_error(copy.deepcopy(reference))
    runner = Runner(EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_memory=1 << 23))
    assert torch.allclose(runner.logits(IDS), exact, atol=1e-4 * float(exact.abs().max()), rtol=0)
    if library.why_missing() is None:
        served = Runner(
            EngineConfig(model=str(tmp_path), dtype="bfloat16", kv_cache_memory=1 << 23)
        )
        assert served.model.head.linears[0].format == library.FP8
        assert (served.logits(IDS) - exact).norm() <= theirs


GOOGLES = {  # of gemma-4-E2B-it-qat-w4a16-ct: every linear but what sees, hears, routes or speaks
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    },
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*router.*"],
    "kv_cache_scheme": None,
}


@pytest.mark.parametrize(
    ("name", "changes"), [("gemma4-shared", {"hidden_size_per_layer_input": 32}), ("gemma4", {})]
)
def test_googles_own_4_bit_gemma(tmp_path, name: str, changes: dict) -> None:
    """What small ones are told of each token once more is quantized there, too."""
    scheme = QuantScheme.from_config(GOOGLES)
    exact, theirs = bfloat16_error(write_checkpoint(tmp_path, scheme, name, **changes))
    stored = open_checkpoint(tmp_path)
    names = {module.rpartition(".")[2] for module in stored.modules()}
    assert {"per_layer_input_gate", "per_layer_model_projection"} <= names or not changes
    runner = Runner(EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_memory=1 << 23))
    assert torch.allclose(runner.logits(IDS), exact, atol=1e-4 * float(exact.abs().max()), rtol=0)
    if library.why_missing() is None:
        options = {"kv_cache_memory": 1 << 23, "cpu_activations": "bf16", "lm_head_bits": 16}
        served = Runner(EngineConfig(model=str(tmp_path), dtype="bfloat16", **options))
        assert isinstance(served.model, CppDecoder)
        assert (served.logits(IDS) - exact).norm() <= theirs


@torch.inference_mode()
def bfloat16_error(reference: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """The float32 logits, and how far transformers' own bfloat16 is from them."""
    exact = reference(torch.tensor([IDS])).logits[0]
    return exact, float(
        (reference.to(torch.bfloat16)(torch.tensor([IDS])).logits[0].float() - exact).norm()
    )


@pytest.mark.parametrize("kind", ["awq", "gptq-4-act-order", "ct-int4-asym"])
def test_torch_int4_kernels_stay_within_bfloat16(tmp_path, kind: str) -> None:
    """The packed int4 kernel really serves, and errs no more than twice what transformers' own bfloat16 does."""
    exact, theirs = bfloat16_error(write_checkpoint(tmp_path, SCHEMES[kind], "llama"))
    runner = Runner(
        EngineConfig(model=str(tmp_path), dtype="bfloat16", kv_cache_memory=1 << 23, cpu_isa="none")
    )
    assert "cpu-torch-int4" in runner.model.report.used
    assert (runner.logits(IDS) - exact).norm() <= 2 * theirs


@pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
@pytest.mark.parametrize("kind", list(SCHEMES))
def test_cpp_kernels_stay_within_bfloat16(tmp_path, kind: str) -> None:
    """With bfloat16 activations no worse than transformers; with int8 ones (8 bits against bfloat16's 9) twice that."""
    exact, theirs = bfloat16_error(write_checkpoint(tmp_path, SCHEMES[kind], "llama"))
    for activations, factor in [("bf16", 1), ("int8", 2)]:
        runner = Runner(
            EngineConfig(
                model=str(tmp_path),
                dtype="bfloat16",
                kv_cache_memory=1 << 23,
                cpu_activations=activations,
            )
        )
        assert runner.model.report.used.total() == 4 * 7 + 1
        assert (runner.logits(IDS) - exact).norm() <= factor * theirs
