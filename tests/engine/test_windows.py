"""Layers with a window hold the blocks that they see and no others: KV groups from the model to the kernels."""

import itertools
from dataclasses import replace

import pytest
import torch

from nibble.architectures.base import Attention, GatedMlp, LayerSpec, ModelSpec, Rope
from nibble.engine import memory
from nibble.engine.backends.batch import Batch
from nibble.engine.backends.cpp.decoder import CppDecoder
from nibble.engine.backends.kv_groups import group_windows, layer_groups
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest
from nibble.engine.request import Request
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledRequest
from nibble.engine.scheduling.kv_cache_manager import RELEASED
from nibble.errors import UserError
from nibble.kernels.cpu import library

from . import models
from .driving import prompt

WINDOW, BLOCK_SIZE, CHUNK = 24, 16, 32  # of the tiny models
SEEN = 5  # blocks that a window and a chunk lie in, at most


@pytest.fixture(
    scope="module",
    params=itertools.product(("torch", "cpp"), ("gemma3", "gpt-oss", "gemma3n", "mistral-window")),
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
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=CHUNK,
        )
    )
    assert isinstance(runner.model, CppDecoder) == native
    return runner


def generate(core: EngineCore, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """At once, by chance that is the same for all; looks at what each request holds on the way."""
    params = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=max_tokens)
    tokens: dict[str, list[int]] = {}
    for index, ids in enumerate(prompts):
        tokens[str(index)] = []
        core.add(AddRequest(str(index), ids, params))
    while core.has_work:
        for output in core.step():
            assert not output.error
            tokens[output.request_id] += output.token_ids
        for request in core.scheduler.running:
            for group, table in zip(core.runner.kv_groups, request.block_tables, strict=False):
                held = sum(block != RELEASED for block in table)
                assert group.window is None or held <= SEEN
    core.check_idle()
    return list(tokens.values())


def engine(runner: Runner, **options) -> EngineCore:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": CHUNK, **options}
    return EngineCore(EngineConfig(model="", **options), runner)


def test_a_long_context_with_few_blocks_of_its_windows(runner: Runner, monkeypatch) -> None:
    """Blocks that one request has passed are another's before it ends: who still looked there would say other things.
    A turn goes on from what is left of the one before: the window's last blocks."""
    windows = [group.window for group in runner.kv_groups]
    assert windows[-1] == WINDOW and len(windows) <= 2
    prompts = [prompt(length, seed) for seed, length in enumerate((150, 40, 90, 7))]
    alone = [generate(engine(runner), [ids], 60)[0] for ids in prompts]
    assert len(set(map(tuple, alone))) == len(alone)
    turns = [[*ids, *answer, 5, 6, 7] for ids, answer in zip(prompts, alone, strict=True)]
    again = [generate(engine(runner), [ids], 9)[0] for ids in turns]
    few = [40, 2 * SEEN] if len(windows) == 2 else [2 * SEEN]
    monkeypatch.setattr(runner, "plan", replace(runner.plan, blocks=tuple(few)))
    core = engine(runner)
    assert generate(core, prompts, 60) == alone
    for ids, answer, turn, whole in zip(prompts, alone, turns, again, strict=True):
        assert generate(core, [ids], 60) == [answer]
        hits = core.stats().prefix_hits
        assert generate(core, [turn], 9) == [whole]
        assert core.stats().prefix_hits >= hits + len(turn) - 2 * BLOCK_SIZE


def test_what_is_set_back_is_computed_again(runner: Runner, monkeypatch) -> None:
    few = [14, 9] if len(runner.kv_groups) == 2 else [7]
    prompts = [prompt(30, seed) for seed in range(3)]
    alone = [generate(engine(runner), [ids], 50)[0] for ids in prompts]
    monkeypatch.setattr(runner, "plan", replace(runner.plan, blocks=tuple(few)))
    core = engine(runner, enable_prefix_caching=False)
    assert generate(core, prompts, 50) == alone
    assert core.stats().num_preemptions > 0


def test_a_released_block_is_never_named_to_a_kernel() -> None:
    """One that the request holds stands in its place: what a kernel reads there, and leaves out, is its own."""
    request = Request("r", [1] * 70, SamplingParams(), frozenset(), seed=0)
    request.block_tables = [[4, 2, 9, 0, 7], [RELEASED, RELEASED, 3, 8, 1]]
    batch = Batch([ScheduledRequest(request, 69, 1)], 16)
    assert batch.block_tables(0) == [[4, 2, 9, 0, 7]]
    assert batch.block_tables(1) == [[3, 3, 3, 8, 1]]
    assert (batch.slot_mapping(0), batch.slot_mapping(1)) == ([7 * 16 + 5], [1 * 16 + 5])


def layer(window: int | None, source: int | None = None) -> LayerSpec:
    mixer = Attention(4, 2, 16, 0.25, Rope(1e4), window=window, kv_source=source)
    return LayerSpec(mixer, GatedMlp(96, "silu"))


def model(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec(64, 199, 8192, 1e-6, layers, True)


def test_layers_that_see_as_much_are_one_group() -> None:
    spec = model(layer(512), layer(None), layer(128), layer(512))
    assert group_windows(spec) == (None, 512, 128)
    assert layer_groups(spec, spec.layers, 3) == {0: 1, 1: 0, 2: 2, 3: 1}
    assert layer_groups(spec, spec.layers[2:], 3) == {0: 2, 1: 1}  # run by another backend
    assert layer_groups(spec, spec.layers, 1) == dict.fromkeys(range(4), 0)
    assert group_windows(model(layer(64), layer(64))) == (64,)
    assert group_windows(model(LayerSpec(None, GatedMlp(96, "silu")))) == (None,)


def test_keys_and_values_stay_as_long_as_any_layer_sees_them() -> None:
    """A layer that reads another's cache sees more than that one."""
    spec = model(layer(128), layer(512), layer(512, source=0), layer(None, source=1))
    assert spec.windows == {0: 512, 1: None, 2: 512, 3: None}
    assert layer_groups(spec, spec.layers, 2) == {0: 1, 1: 0, 2: 1, 3: 0}


GEMMA = model(*[layer(512)] * 5, layer(None))  # a layer's block: 2048 bytes
BLOCK = 2 * 2 * 16 * 2 * BLOCK_SIZE


def planned(**options) -> memory.MemoryPlan:
    fields = {"model": "", "max_num_seqs": 8, "max_num_batched_tokens": 256, "block_size": 16}
    config = EngineConfig(**fields | options)
    windows = group_windows(GEMMA)
    return memory.plan(config, GEMMA, torch.bfloat16, torch.device("cpu"), windows)


def test_windows_leave_their_memory_to_full_attention() -> None:
    """As many layers with windows of 512 beside one without: the context that fits is much longer than if all kept all,
    and short requests still fit in numbers."""
    budget = 6 * BLOCK * 300  # 300 blocks, 4800 tokens, if all layers kept all
    plan = planned(kv_cache_memory=budget)
    full, window = plan.blocks
    assert plan.kv_cache == BLOCK * (full + 5 * window) <= budget
    assert plan.max_model_len == 8192 and full >= 2 * 300
    # a window, a chunk, and where they begin in a block
    assert window >= 512 // 16 + 256 // 16 + 1 and window >= full // 4
    # each may be as large as eight requests can need
    plenty = planned(kv_cache_memory=6 * BLOCK * 4096).blocks
    assert plenty[1] == 8 * (512 // 16 + 2) + 256 // 16
    assert BLOCK * (plenty[0] + 5 * plenty[1]) > 6 * BLOCK * 4096 - 6 * BLOCK


def test_no_more_is_planned_than_requests_can_fill(monkeypatch) -> None:
    room = memory.Headroom(1 << 40, "a limit")
    monkeypatch.setattr(memory, "headroom", lambda: room)
    assert planned().blocks == (8 * 8192 // 16, 8 * (512 // 16 + 2) + 256 // 16)
    short = planned(max_model_len=320)
    assert short.blocks == (8 * 20, 8 * 20)  # shorter than the window


def test_a_context_that_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"holds \d+ tokens .* a context of 8192 needs"):
        planned(kv_cache_memory=6 * BLOCK * 20, max_model_len=8192)
