"""EngineCore: what is refused at the door, and what a failing step takes down."""

import pytest

from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest, RequestOutput
from nibble.engine.pooling import Pooling
from nibble.engine.sampling_params import SamplingParams

from .fakes import EOS, VOCAB_SIZE, FakeRunner, OverlappingRunner
from .scheduling.test_scheduler import solo


def make_core(**runner) -> EngineCore:
    return EngineCore(EngineConfig(model="fake"), FakeRunner(**runner))


def add(core: EngineCore, request_id: str, prompt: list[int], **params) -> None:
    core.add(
        AddRequest(
            request_id, prompt, SamplingParams(**{"ignore_eos": True, "max_tokens": 4, **params})
        )
    )


def run(core: EngineCore) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while core.has_work:
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    core.check_idle()
    return outputs


def test_generates_and_ends_idle() -> None:
    core = make_core()
    add(core, "a", [1, 2, 3])
    outputs = run(core)["a"]
    assert [token for output in outputs for token in output.token_ids] == solo([1, 2, 3], 4)
    assert outputs[-1].finish_reason == "length"
    assert core.step() == []
    assert core.stats().num_free_blocks == core.stats().num_blocks


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([VOCAB_SIZE], {}, "token ids outside"),
        ([-1], {}, "token ids outside"),
        (list(range(64)), {}, "no room"),
        ([1], {"temperature": -1.0}, "temperature must be 0, or between 1e-05 and 10"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused(prompt: list[int], params: dict, message: str) -> None:
    core = make_core()
    with pytest.raises(ValueError, match=message):
        add(core, "a", prompt, **params)
    assert not core.has_work


def test_a_failing_step_fails_its_requests_and_the_engine_lives_on() -> None:
    core = make_core()
    add(core, "a", [1])
    add(core, "b", [2])
    core.step()
    core.runner.fail_next = 1
    failed = core.step()
    assert {output.request_id for output in failed} == {"a", "b"}
    assert all(
        output.finish_reason == "error" and "on fire" not in output.error for output in failed
    )
    core.check_idle()
    add(core, "c", [3])
    assert [t for o in run(core)["c"] for t in o.token_ids] == solo([3], 4)


def test_an_overlapping_engine_is_one_step_ahead() -> None:
    core = EngineCore(EngineConfig(model="fake"), OverlappingRunner())
    add(core, "a", [1, 2, 3])
    add(core, "b", [4], max_tokens=2)
    assert core.step() == []  # launched, and nothing to take in
    assert [output.request_id for output in core.step()] == ["a", "b"]
    outputs = run(core)
    assert core.runner.batches == [
        [("a", 0, 3), ("b", 0, 1)],
        [("a", 3, 4), ("b", 1, 2)],
        [("a", 4, 5)],
        [("a", 5, 6)],
    ]
    tokens = [token for output in outputs["a"] for token in output.token_ids]
    assert tokens == solo([1, 2, 3], 4)[1:]
    assert core.stats().num_free_blocks == core.stats().num_blocks


def test_a_step_that_fails_late_takes_its_requests_and_the_engine_lives_on() -> None:
    core = EngineCore(EngineConfig(model="fake"), OverlappingRunner())
    add(core, "a", [1])
    core.step()
    core.runner.fail_next = 1
    core.step()  # this one will fail, and one more is launched before that is known
    add(core, "b", [2])
    failed = core.step()
    assert [(output.request_id, output.finish_reason) for output in failed] == [("a", "error")]
    assert [t for o in run(core)["b"] for t in o.token_ids] == solo([2], 4)


def test_an_engine_that_cannot_even_compute_one_token_gives_up() -> None:
    core = make_core()
    add(core, "a", [1])
    core.runner.fail_next = 2
    with pytest.raises(RuntimeError, match="on fire"):
        core.step()


def test_ready_tells_the_context_that_really_fits() -> None:
    assert make_core(num_blocks=4, block_size=4, max_model_len=1000).ready().max_model_len == 16


def test_seeds_are_drawn_from_the_engines_seed() -> None:
    def seeds(seed: int) -> list[int]:
        core = EngineCore(EngineConfig(model="fake", seed=seed), FakeRunner())
        add(core, "a", [1])
        add(core, "b", [1])
        add(core, "c", [1], seed=5)
        return [request.seed for request in core.scheduler.waiting]

    assert seeds(0) == seeds(0) != seeds(1)
    assert len(set(seeds(0))) == 3
    assert seeds(0)[2] == 5


def test_eos_comes_from_the_runner() -> None:
    core = make_core()
    add(core, "a", [1], ignore_eos=False)
    assert core.scheduler.waiting[0].eos_token_ids == {EOS}


@pytest.mark.parametrize("runner", [FakeRunner, OverlappingRunner])
@pytest.mark.parametrize("num_blocks", [16, 64])
def test_prompts_are_pooled_beside_others_that_generate(
    runner: type[FakeRunner], num_blocks: int
) -> None:
    """In chunks, one step ahead, set back for want of blocks, with known prefixes: whole, once, and nothing is held."""
    config = EngineConfig(model="fake", max_num_batched_tokens=7)
    core = EngineCore(config, runner(num_blocks=num_blocks))
    prompts = {f"p{i}": list(range(10, 12 + 5 * i)) for i in range(6)}
    pooling = {"pooling": Pooling(), "max_tokens": 1, "ignore_eos": False}
    for index, (name, prompt) in enumerate(prompts.items()):
        add(core, f"t{index}", prompt, max_tokens=20)
        add(core, name, prompt, **pooling)
    outputs, begun = (
        run(core),
        [name for batch in core.runner.batches for name, start, _ in batch if not start],
    )
    for index, (name, prompt) in enumerate(prompts.items()):
        (output,) = outputs[name]
        assert (output.finish_reason, output.token_ids) == ("stop", [])
        assert output.embedding == bytes(prompt) and output.num_cached_tokens == 0
        text = [token for each in outputs[f"t{index}"] for token in each.token_ids]
        assert text == solo(prompt, 20)
    set_back = any(begun.count(name) > 1 for name in prompts)
    assert set_back == (num_blocks == 16)


def test_a_pooled_prompt_that_is_aborted_holds_nothing() -> None:
    core = EngineCore(EngineConfig(model="fake", max_num_batched_tokens=4), OverlappingRunner())
    add(core, "a", list(range(10)), pooling=Pooling(), max_tokens=1)
    core.step()
    core.step()
    core.abort("a")
    assert run(core) == {}
