"""From Deltas to an HTTP answer, the same for chat and completions: admission, one JSON object or an event stream.

Chunks are joined from bytes made once (the head: id, object, created, model) and what is new in each (the choice); the
text is the only thing that is encoded per token.
"""

import time
from collections.abc import Callable

import msgspec
from fastapi import Request, Response

from ...engine.request import SamplingParams
from .. import errors, sse
from ..generation import Delta, Generation, Sequence, usage
from ..serving import Serving, cache_salt
from .sampling import SamplingFields

encode = msgspec.json.Encoder().encode


class Answer:
    """How one kind of answer is written. Subclasses give `choice` and `event`."""

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
        fields = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
        }
        self.head = b"data: " + encode(fields)[:-1] + b',"choices":['

    def choice(self, whole: Delta, generation: Generation) -> dict:
        raise NotImplementedError

    def opening(self, generation: Generation) -> bytes:
        """The events before any text."""
        return b""

    def event(self, delta: Delta, generation: Generation) -> bytes:
        """The events of one delta; nothing where it holds nothing to tell yet."""
        raise NotImplementedError

    def closing(self, generation: Generation) -> bytes:
        """The events at the end: the usage, if it was asked for, without choices, and [DONE]."""
        if not self.body.include_usage:
            return sse.DONE
        return self.head + b'],"usage":' + encode(self.usage(generation)) + b"}\n\n" + sse.DONE

    def usage(self, generation: Generation) -> dict:
        return generation.usage()

    def chunk(self, choice: bytes, sequence: Sequence) -> bytes:
        """One event with one choice, an encoded JSON object."""
        if not self.body.continuous_usage:
            return self.head + choice + b"]" + self.tail
        so_far = usage(
            len(sequence.prompt_token_ids), sequence.num_tokens, sequence.num_cached_tokens
        )
        return self.head + choice + b'],"usage":' + encode(so_far) + b"}\n\n"

    def whole(self, deltas: list[Delta], generation: Generation) -> Response:
        choices = [self.choice(delta, generation) for delta in deltas]
        return json_response(
            {
                "id": self.id,
                "object": self.object,
                "created": self.created,
                "model": self.model,
                "choices": choices,
                "usage": self.usage(generation),
            }
        )


def json_response(body: object) -> Response:
    return Response(encode(body), media_type="application/json")


async def run(
    request: Request,
    serving: Serving,
    answer: Answer,
    prompts: list[list[int]],
    params: SamplingParams,
    n: int,
    salt: str | None,
    arrival: float,
) -> Response:
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
            return sse.EventStream(
                AnswerEvents(answer, generation), _release_later(serving, sequences)
            )
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


class AnswerEvents:
    """A Generation as the events of an Answer. An error becomes an event too, since the status 200 has been sent."""

    def __init__(self, answer: Answer, generation: Generation):
        self.answer, self.generation = answer, generation

    def start(self, push: sse.Push) -> None:
        self.push = push
        if opening := self.answer.opening(self.generation):
            push(opening, False)
        self.generation.start(self._take, self._fail)

    def close(self) -> None:
        self.generation.close()

    def _take(self, delta: Delta) -> None:
        data = self.answer.event(delta, self.generation)
        if self.generation.is_done:
            self.push(data + self.answer.closing(self.generation), True)
        elif data:
            self.push(data, False)

    def _fail(self, error: errors.ApiError) -> None:
        self.push(b"data: " + error.body() + b"\n\n" + sse.DONE, True)
