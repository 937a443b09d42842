"""Whole models on the GPU against the same checkpoint on the CPU in float32, on torch's operators.

Tolerances are of the norm of all logits: rounding to 16 bits after every operation costs some thousandths in float16
and some hundredths in bfloat16; FP8 activations, where a kernel takes them, a few hundredths more.
"""

import dataclasses
from pathlib import Path

import pytest
import random_llama
import torch

from nibble import LLM, SamplingParams

IDS = torch.randint(
    3, 250, (70,), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
).tolist()
TOLERANCE = {"float16": 0.02, "bfloat16": 0.06}
SMALL = {"max_model_len": 512, "kv_cache_memory": 1 << 28}


def reference(model: Path, **options: str) -> torch.Tensor:
    llm = LLM(
        str(model),
        device="cpu",
        dtype="float32",
        cpu_isa="none",
        prepared_cache=None,
        **SMALL,
        **options,
    )
    return llm.logits(IDS)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert bool(torch.isfinite(got).all())
    return float((got.cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int4", "int8", "fp8"])
def test_a_small_llama_is_what_it_is_on_the_cpu(
    tiny_llama: Path, dtype: str, quantize: str | None
) -> None:
    llm = LLM(str(tiny_llama), device="cuda", dtype=dtype, quantize=quantize, **SMALL)
    tolerance = TOLERANCE[dtype] + (0.1 if quantize == "fp8" else 0)
    assert error(llm.logits(IDS), reference(tiny_llama, quantize=quantize)) < tolerance


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_generated_tokens_are_the_likeliest(tiny_llama: Path, quantize: str | None) -> None:
    """Batched decoding over the paged cache agrees with the logits of one pass over the whole text."""
    llm = LLM(
        str(tiny_llama),
        device="cuda",
        dtype="float16",
        quantize=quantize,
        max_num_batched_tokens=64,
        **SMALL,
    )
    prompts = [IDS[:length] for length in (1, 5, 16, 17, 33, 64, 70)]
    for prompt, done in zip(
        prompts,
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)),
        strict=True,
    ):
        logits = llm.logits(prompt + done.token_ids)[len(prompt) - 1 : -1].float().cpu()
        chosen = logits.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        slack = 0.02 * float(logits.norm(dim=1).mean())
        assert len(done.token_ids) == 40 and bool((chosen >= logits.amax(1) - slack).all())


def test_seeded_draws_repeat(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), device="cuda", dtype="float16", enable_prefix_caching=False, **SMALL)
    params = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=20, seed=5, max_tokens=20, ignore_eos=True
    )
    assert llm.generate([IDS], params)[0].token_ids == llm.generate([IDS], params)[0].token_ids


@pytest.mark.parametrize("fmt", list(random_llama.FORMATS))
def test_a_layer_of_the_shape_of_llama_3_8b(fmt: str, tmp_path: Path) -> None:
    dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    shape = dataclasses.replace(random_llama.Shape(), layers=1, vocab=8192)
    random_llama.write(tmp_path / fmt, fmt, shape, torch.device("cuda"))
    llm = LLM(str(tmp_path / fmt), device="cuda", dtype=dtype, **SMALL)
    assert error(llm.logits(IDS), reference(tmp_path / fmt)) < TOLERANCE[dtype] + (
        0.06 if fmt == "fp8" else 0
    )
    done = llm.generate([IDS] * 3, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert all(len(completion.token_ids) == 5 for completion in done)
