"""Models whose layers carry a state, through the whole engine: what a request computes does not depend on who had its
slot before, and a conversation goes on from snapshots with the answers that it would have without."""

import itertools

import pytest
import torch

from nibble.engine.backends.batch import Batch
from nibble.engine.backends.cpp.decoder import CppDecoder
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest, RequestOutput
from nibble.engine.request import Request
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledRequest
from nibble.kernels.cpu import library

from . import models

TURNS, ASKED, ANSWERED = 10, 9, 21


@pytest.fixture(
    scope="module",
    params=itertools.product(("torch", "cpp"), ("qwen3.5", "lfm2", "granite4", "nemotron-h")),
    ids="-".join,
)
def runner(request, tmp_path_factory) -> Runner:
    backend, name = request.param
    native = backend == "cpp"
    if native and (why := library.why_missing()):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(name)
    models.build(name, folder, max_position_embeddings=1024)
    runner = Runner(
        EngineConfig(
            model=str(folder),
            dtype="bfloat16" if native else "float32",
            cpu_isa="auto" if native else "none",
            kv_cache_memory=1 << 24,
            max_num_seqs=4,
        )
    )
    assert isinstance(runner.model, CppDecoder) == native
    return runner


def engine(runner: Runner, **options) -> EngineCore:
    return EngineCore(EngineConfig(model="", max_num_seqs=4, **options), runner)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(core: EngineCore, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """All at once."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    outputs: list[list[RequestOutput]] = [[] for _ in prompts]
    for index, ids in enumerate(prompts):
        core.add(AddRequest(str(index), ids, params))
    while core.has_work:
        for output in core.step():
            outputs[int(output.request_id)].append(output)
    core.check_idle()
    core.num_cached = [each[-1].num_cached_tokens for each in outputs]
    return [[token for output in each for token in output.token_ids] for each in outputs]


@pytest.mark.parametrize("chunk", [2048, 40])
def test_turns_of_a_conversation_come_from_the_cache_and_change_no_answer(runner, chunk) -> None:
    cached = engine(runner, max_num_batched_tokens=chunk)
    plain = engine(runner, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    history = prompt(500, 0)
    for turn in range(TURNS):
        ids = history + prompt(ASKED, turn)
        [answer] = generate(cached, [ids], ANSWERED)
        assert [answer] == generate(plain, [ids], ANSWERED)
        if turn:
            assert cached.num_cached[0] >= 0.9 * len(ids)
        history = ids + answer


def states(runner: Runner, slot: int) -> list[torch.Tensor]:
    """Of every layer, copied."""
    if isinstance(runner.model, CppDecoder):
        return [layer[slot].clone() for layer in runner.cache.state_layers]
    return [each[slot].clone() for of in runner.cache.states.layers.values() for each in of]


def test_a_snapshot_within_a_step_is_the_state_of_the_tokens_before_it(runner) -> None:
    """Wherever it lies: kernels take several tokens at once."""
    ids, snapshots = prompt(23, 5), [(7, 1), (18, 2)]

    def compute(count: int, slot: int, **more) -> None:
        request = Request("r", ids, SamplingParams(), frozenset(), seed=0)
        request.block_tables, request.state_slot = [[0, 1], [1, 0]], slot
        batch = Batch([ScheduledRequest(request, 0, count, **more)], runner.block_size)
        with torch.inference_mode():
            runner.model.forward(batch, runner.cache)

    compute(len(ids), 0, snapshots=snapshots)
    for count, slot in snapshots:
        compute(count, 3)
        torch.testing.assert_close(states(runner, slot), states(runner, 3), rtol=1e-3, atol=1e-4)


def test_nothing_of_a_state_reaches_who_has_its_slot_next(runner) -> None:
    """A slot is taken again and again, by prompts of one token too."""
    core = engine(runner)
    prompts = [prompt(n, n) for n in (1, 40, 2, 1, 17, 90, 1, 3)]
    alone = [generate(engine(runner), [ids], 8)[0] for ids in prompts]
    for _ in range(2):
        assert generate(core, prompts, 8) == alone


def test_what_is_preempted_is_computed_again(runner, monkeypatch) -> None:
    monkeypatch.setattr(runner, "num_blocks", 9)
    core = engine(runner, enable_prefix_caching=False)
    prompts = [prompt(30, seed) for seed in range(3)]
    assert generate(core, prompts, 40) == [generate(engine(runner), [p], 40)[0] for p in prompts]
    assert core.stats().num_preemptions > 0
