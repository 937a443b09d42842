"""From the engine's news to an HTTP answer: admission, then one JSON object or an event stream.

A streamed delta passes four hands from the engine's message to the socket, each calling the next in one direction:

    1  engine/client.py  AsyncEngine._deliver       the message that was read -> the request's sink
    2  here              StreamedAnswer.on_output   the news -> Delta -> bytes
    3  server/sse.py     EventStream.push           bytes -> the connection, or what is pending for a slow reader
    4  server/protocol.py  write                    one chunk -> the transport

What the second asks on the way (`Generation.advance`: detokenizer, metrics; `Answer.event`: JSON) answers and returns.
"""

import asyncio
import logging
from collections.abc import Callable
from collections.abc import Sequence as Items

from fastapi import Request, Response

from ...engine.messages import RequestOutput
from ...engine.sampling_params import SamplingParams
from .. import errors, sse
from ..generation import Delta, Generation, Sequence
from ..serving import Serving, cache_salt
from .answer import Answer

log = logging.getLogger(__name__)


async def run(
    request: Request,
    serving: Serving,
    answer: Answer,
    prompts: list[list[int]],
    params: SamplingParams,
    n: int,
    salt: str | None,
    arrival: float,
    kept_ids: frozenset[int] = frozenset(),
    images: Items[bytes] = (),
) -> Response:
    """Admit the request's sequences, generate, answer. They are released when the answer ends, however it ends. images:
    files, of every prompt."""
    sequences = len(prompts) * n
    serving.admit(sequences)
    streamed = False
    try:
        generation = begun(
            request, serving, answer, prompts, params, n, salt, arrival, kept_ids, images
        )
        if answer.body.stream:
            streamed = True
            return sse.EventStream(
                StreamedAnswer(answer, generation),
                _release_later(serving, sequences),
                answer.media_type,
                answer.ping,
            )
        try:
            deltas = await sse.until_disconnect(request.receive, collect(generation))
        except sse.ClientGone:
            serving.metrics.disconnects.inc()
            raise
        return answer.whole(deltas, generation.usage())
    finally:
        if not streamed:
            serving.release(sequences)


def begun(
    request: Request,
    serving: Serving,
    answer: Answer,
    prompts: list[list[int]],
    params: SamplingParams,
    n: int,
    salt: str | None,
    arrival: float,
    kept_ids: frozenset[int],
    images: Items[bytes],
) -> Generation:
    """The generation of a request that was admitted, counted for whose key it bears, and its answer begun."""
    tenant = request.scope.get("tenant")
    if tenant:
        serving.metrics.borne(tenant.name)
    own_salt = cache_salt(tenant.digest if tenant else b"", salt)
    generation = Generation(serving, prompts, params, n, own_salt, arrival, kept_ids, images)
    answer.begin(generation.id)
    return generation


def _release_later(serving: Serving, sequences: int) -> Callable[[bool], None]:
    def on_close(disconnected: bool) -> None:
        serving.release(sequences)
        if disconnected:
            serving.metrics.disconnects.inc()

    return on_close


class StreamedAnswer:
    """A Generation as the events of an Answer: the source of an EventStream. If a sequence fails or the engine dies,
    that is one event and the end of all, since the status 200 has been sent."""

    def __init__(self, answer: Answer, generation: Generation):
        self.answer, self.generation = answer, generation

    def start(self, push: sse.Push) -> None:
        self.push = push
        if opening := self.answer.opening(self.generation.sequences):
            push(opening, False)
        try:
            self.generation.start(self.on_output)
        except errors.ApiError as error:
            self._fail(error)

    def close(self) -> None:
        self.generation.close()

    def on_output(self, sequence: Sequence, output: RequestOutput | None) -> None:
        """The engine's news of one sequence, written to the client."""
        generation = self.generation
        try:
            delta = generation.advance(sequence, output)
            if delta is None:
                return
            data = self.answer.event(delta)
            if generation.is_done:
                self.push(data + self.answer.closing(generation.usage()), True)
            elif data:
                self.push(data, False)
        except Exception as error:
            self._fail(api_error(error))

    def _fail(self, error: errors.ApiError) -> None:
        self.generation.close()
        self.push(self.answer.failure(error), True)


async def collect(generation: Generation) -> list[Delta]:
    """Every sequence whole, as one Delta each, in the order of their indices. Raises ApiError."""
    texts: list[list[str]] = [[] for _ in generation.sequences]
    whole = [Delta(sequence, "", None, [], None) for sequence in generation.sequences]
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_output(sequence: Sequence, output: RequestOutput | None) -> None:
        if end.done():
            return
        try:
            delta = generation.advance(sequence, output)
            if delta is None:
                return
            texts[sequence.index].append(delta.text)
            done = whole[sequence.index]
            if delta.logprobs:
                done.logprobs = (done.logprobs or []) + delta.logprobs
                done.offsets += delta.offsets
            done.finish_reason = delta.finish_reason
            if generation.is_done:
                end.set_result(None)
        except Exception as error:
            end.set_exception(api_error(error))

    try:
        generation.start(on_output)
        await end
    finally:
        generation.close()
    for done, pieces in zip(whole, texts, strict=True):
        done.text = "".join(pieces)
    return whole


def api_error(error: Exception) -> errors.ApiError:
    """What the client hears of it. A defect is logged; its text may hold what is not the client's to see."""
    if isinstance(error, errors.ApiError):
        return error
    log.error("a generation failed", exc_info=error)
    return errors.internal()
