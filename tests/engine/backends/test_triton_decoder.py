"""The Triton decoder, its sampler and its graphs in Triton's interpreter, against the torch decoder and the host's
sampler. A recorded graph is here a call that is made again over the same tensors, which is what a replay is."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nibble.architectures.base import (
    Attention,
    GatedDeltaNet,
    GatedMlp,
    LatentAttention,
    LayerSpec,
    Mamba2,
    ModelSpec,
    Rope,
)
from nibble.architectures.registry import model_spec
from nibble.engine.backends.base import HostSampling, Target
from nibble.engine.backends.choose import assign
from nibble.engine.backends.triton import loader
from nibble.engine.backends.triton.graphs import DecodeGraphs, graph_sizes
from nibble.engine.backends.triton.loader import TritonBackend
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import PendingStep
from nibble.errors import UserError
from nibble.kernels import device as machine
from nibble.quant.checkpoint import FolderCheckpoint

from .. import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in models.CONFIGS:
        made[name] = tmp_path_factory.mktemp(name)
        models.build(name, made[name])
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two layers: the interpreter takes a second for a step of four."""
    folder = tmp_path_factory.mktemp("small")
    models.build("qwen2", folder, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """A layer with a state, one with keys and values."""
    folder = tmp_path_factory.mktemp("hybrid")
    kinds = ["linear_attention", "full_attention"]
    models.build("qwen3.5", folder, num_hidden_layers=2, layer_types=kinds)
    return folder


@pytest.fixture(scope="module", params=["small", "hybrid"])
def either(request) -> Path:
    return request.getfixturevalue(request.param)


def torch_runner(folder: Path, dtype: str = "float16", **options) -> Runner:
    options = {"kv_cache_memory": 1 << 20, "cpu_isa": "none", "max_num_seqs": 4, **options}
    return Runner(EngineConfig(model=str(folder), dtype=dtype, **options))


def again(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    output = call()

    def replay() -> None:
        output.copy_(call())

    return replay, output


def triton_runner(folder: Path, cache: str = "auto", graphs: bool = True, **options) -> Runner:
    """What the runner makes of itself on a CUDA device; or without graphs, which take the interpreter's time."""
    runner = torch_runner(folder, **options)
    fields = {name: getattr(runner.config, name) for name in runner.config.__struct_fields__}
    runner.config = EngineConfig(**{**fields, "kv_cache_dtype": cache})
    backend = TritonBackend(Target(runner.config, runner.model.dtype, runner.model.device))
    layers = range(runner.spec.num_layers)
    with torch.inference_mode():
        runner.model = backend.load(FolderCheckpoint(folder), runner.spec, layers, lambda i: None)
    runner.cache = runner.model.new_cache(runner.plan.blocks, runner.num_states)
    if graphs:
        with torch.inference_mode():
            runner.model.capture(again, runner.cache, runner.max_model_len)
    return runner


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(
    runner: Runner, asked: list[tuple[list[int], dict]], at_once: bool = True
) -> list[list[int]]:
    core = EngineCore(runner.config, runner)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(asked))}
    errors = []
    for index, (ids, params) in enumerate(asked):
        core.add(
            AddRequest(
                str(index), ids, SamplingParams(**{"ignore_eos": True, "max_tokens": 5, **params})
            )
        )
        while core.has_work and (not at_once or index == len(asked) - 1):
            for output in core.step():
                tokens[output.request_id] += output.token_ids
                errors += [output.error] if output.error else []
    core.check_idle()
    assert not errors
    return list(tokens.values())


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
def test_logits_of_every_architecture(folders, name: str) -> None:
    """As far from float32 as torch's own float16 operators, give or take: rounding falls in other places."""
    ids = prompt(37)
    exact = torch_runner(folders[name], "float32").logits(ids)
    theirs = (torch_runner(folders[name]).logits(ids) - exact).norm()
    ours = triton_runner(folders[name], graphs=False).logits(ids)
    assert (ours - exact).norm() <= 1.5 * theirs


def test_all_that_there_is_is_taken(folders) -> None:
    target = Target(EngineConfig(model=""), torch.float16, torch.device("cuda"))
    refused = set()
    for name, folder in folders.items():
        spec = model_spec(json.loads((folder / "config.json").read_text()))
        if any(TritonBackend(target).why_not(layer, spec) for layer in spec.layers):
            refused.add(name)
    assert not refused


@pytest.mark.parametrize(("cache", "bound"), [("int8", 0.03), ("fp8", 0.10)])
def test_a_cache_of_8_bits(folders, cache: str, bound: float) -> None:
    """int8 rounds to 1/254 of a head's largest number, e4m3 to 1/16 of the number itself at worst."""
    ids = prompt(37)
    exact = torch_runner(folders["llama"]).logits(ids)
    got = triton_runner(folders["llama"], cache, graphs=False).logits(ids)
    assert 0 < (got - exact).norm() <= bound * exact.norm()


def test_tokens_do_not_depend_on_the_batch(either) -> None:
    """Steps from graphs with padding, mixed steps, chunks, an overlapped loop: all as when alone and one at a time."""
    asked = [
        (prompt(length, seed), {"temperature": 0.0})
        for seed, length in enumerate((5, 21, 1, 40, 9))
    ]
    alone = generate(torch_runner(either, "float32"), asked, at_once=False)
    runner = triton_runner(either, max_num_batched_tokens=24)
    assert generate(runner, asked) == alone
    assert {1, 2, 4} >= set(
        runner.model.captured.graphs._recorded
    ) and 4 in runner.model.captured.graphs._recorded


def test_experts_are_chosen_in_graphs(tmp_path: Path) -> None:
    """Of other tokens than the graph was recorded with, in batches of other sizes."""
    models.build("qwen3-moe", tmp_path, num_hidden_layers=2, num_experts=4)
    asked = [(prompt(length, length), {"temperature": 0.0, "max_tokens": 3}) for length in (4, 9)]
    alone = generate(triton_runner(tmp_path, graphs=False), asked, at_once=False)
    runner = triton_runner(tmp_path, max_num_seqs=2)
    assert generate(runner, asked) == alone
    assert set(runner.model.captured.graphs._recorded) == {2}


def test_few_blocks_mean_preemption_and_the_same_tokens(either) -> None:
    asked = [(prompt(14, seed), {"temperature": 0.0, "max_tokens": 6}) for seed in range(3)]
    alone = generate(torch_runner(either, "float32"), asked, at_once=False)
    runner = triton_runner(either)
    runner.num_blocks = 5  # of 16 tokens: three requests of 20 do not fit
    assert generate(runner, asked) == alone


def test_windows_release_blocks_that_graphs_still_have_in_their_tables(tmp_path) -> None:
    """Two requests share five blocks of the window's group: what one has passed is the other's while both decode."""
    kinds = ["sliding_attention", "full_attention"]
    models.build("gemma3", tmp_path, num_hidden_layers=2, layer_types=kinds)
    asked = [(prompt(n, n), {"temperature": 0.0, "max_tokens": 12}) for n in (38, 45)]
    alone = generate(torch_runner(tmp_path, "float32"), asked, at_once=False)
    runner = triton_runner(tmp_path, max_num_batched_tokens=24)
    assert [group.window for group in runner.kv_groups] == [None, 24]
    runner.plan = replace(runner.plan, blocks=(8, 5))
    assert generate(runner, asked) == alone
    assert 2 in runner.model.captured.graphs._recorded


def test_a_request_that_grows_long_has_the_other_factors(tmp_path) -> None:
    """From 33 tokens on, beside one that stays short and one that was long from the start; graphs for all of them."""
    models.build("phi3-longrope", tmp_path, num_hidden_layers=2)
    asked = [(prompt(length, length), {"temperature": 0.0}) for length in (9, 30, 40)]
    alone = generate(torch_runner(tmp_path, "float32"), asked, at_once=False)
    assert generate(triton_runner(tmp_path), asked) == alone


def test_turns_go_on_from_snapshots_of_states(hybrid) -> None:
    """Of the ends of chunks and of blocks in answers; these are taken within graphs."""
    runner = triton_runner(hybrid, max_num_batched_tokens=17)
    core = EngineCore(runner.config, runner)
    asked = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 14}
    ids = prompt(20)
    for cached in (0, 32):
        [alone] = generate(torch_runner(hybrid, "float32"), [(ids, asked)])
        core.add(AddRequest("turn", ids, SamplingParams(**asked)))
        answer = []
        while core.has_work:
            for output in core.step():
                answer += output.token_ids
        assert (answer, output.num_cached_tokens) == (alone, cached)
        ids = ids + answer + prompt(3)
    core.check_idle()


SAMPLED = [
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "seed": 2, "top_k": 7, "top_p": 0.9},
    {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.7, "frequency_penalty": 0.5},
    {"temperature": 0.0, "presence_penalty": 1.5, "logit_bias": {5: 3.0}},
    {
        "temperature": 1.0,
        "seed": 4,
        "min_p": 0.1,
        "min_tokens": 3,
        "stop_token_ids": tuple(range(100)),
    },
]


@pytest.mark.parametrize("host_too", [False, True])
def test_sampling_is_that_of_the_host(small, host_too: bool) -> None:
    """More requests than rows of penalty state, and with `host_too` one whose log-probabilities the host computes."""
    asked = [(prompt(6 + seed, seed), params) for seed, params in enumerate(SAMPLED)]
    if host_too:
        asked.insert(2, (prompt(4, 9), {"temperature": 0.9, "seed": 5, "logprobs": 2}))
    runner = triton_runner(small)
    there = generate(runner, asked)
    runner.model.sample = lambda logits, requests, result: HostSampling().sample(
        logits, requests, result
    )
    assert generate(runner, asked) == there


def test_a_finished_request_is_forgotten(small) -> None:
    runner = triton_runner(small)
    core = EngineCore(runner.config, runner)
    penalized = SamplingParams(max_tokens=4, presence_penalty=1.0, ignore_eos=True)
    core.add(AddRequest("a", prompt(5), penalized))
    request = weakref.ref(core.scheduler.waiting[0])
    while core.has_work:
        assert request() is not None
        core.step()
    gc.collect()
    assert request() is None


def test_a_step_is_open_until_it_is_asked_for(small) -> None:
    runner = triton_runner(small)
    core = EngineCore(runner.config, runner)
    core.add(AddRequest("a", prompt(5), SamplingParams(temperature=0.0, max_tokens=3)))
    batch = core.scheduler.schedule()
    step = runner.execute(batch)
    assert isinstance(step, PendingStep)
    assert list(step.result().tokens) == ["a"]


def test_logits_that_are_not_numbers_fail_one_request(small) -> None:
    runner = triton_runner(small)
    with torch.inference_mode():
        runner.model.weights.embedding[7] = float("nan")
    core = EngineCore(runner.config, runner)
    core.add(AddRequest("good", [3, 4, 5], SamplingParams(temperature=0.0, max_tokens=4)))
    core.add(AddRequest("bad", [3, 7, 5], SamplingParams(temperature=0.0, max_tokens=4)))
    ends = {}
    while core.has_work:
        ends |= {
            output.request_id: output.finish_reason
            for output in core.step()
            if output.finish_reason
        }
    core.check_idle()
    assert ends == {"good": "length", "bad": "error"}


def test_a_size_that_cannot_be_captured_is_launched() -> None:
    def fails(call: Callable[[], Tensor]):
        raise RuntimeError("out of memory")

    graphs = DecodeGraphs(4, fails, torch.zeros)
    assert graphs.size_for(4) is None and graphs.size_for(1) == 1
    assert not graphs.record(1) and graphs.size_for(1) == 2


def test_sizes_of_graphs() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    sizes = graph_sizes(300)
    assert sizes[-1] == 300 and sizes == sorted(set(sizes)) and len(sizes) < 32


def test_what_it_cannot_serve_is_said(small, monkeypatch) -> None:
    model = torch_runner(small).spec
    config = EngineConfig(model="")
    for cc, dtype, reason in (
        (90, torch.float32, "16-bit"),
        (75, torch.bfloat16, "8.0"),
        (70, torch.float16, "7.5"),
        (75, torch.float16, None),
    ):
        monkeypatch.setattr(machine, "cuda_capability", lambda device, cc=cc: cc)
        assignment = assign(Target(config, dtype, torch.device("cuda")), model)
        assert assignment.refused is None if reason is None else reason in str(assignment.refused)
        assert assignment.runs[0].backend.name == ("torch" if reason else "triton")
    with pytest.raises(UserError, match="fp8 needs a CUDA device"):
        torch_runner(small, kv_cache_dtype="fp8")


LATENTS = LatentAttention(4, 48, 32, 32, 16, 16, 0.15, Rope(10000.0), 1e-3)


@pytest.mark.parametrize(
    ("mixer", "cache", "cc", "reason"),
    [
        (LATENTS, "auto", 80, None),
        (LATENTS, "int8", 80, "16 bits alone"),
        (LATENTS, "auto", 75, "8.0 on, this card has 7.5"),
        (LatentAttention(4, 48, 576, 32, 16, 16, 0.1, Rope(1e4), 1e-3), "auto", 80, "of 576"),
        (Attention(4, 2, 288, 0.1, None), "auto", 75, "heads of 288"),
        (Attention(256, 2, 256, 0.1, None, qk_norm="all"), "auto", 75, "norm for 65536"),
        (GatedDeltaNet(2, 2, 1024, 64, 4), "auto", 75, "states of 1024 rows"),
        (Mamba2(8, 64, 1024, 1, 4), "auto", 75, "states of 1024 rows"),
        (Mamba2(1024, 64, 128, 1, 4), "auto", 75, "norm for 65536"),
    ],
)
def test_sizes_that_no_kernel_has_are_refused(mixer, cache, cc, reason, monkeypatch) -> None:
    monkeypatch.setattr(loader, "cuda_capability", lambda device: cc)
    model = ModelSpec(64, 199, 256, 1e-6, (LayerSpec(mixer, GatedMlp(96, "silu")),), False)
    config = EngineConfig(model="", kv_cache_dtype=cache)
    target = Target(config, torch.float16, torch.device("cuda"))
    told = TritonBackend(target).why_not(model.layers[0], model)
    assert told is None if reason is None else reason in str(told)
