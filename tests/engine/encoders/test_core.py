"""The encoders' loop: who is computed with whom, and who is told what."""

import struct
from collections.abc import Sequence

import pytest

from nibble.engine.config import EngineConfig
from nibble.engine.encoders.core import EncoderCore
from nibble.engine.messages import AddRequest, Ready
from nibble.engine.pooling import Pooling
from nibble.engine.request import FinishReason
from nibble.engine.sampling_params import SamplingParams


class FakeRunner:
    """A text's embedding is its first token and how many there are."""

    max_model_len, vocab_size, task = 16, 100, "embed"

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.fail = 0

    def ready(self) -> Ready:
        return Ready(16, 100, [], 0, 0, "float32", "fake", "none", {}, {}, tasks=("embed",))

    def execute(self, texts: Sequence[list[int]], asked: Sequence[Pooling]) -> list[bytes | None]:
        self.batches.append([list(text) for text in texts])
        if self.fail:
            self.fail -= 1
            raise RuntimeError("the device is on fire")
        return [None if 99 in text else struct.pack("<2f", text[0], len(text)) for text in texts]


@pytest.fixture
def core() -> EncoderCore:
    return EncoderCore(EngineConfig(model="fake", max_num_batched_tokens=10), FakeRunner())


def add(core: EncoderCore, name: str, *tokens: int, **pooling) -> None:
    params = SamplingParams(max_tokens=1, pooling=Pooling(**pooling))
    core.add(AddRequest(name, list(tokens), params))


def test_the_oldest_are_computed_first_as_many_as_the_budget_has_room_for(
    core: EncoderCore,
) -> None:
    for name, length in [("a", 4), ("b", 6), ("c", 1), ("d", 12), ("e", 9), ("f", 2)]:
        add(core, name, *range(1, length + 1))
    assert core.stats().num_waiting == 6
    steps = []
    while core.has_work:
        outputs = core.step()
        steps.append(([output.request_id for output in outputs], core.stats().step_tokens))
        assert {output.finish_reason for output in outputs} == {FinishReason.STOP}
    assert steps == [(["a", "b"], 10), (["c"], 1), (["d"], 12), (["e"], 9), (["f"], 2)]
    assert core.step() == [] and core.stats().step_tokens == 0


def test_each_hears_of_its_own(core: EncoderCore) -> None:
    add(core, "a", 7, 8)
    add(core, "b", 5)
    found = {output.request_id: output.embedding for output in core.step()}
    assert found == {"a": struct.pack("<2f", 7, 2), "b": struct.pack("<2f", 5, 1)}


def test_an_aborted_text_is_not_computed(core: EncoderCore) -> None:
    add(core, "a", 1)
    add(core, "b", 2)
    core.abort("a")
    core.abort("nobody")
    assert [output.request_id for output in core.step()] == ["b"]
    assert core.runner.batches == [[[2]]]
    core.check_idle()


@pytest.mark.parametrize(
    ("tokens", "pooling", "said"),
    [
        ([], {}, "empty"),
        ([1] * 17, {}, "17 tokens, more than 16"),
        ([1, 100], {}, "0 .. 99"),
        ([-1], {}, "0 .. 99"),
        ([1], {"task": "score"}, "anything but embed"),
        ([1], {"second_part": 2}, "second part"),
    ],
)
def test_what_cannot_be_served_is_refused(core: EncoderCore, tokens, pooling, said) -> None:
    with pytest.raises(ValueError, match=said):
        add(core, "a", *tokens, **pooling)
    assert not core.has_work


def test_text_is_not_generated(core: EncoderCore) -> None:
    with pytest.raises(ValueError, match="encoder"):
        core.add(AddRequest("a", [1], SamplingParams(max_tokens=1)))


def test_a_name_is_used_once(core: EncoderCore) -> None:
    add(core, "a", 1)
    with pytest.raises(ValueError, match="already in use"):
        add(core, "a", 2)


def test_a_step_that_fails_takes_down_its_own_texts(core: EncoderCore) -> None:
    core.runner.fail = 1
    add(core, "a", *range(9))
    add(core, "b", 3, 4)
    (failed,) = core.step()
    assert (failed.request_id, failed.finish_reason) == ("a", FinishReason.ERROR) and failed.error
    assert core.runner.batches[-1] == [[0]]  # the probe
    (served,) = core.step()
    assert served.request_id == "b" and not served.error


def test_a_device_that_computes_no_more_ends_the_loop(core: EncoderCore) -> None:
    core.runner.fail = 2
    add(core, "a", 1)
    with pytest.raises(RuntimeError, match="on fire"):
        core.step()


def test_what_is_not_finite_is_an_error_of_that_text_alone(core: EncoderCore) -> None:
    add(core, "a", 99)
    add(core, "b", 1)
    failed, served = core.step()
    assert failed.finish_reason == FinishReason.ERROR and "finite" in failed.error
    assert served.embedding and not served.error
