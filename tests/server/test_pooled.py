"""Texts through a stand-in engine: who is admitted, what is counted, and what each end of the engine's means."""

import asyncio
import struct
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nibble.engine.messages import EngineStats, RequestOutput
from nibble.engine.pooling import EmbeddingInfo, Pooling
from nibble.server import pooled, sse
from nibble.server.errors import ApiError
from nibble.server.serving import Serving

from .test_metrics import READY, samples


class Engine:
    """Answers each text with its first token, last text first; `fate` says otherwise."""

    is_alive, ready = True, READY

    def __init__(self, fate: Callable[[int], dict | None] = lambda token: {}):
        self.fate, self.open, self.aborted, self.stats = fate, {}, [], EngineStats()

    def submit(self, name, prompt, params, sink) -> None:
        assert params.max_tokens == 1
        self.open[name] = sink
        asyncio.get_running_loop().call_later(0.01 / prompt[0], self._answer, name, prompt[0])

    def _answer(self, name: str, token: int) -> None:
        fields = self.fate(token)
        if name in self.open and fields is not ...:
            output = RequestOutput(name, finish_reason="stop", embedding=struct.pack("<f", token))
            for field, value in (fields or {}).items():
                setattr(output, field, value)
            self.open.pop(name)(None if fields is None else output)

    def abort(self, name: str) -> None:
        self.aborted.append(name)
        if sink := self.open.pop(name, None):
            sink(RequestOutput(name, finish_reason="abort"))


def serving_of(engine: Engine, **limits: int) -> Serving:
    serving = Serving(("tiny",), **limits)
    nothing = SimpleNamespace()
    serving.ready(engine, nothing, nothing, nothing)
    return serving


async def forever() -> dict:
    await asyncio.Event().wait()
    return {}


def run(serving: Serving, tokens: list[int], receive=forever, tenant=None) -> list[float]:
    async def work() -> list[bytes]:
        request = SimpleNamespace(receive=receive, scope={"tenant": tenant})
        prompts = [[token] * 3 for token in tokens]
        return await pooled.run(request, serving, prompts, [Pooling()] * len(prompts), 0.0)

    return [pooled.floats(vector)[0] for vector in asyncio.run(work())]


def test_vectors_come_in_the_order_of_texts_and_are_counted() -> None:
    serving = serving_of(Engine())
    assert run(serving, [1, 5, 2], tenant=SimpleNamespace(name="shop")) == [1, 5, 2]
    found = samples(serving.metrics)
    assert found["nibble_prompt_tokens_total", ()] == 9
    assert found["nibble_request_success_total", (("finished_reason", "stop"),)] == 3
    assert found["nibble_request_prompt_tokens_sum", ()] == 9
    assert found["nibble_api_key_requests_total", (("api_key", "shop"),)] == 1
    assert serving.active_sequences == 0 and not serving.engine.aborted


@pytest.mark.parametrize(("texts", "held"), [(1, 1), (16, 1), (17, 2), (64, 4), (2048, 5)])
def test_sixteen_texts_wait_as_one_sequence_and_no_request_is_too_large(
    texts: int, held: int
) -> None:
    serving, seen = serving_of(Engine(), max_num_seqs=2, max_queued_requests=3), set()
    serving.engine.fate = lambda token: seen.add(serving.active_sequences) or {}
    run(serving, [3] * texts)
    assert seen == {held} and serving.active_sequences == 0


def test_a_full_queue_is_a_503() -> None:
    serving = serving_of(Engine(), max_num_seqs=1, max_queued_requests=0)
    serving.admit(1)
    with pytest.raises(ApiError) as caught:
        run(serving, [1])
    assert caught.value.status == 503 and serving.active_sequences == 1


@pytest.mark.parametrize(
    ("fate", "status", "said"),
    [
        ({"error": "no number", "finish_reason": "error"}, 500, "no number"),
        ({"finish_reason": "abort"}, 503, "shutting down"),
        (None, 503, "engine has stopped"),
    ],
)
def test_one_text_that_fails_ends_the_request(fate, status: int, said: str) -> None:
    """Text 9 fails first; the others never end by themselves."""
    serving = serving_of(Engine(lambda token: fate if token == 9 else ...))
    with pytest.raises(ApiError, match=said) as caught:
        run(serving, [1, 9, 2])
    assert caught.value.status == status and serving.active_sequences == 0
    assert {"0", "2"} <= {name.rpartition("-")[2] for name in serving.engine.aborted}
    assert not serving.engine.open


def test_a_client_that_leaves_takes_all_back() -> None:
    async def leaves() -> dict:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    serving = serving_of(Engine(lambda token: {} if token == 2 else ...))
    with pytest.raises(sse.ClientGone):
        run(serving, [1, 2, 3], receive=leaves)
    aborted = sorted(name.rpartition("-")[2] for name in serving.engine.aborted)
    assert aborted == ["0", "2"] and serving.active_sequences == 0
    assert samples(serving.metrics)["nibble_http_requests_client_disconnected_total", ()] == 1


def embedding(serving: Serving, **info) -> Serving:
    ready = SimpleNamespace(embedding=EmbeddingInfo(4, **info), max_model_len=9, num_blocks=0)
    serving.engine.ready = ready
    return serving


def test_prompts_stand_before_texts() -> None:
    prompts = {"query": "Q: ", "passage": "P: "}
    serving = embedding(serving_of(Engine()), prompts=prompts, default_prompt="passage")
    assert pooled.with_prompts(serving, ["A b"], None) == ["P: A b"]
    assert pooled.with_prompts(serving, ["A b"], "query") == ["Q: A b"]
    assert pooled.prompt_of(serving, "document", "passage") == "passage"
    assert pooled.prompt_of(serving, "document") is None
    with pytest.raises(ApiError, match="it has: passage, query"):
        pooled.with_prompts(serving, ["A b"], "document")
    embedding(serving, prompts=prompts, lower_case=True)
    assert pooled.with_prompts(serving, ["A b"], None) == ["a b"]
    assert pooled.with_prompts(serving, ["A b"], "query") == ["q: a b"]


def test_a_decoder_wants_room_for_one_token_more() -> None:
    serving = embedding(serving_of(Engine()))
    assert pooled.max_prompt(serving) == 9
    serving.engine.ready.num_blocks = 7
    assert pooled.max_prompt(serving) == 8


def test_a_request_has_a_bound_in_all() -> None:
    pooled.check_size([[1] * 2**17] * 2, "input")
    with pytest.raises(ApiError, match="262145") as caught:
        pooled.check_size([[1] * 2**17] * 2 + [[1]], "input")
    assert caught.value.param == "input"
    with pytest.raises(ApiError, match="no tokens"):
        pooled.check_size([[1], []], "input")
