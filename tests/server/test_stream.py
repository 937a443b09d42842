"""The way of a streamed delta, without processes: an engine whose messages the test writes, a recorded transport."""

import inspect
import logging
from pathlib import Path
from types import SimpleNamespace

import h11
import pytest

from nibble.engine.client import AsyncEngine
from nibble.engine.messages import EngineStats, RequestOutput, StepOutputs
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.text.tokenizer import Tokenizer
from nibble.server import errors, protocol, sse
from nibble.server.generation import Generation
from nibble.server.openai.chat import ChatRequest
from nibble.server.openai.chat_answer import ChatAnswer
from nibble.server.openai.stream import StreamedAnswer
from nibble.server.serving import Serving

BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]}'


class Transport:
    """Keeps what is written, and who wrote it: the package's functions on the stack, outermost first."""

    def __init__(self) -> None:
        self.data, self.hands = b"", []

    def write(self, data: bytes) -> None:
        self.data += data
        modules = [(f.frame.f_globals["__name__"], f.function) for f in inspect.stack()[1:]]
        self.hands = [name for module, name in reversed(modules) if module.startswith("nibble.")]


@pytest.fixture
def streamed(tiny_llama: Path) -> SimpleNamespace:
    """One chat request under way: `news(token_ids, ...)` is a message from its engine."""
    engine = AsyncEngine(SimpleNamespace(), SimpleNamespace(write=lambda _: None), None)
    serving = Serving(("m",))
    tokenizer, nothing = Tokenizer.from_pretrained(tiny_llama), SimpleNamespace()
    serving.ready(engine, tokenizer, nothing, nothing)
    answer = ChatAnswer(ChatRequest.model_validate_json(BODY), tokenizer, 0, None)
    generation = Generation(serving, [[1, 2]], SamplingParams(), 1, b"", 0.0)
    answer.begin(generation.id)
    stream = sse.EventStream(StreamedAnswer(answer, generation), lambda _: None)
    transport = Transport()
    cycle = SimpleNamespace(
        scope={"http_version": "1.1", "method": "POST"},
        conn=SimpleNamespace(our_state=h11.SEND_BODY),
        flow=SimpleNamespace(write_paused=False),
        disconnected=False,
        transport=transport,
    )
    stream.write = protocol._direct_write(cycle)
    stream.source.start(stream.push)
    name = engine._names[f"{generation.id}-0"]

    def news(*token_ids: int, **fields: object) -> None:
        output = RequestOutput(name, list(token_ids), **fields)
        engine._deliver([StepOutputs([output], EngineStats())])

    return SimpleNamespace(
        news=news, transport=transport, stream=stream, answer=answer, engine=engine
    )


def test_a_delta_passes_four_hands(streamed: SimpleNamespace) -> None:
    streamed.news(ord("a"))
    assert b'"content":"a"' in streamed.transport.data
    assert streamed.transport.hands == ["_deliver", "on_output", "push", "write"]


@pytest.mark.parametrize(
    ("raised", "type_"),
    [(errors.engine_dead(), "server_error"), (ZeroDivisionError("secret"), "server_error")],
)
def test_what_goes_wrong_on_the_way_is_the_last_event(
    streamed: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    raised: Exception,
    type_: str,
) -> None:
    def event(delta: object) -> bytes:
        raise raised

    monkeypatch.setattr(streamed.answer, "event", event)
    streamed.news(ord("a"))
    last = b"".join(streamed.stream.pending)
    assert f'"type":"{type_}"'.encode() in last and last.endswith(sse.DONE)
    assert b"secret" not in last and not streamed.engine._sinks
    defects = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(defects) == (0 if isinstance(raised, errors.ApiError) else 1)


def test_news_after_the_end_is_dropped(streamed: SimpleNamespace) -> None:
    streamed.news(ord("a"), finish_reason="stop")
    streamed.news(ord("b"))
    end = b"".join(streamed.stream.pending)
    assert end.endswith(sse.DONE) and b'"content":"a"' in end and b'"content":"b"' not in end
