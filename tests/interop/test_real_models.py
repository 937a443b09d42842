"""Real models, SmolLM2-135M-Instruct and Gemma 3 270M, against transformers. Minutes on two cores: `make test-slow`."""

import inspect
import json
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nibble
from nibble import LLM, SamplingParams
from nibble.engine.messages import AddRequest
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def passages(count: int, characters: int = 400) -> list[str]:
    """Prose and code that is on every machine: pieces of Python's own library."""
    source = inspect.getsource(textwrap) + inspect.getsource(json) + inspect.getsource(inspect)
    return [source[i * 3000 : i * 3000 + characters] for i in range(count)]


@torch.inference_mode()
def reference_logits(folder: Path, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model(torch.tensor([ids])).logits[0].float()


def test_greedy_float32_is_token_for_token_transformers_generate(real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    prompts = [tokenizer(text).input_ids[:64] for text in passages(20)]
    llm = LLM(str(real_model), dtype="float32", kv_cache_memory=1 << 30)
    ours = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    for prompt, completion in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            theirs = reference.generate(
                torch.tensor([prompt]),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                num_beams=1,
                top_k=None,
                top_p=None,
                temperature=None,
            )
        assert list(completion.token_ids) == theirs[0, len(prompt) :].tolist()


def test_bfloat16_errs_no_more_than_transformers(real_model: Path) -> None:
    """Root mean square against float32 logits; 10 % are allowed for the order of roundings."""
    ids = AutoTokenizer.from_pretrained(real_model)(passages(1, 4000)[0]).input_ids[
        :700
    ]  # past Gemma's window of 512
    exact = reference_logits(real_model, ids, torch.float32)
    theirs = (reference_logits(real_model, ids, torch.bfloat16) - exact).norm()
    ours = (
        LLM(str(real_model), dtype="bfloat16", kv_cache_memory=1 << 28).logits(ids) - exact
    ).norm()
    assert ours <= 1.1 * theirs


def test_triton_decoder_errs_no_more_than_torch(real_model: Path) -> None:
    """In Triton's interpreter, which computes float16 as a GPU does; root mean square against float32 logits. Gemma 3
    overflows float16. The interpreter stores bfloat16 cut off, not rounded: twice the error, and biased."""
    triton = pytest.importorskip("nibble.engine.backends.triton.decoder")
    ids = AutoTokenizer.from_pretrained(real_model)(passages(1)[0]).input_ids[:24]
    exact = reference_logits(real_model, ids, torch.float32)
    dtype, factor = ("bfloat16", 4) if "gemma" in real_model.name else ("float16", 1.2)
    llm = LLM(
        str(real_model), dtype=dtype, kv_cache_memory=1 << 26, cpu_isa="none", max_model_len=256
    )
    theirs = (llm.logits(ids) - exact).norm()
    runner = llm.core.runner
    runner.model = triton.TritonDecoder(runner.model, runner.config)
    assert (llm.logits(ids) - exact).norm() <= factor * theirs


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "awq", "group_size": 64},
        {"method": "gptq", "group_size": 128},
        {"method": "fp8"},
        {"method": "gptq", "group_size": 64, "symmetric": False},
    ],
    ids=str,
)
def test_conversions_serve_what_they_hold(
    real_model: Path, arguments: dict, tmp_path: Path
) -> None:
    """Float32 logits of a converted model equal transformers' on the dequantized weights. Bfloat16 ones err no more
    than transformers' bfloat16 does, through the C++ kernels with 16-bit activations and through torch's operators
    (10 % for the order of roundings; torch's int4 operator takes its scales and offsets in bfloat16, an independent
    error of the size of a weight's own rounding to bfloat16, all that transformers' has: together the root of two).
    What the CPU's default rounds besides, activations to int8 and the output head to 8 bits, moves the distribution by
    less than a tenth of what 4-bit weights do."""
    out = nibble.convert(
        str(real_model), tmp_path / "out", **arguments, calib_samples=8, evaluate=False
    )
    dequantize_checkpoint(open_checkpoint(out), tmp_path / "dense", torch.float32)
    ids = AutoTokenizer.from_pretrained(real_model)(passages(1, 2000)[0]).input_ids[:300]
    exact = reference_logits(tmp_path / "dense", ids, torch.float32)
    ours = LLM(str(out), dtype="float32", kv_cache_memory=1 << 28).logits(ids)
    assert (ours - exact).abs().max() <= 1e-4 * exact.abs().max()
    theirs_bf16 = (reference_logits(tmp_path / "dense", ids, torch.bfloat16) - exact).norm()
    for strict in ({"cpu_activations": "bf16"}, {"cpu_isa": "none"}):
        served = LLM(str(out), dtype="bfloat16", kv_cache_memory=1 << 28, **strict)
        packed = "cpu-torch-int4" in served.core.runner.model.report.used
        assert (served.logits(ids) - exact).norm() <= (2**0.5 if packed else 1.1) * theirs_bf16, (
            strict
        )
    default = LLM(str(out), dtype="bfloat16", kv_cache_memory=1 << 28).logits(ids)
    assert divergence(exact, default) < 0.01


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence in nats between the distributions of two [tokens, vocab] logits."""
    p, q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("blocks", [None, 40], ids=["roomy", "preempting"])
def test_32_requests_together_are_what_each_is_alone(real_model: Path, blocks: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    lengths = [3 + 7 * i % 90 for i in range(32)]
    prompts = [tokenizer(text).input_ids[:n] for text, n in zip(passages(32), lengths, strict=True)]
    params = [
        SamplingParams(temperature=0 if i % 2 else 0.8, seed=i, max_tokens=24 + i, ignore_eos=True)
        for i in range(32)
    ]
    alone = LLM(
        str(real_model), dtype="float32", kv_cache_memory=1 << 28, enable_prefix_caching=False
    )
    want = [alone.generate([p], s)[0].token_ids for p, s in zip(prompts, params, strict=True)]
    memory = (
        1 << 30
        if blocks is None
        else blocks * alone.core.runner.plan.kv_cache // alone.core.runner.num_blocks
    )
    together = LLM(str(real_model), dtype="float32", kv_cache_memory=memory)
    core, got = together.core, {}
    for i, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        core.add(AddRequest(str(i), prompt, sampling))
    while core.has_work:
        for output in core.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    assert [got[str(i)] for i in range(32)] == [list(tokens) for tokens in want]
    assert (core.stats().num_preemptions > 0) == (blocks is not None)
    assert core.stats().num_free_blocks == core.stats().num_blocks
    core.check_idle()
