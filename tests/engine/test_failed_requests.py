"""A request whose numbers break, with real decoders: nothing of it is left to those that come after."""

import itertools

import pytest
import torch

from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.kernels.cpu import library

from . import models

BAD = 7  # a token whose embedding is NaN
NUM_BLOCKS, BLOCK_SIZE = 4, 16


@pytest.fixture(
    scope="module",
    params=itertools.product(("torch", "cpp"), ("qwen3", "qwen3.5")),
    ids="-".join,
)
def runner(request, tmp_path_factory) -> Runner:
    backend, name = request.param
    if backend == "cpp" and (why := library.why_missing()):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(backend)
    models.build(name, folder, tie_word_embeddings=False)
    config = EngineConfig(
        model=str(folder),
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        cpu_isa="none" if backend == "torch" else "auto",
        kv_cache_memory=1 << 24,
    )
    runner = Runner(config)
    runner.num_blocks = NUM_BLOCKS
    with torch.inference_mode():
        runner.model.embedding[BAD] = float("nan")
    return runner


def generate(core: EngineCore, ids: list[int], max_tokens: int) -> tuple[list[int], str]:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    core.add(AddRequest("r", ids, params))
    tokens, reason = [], ""
    while core.has_work:
        for output in core.step():
            tokens += output.token_ids
            reason = output.finish_reason or reason
    core.check_idle()
    return tokens, reason


@pytest.mark.parametrize("chunk", [1, 16, 2048])
@pytest.mark.parametrize("position", [0, 37])
def test_a_failed_request_leaves_its_blocks_usable(
    runner: Runner, chunk: int, position: int
) -> None:
    """All blocks are used again, partly filled: what lies behind a request's tokens must not reach it."""
    fails = list(range(20, 59))
    fails[position] = BAD
    works = list(range(100, 118))
    core = EngineCore(EngineConfig(model="", max_num_batched_tokens=chunk), runner)
    expected = generate(core, works, 20)
    assert len(set(expected[0])) > 1
    assert expected[1] == "length"
    assert generate(core, fails, 1) == ([], "error")
    core = EngineCore(
        EngineConfig(model="", max_num_batched_tokens=chunk), runner
    )  # takes block 0 first
    assert generate(core, works, 20) == expected
