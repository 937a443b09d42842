"""From Deltas to an HTTP answer, the same for chat and completions: admission, one JSON object or an event stream.

Chunks are joined from bytes made once (the head: id, object, created, model) and what is new in each (the choice); the
text is the only thing that is encoded per token.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
from fastapi import Request, Response

from ...engine.request import SamplingParams
from .. import errors, sse
from ..errors import ApiError
from ..generation import Delta, Generation, Sequence, usage
from ..serving import Serving, cache_salt
from .sampling import SamplingFields

log = logging.getLogger(__name__)


class Answer:
    """How one kind of answer is written. Subclasses give `choice` and `events`."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: SamplingFields, model: str):
        self.body, self.model = body, model
        self.created = int(time.time())
        self.tail = b',"usage":null}\n\n' if body.include_usage else b"}\n\n"
        self.head = b""

    def begin(self, generation: Generation) -> None:
        self.id = self.id_prefix + generation.id
        fields = {"id": self.id, "object": self.chunk_object, "created": self.created, "model": self.model}
        self.head = b"data: " + msgspec.json.encode(fields)[:-1] + b',"choices":['

    def choice(self, whole: Delta, generation: Generation) -> dict:
        raise NotImplementedError

    def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    def usage(self, generation: Generation) -> dict:
        return generation.usage()

    def chunk(self, choice: bytes, sequence: Sequence) -> bytes:
        """One event with one choice, an encoded JSON object."""
        if not self.body.continuous_usage:
            return self.head + choice + b"]" + self.tail
        so_far = usage(len(sequence.prompt_token_ids), sequence.num_tokens, sequence.num_cached_tokens)
        return self.head + choice + b'],"usage":' + msgspec.json.encode(so_far) + b"}\n\n"

    def usage_chunk(self, generation: Generation) -> bytes:
        """The event before [DONE], with no choices; nothing where the usage was not asked for."""
        if not self.body.include_usage:
            return b""
        return self.head + b'],"usage":' + msgspec.json.encode(self.usage(generation)) + b"}\n\n"

    def whole(self, deltas: list[Delta], generation: Generation) -> Response:
        choices = [self.choice(delta, generation) for delta in deltas]
        return json_response({"id": self.id, "object": self.object, "created": self.created, "model": self.model,
                              "choices": choices, "usage": self.usage(generation)})


def json_response(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


async def run(request: Request, serving: Serving, answer: Answer, prompts: list[list[int]], params: SamplingParams,
              n: int, salt: str | None, arrival: float) -> Response:
    """Admit the request's sequences, generate, answer. They are released when the answer ends, however it ends."""
    sequences = len(prompts) * n
    serving.admit(sequences)
    streamed = False
    try:
        own_salt = cache_salt(request.scope.get("tenant", b""), salt)
        generation = Generation(serving, prompts, params, n, own_salt, arrival)
        answer.begin(generation)
        if answer.body.stream:
            streamed = True
            return sse.EventStream(_guarded(answer.events(generation)), _release_later(serving, sequences))
        try:
            deltas = await sse.until_disconnect(request.receive, generation.collect())
        except sse.ClientGone:
            serving.metrics.disconnects.inc()
            raise
        return answer.whole(deltas, generation)
    finally:
        if not streamed:
            serving.release(sequences)


def _release_later(serving: Serving, sequences: int) -> Callable[[bool], None]:
    def on_close(disconnected: bool) -> None:
        serving.release(sequences)
        if disconnected:
            serving.metrics.disconnects.inc()

    return on_close


async def _guarded(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events; an exception becomes an error event and [DONE], since the status 200 has been sent."""
    try:
        async for data in events:
            yield data
    except ApiError as error:
        yield b"data: " + error.body() + b"\n\n" + sse.DONE
    except Exception:
        log.exception("a stream failed")
        yield b"data: " + errors.internal().body() + b"\n\n" + sse.DONE
    finally:
        await events.aclose()
