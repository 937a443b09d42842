"""What Nibble writes, loaded by others, and what others write, loaded by Nibble: the same greedy tokens.

`make interop` builds the other tools' environments and runs this; a test without its environment is skipped.

    NIBBLE_PEERS   folder with autoawq/, gptqmodel/, llmcompressor/ (bench/quantizers.py) and vllm/ (bench/peers.py)

In float32 the tokens are the same, one for one. vLLM computes in bfloat16: there each of its tokens may fall short of
Nibble's likeliest by no more than bfloat16 moves Nibble's own logits. Where the weights are FP8, others round the
activations to FP8 too, which Nibble does not: there their tokens must be the likeliest of transformers on what Nibble
reads from the checkpoint, each linear's input rounded as the checkpoint says, but for ties that a rounding decides.
"""

import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import nibble
from nibble import LLM, SamplingParams
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.reformat import reformat

convert = partial(nibble.convert, evaluate=False)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    # `cache`, its new name, is not known to every transformers that is supported
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
HERE = Path(__file__).parent
PEERS = Path(os.environ.get("NIBBLE_PEERS", HERE.parents[1] / ".cache" / "peers"))
PROMPTS = [
    list(range(40, 60)),
    list(range(97, 121)),
    [72, 101, 108, 108, 111, 44, 32, 119],
    list(range(200, 232)),
]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
READS = {  # tool -> (environment, what it reads on a CPU)
    "transformers with GPTQModel": ("gptqmodel", ("awq", "gptq-sym", "gptq-asym", "gptq-v2", "gptq-act-order",
                                                  "gptq-8bit")),
    "transformers with compressed-tensors": ("llmcompressor", ("ct-awq", "ct-gptq", "ct-from-awq", "ct-from-8bit",
                                                               "fp8", "fp8-tensor", "fp8-block-ct", "fp8-block")),
    "vLLM": ("vllm", ("awq", "gptq-sym", "ct-awq", "ct-gptq")),
}  # fmt: skip
MAKES = {  # tool -> (what make.py makes with it, whose transformers reads that)
    "autoawq": ("gptqmodel", ("autoawq",)),
    "gptqmodel": ("gptqmodel", ("gptqmodel-sym", "gptqmodel-asym", "gptqmodel-act-order", "gptqmodel-8bit-v2")),
    "llmcompressor": ("llmcompressor", ("llmcompressor-w4a16", "llmcompressor-w4a16-asym", "llmcompressor-fp8",
                                        "llmcompressor-fp8-block")),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tiny_llama, tmp_path_factory):
    """A small Llama whose likeliest token is mostly far ahead, as wide as packed formats and blocks of 128 need."""
    folder = tmp_path_factory.mktemp("interop") / "dense"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=256,
            eos_token_id=257,
            tie_word_embeddings=False,
        )
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, 1.0 if "embed" in name or "lm_head" in name else 0.08)
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(dense):
    """It in every format that Nibble writes, by name."""
    folder = dense.parent
    fast = {"group_size": 32, "calib_samples": 4, "calib_seqlen": 64}
    convert(dense, folder / "awq", "awq", **fast)
    convert(dense, folder / "gptq-sym", "gptq", **fast)
    convert(dense, folder / "gptq-asym", "gptq", symmetric=False, **fast)
    convert(dense, folder / "gptq-v2", "gptq", symmetric=False, to="gptq_v2", **fast)
    convert(dense, folder / "gptq-8bit", "gptq", bits=8, **fast)
    convert(dense, folder / "ct-awq", "awq", to="compressed-tensors", **fast)
    convert(dense, folder / "ct-gptq", "gptq", to="compressed-tensors", **fast)
    convert(dense, folder / "fp8", "fp8")
    convert(dense, folder / "fp8-tensor", "fp8", fp8_scheme="tensor", kv_scales=True, **fast)
    convert(dense, folder / "fp8-block", "fp8", fp8_scheme="block")
    convert(dense, folder / "fp8-block-ct", "fp8", fp8_scheme="block", to="compressed-tensors")
    reformat(folder / "awq", folder / "ct-from-awq", "compressed-tensors")
    reformat(folder / "gptq-8bit", folder / "ct-from-8bit", "compressed-tensors")
    convert(dense, folder / "gptq-act-order", "gptq", desc_act=True, **fast)
    return folder


@pytest.mark.parametrize("tool", READS)
def test_others_generate_what_nibble_does(checkpoints, tmp_path, tool):
    environment, names = READS[tool]
    backend = "vllm" if environment == "vllm" else "transformers"
    theirs = their_tokens(environment, backend, tmp_path, [checkpoints / name for name in names])
    assert_the_same(checkpoints, theirs, "bfloat16" if backend == "vllm" else "float32", tmp_path)


@pytest.mark.parametrize("tool", MAKES)
def test_nibble_generates_what_others_do_from_what_they_made(dense, tmp_path, tool):
    environment, names = MAKES[tool]
    windows = tmp_path / "windows.json"
    windows.write_text(
        json.dumps([[(7 * i + 3 * j * j) % 256 for j in range(128)] for i in range(16)])
    )
    done = run_in(tool, HERE / "make.py", tool, dense, tmp_path, windows)
    assert all((tmp_path / name / "config.json").exists() for name in names), done.stderr[-3000:]
    theirs = their_tokens(
        environment, "transformers", tmp_path, [tmp_path / name for name in names]
    )
    assert_the_same(tmp_path, theirs, "float32", tmp_path)


def run_in(environment: str, *command: object) -> subprocess.CompletedProcess[str]:
    python = PEERS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python} (make interop builds it)")
    with tempfile.TemporaryDirectory() as folder:  # some write their logs to where they run
        return subprocess.run(
            [str(part) for part in (python, *command)],
            check=False,
            capture_output=True,
            text=True,
            timeout=1500,
            env=os.environ | ENVIRONMENT,
            cwd=folder,
        )


def their_tokens(
    environment: str, backend: str, folder: Path, models: list[Path]
) -> dict[str, list[list[int]]]:
    """By model's name. An error that the tool gave fails the test here."""
    prompts, out = folder / "prompts.json", folder / "out.json"
    prompts.write_text(json.dumps(PROMPTS))
    done = run_in(environment, HERE / "greedy.py", backend, prompts, out, *models)
    assert out.exists(), done.stderr[-3000:]
    theirs = {Path(model).name: tokens for model, tokens in json.loads(out.read_text()).items()}
    failed = {name: tokens for name, tokens in theirs.items() if isinstance(tokens, str)}
    assert not failed and len(theirs) == len(models), failed or done.stderr[-3000:]
    return theirs


def assert_the_same(
    folder: Path, theirs: dict[str, list[list[int]]], dtype: str, scratch: Path
) -> None:
    different = {}
    for name, continuations in theirs.items():
        exact = LLM(str(folder / name), dtype="float32", kv_cache_memory=1 << 24)
        ours = exact.generate(
            PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        )
        if [list(o.token_ids) for o in ours] == continuations:
            continue
        scheme = open_checkpoint(folder / name).scheme
        if dtype == "float32" and scheme.default.act_quant == "none":
            different[name] = (continuations, [list(o.token_ids) for o in ours])
            continue
        if dtype == "bfloat16":
            other = LLM(str(folder / name), dtype=dtype, kv_cache_memory=1 << 24).logits
            judge, allowed = exact.logits, 1
        else:
            judge = with_fp8_activations(
                folder / name, scratch / f"{name}-plain", scheme.default.act_quant
            )
            other, allowed = exact.logits, 0.1
        behind, noise = furthest_behind(judge, other, continuations)
        print(
            f"{name}: furthest behind {behind:.3f}, of logits that rounding moves by up to {noise:.3f}"
        )
        if behind > allowed * noise:
            different[name] = (behind, noise)
    assert not different, different


def furthest_behind(judge, other, continuations: list[list[int]]) -> tuple[float, float]:
    """By how much a token of theirs falls short of the judge's likeliest; how far other logits are from the judge's."""
    behind = noise = 0.0
    for prompt, tokens in zip(PROMPTS, continuations, strict=True):
        logits = judge(prompt + tokens)[len(prompt) - 1 : -1]
        noise = max(
            noise, (other(prompt + tokens)[len(prompt) - 1 : -1] - logits).abs().max().item()
        )
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        behind = max(behind, (logits.max(-1).values - chosen).max().item())
    return behind, noise


def with_fp8_activations(checkpoint: Path, plain: Path, how: str):
    """Logits by transformers from the checkpoint's dense weights, linears' inputs and the cache in FP8 as it says."""
    opened = open_checkpoint(checkpoint)
    dequantize_checkpoint(opened, plain, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)

    def round_inputs(module: str):
        static = opened.linear(module).input_scale

        def hook(_module, inputs):
            x = inputs[0]
            groups = x.reshape(*x.shape[:-1], -1, 128 if how == "group" else x.shape[-1])
            scale = groups.abs().amax(-1, keepdim=True) / 448 if static is None else static
            return (
                (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            ).reshape(x.shape)

        return hook

    class Fp8Cache(DynamicCache):
        def update(self, keys, values, layer, *args, **kwargs):
            scales = [
                opened.tensor(f"model.layers.{layer}.self_attn.{kind}_scale") for kind in "kv"
            ]
            rounded = [
                (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
                for x, scale in zip((keys, values), scales, strict=True)
            ]
            return super().update(*rounded, layer, *args, **kwargs)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(round_inputs(name))
    cache = Fp8Cache if opened.scheme.kv_cache == "fp8" else DynamicCache
    return lambda ids: model(torch.tensor([ids]), past_key_values=cache()).logits[0].detach()
