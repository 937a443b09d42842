"""Texts whose hidden states are asked for, not their continuation: what embeddings, rerank and score share.

    texts -> prompts before them -> token ids, in a thread -> engine.submit, one each -> embedding or score, in order

All of a request's texts are in the engine at once, which makes batches of whatever waits. A client that leaves takes
those of its texts back that are not computed yet.
"""

import asyncio
import time
import uuid
from array import array
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import Field

from ..engine.client import EngineDeadError
from ..engine.messages import RequestOutput
from ..engine.pooling import Pooling
from ..engine.request import FinishReason
from ..engine.sampling_params import MAX_INT, SamplingParams
from ..engine.text.batch_encoder import BatchEncoder, Encoded, TextTooLong
from . import errors, limits, sse
from .openai.fields import INTEGRAL
from .serving import Serving

Result = TypeVar("Result")
# vLLM's: the most tokens that are kept of a text; -1: as many as the model takes
TruncateTo = Annotated[
    int,
    Field(ge=-1, le=MAX_INT, json_schema_extra={"not": {"const": 0}}),
    INTEGRAL,
]


def max_prompt(serving: Serving) -> int:
    """Tokens that a text may have: a scheduler of decoders wants room for one more."""
    ready = serving.engine.ready
    return ready.max_model_len - bool(ready.num_blocks)


def with_prompts(serving: Serving, texts: Sequence[str], name: str | None) -> list[str]:
    """Texts as the model wants them: behind the prompt of that name, or its default one. ApiError 400 for a name that
    it does not have."""
    info = serving.engine.ready.embedding
    if info is None:
        return list(texts)
    name = info.default_prompt if name is None else name
    prompt = ""
    if name is not None:
        if name not in info.prompts:
            known = ", ".join(sorted(info.prompts)) or "none"
            raise errors.bad_request(
                f"The model has no prompt {name[:64]!r}; it has: {known}.", "prompt_name"
            )
        prompt = info.prompts[name]
    whole = [prompt + text for text in texts]
    return [text.lower() for text in whole] if info.lower_case else whole


def prompt_of(serving: Serving, *names: str) -> str | None:
    """The first of these prompts that the model has."""
    info = serving.engine.ready.embedding
    return next((n for n in names if info is not None and n in info.prompts), None)


class Encoder:
    """Texts of one request to token ids. Every ApiError 400 names `param`."""

    def __init__(self, serving: Serving, truncate_to: int | None, param: str):
        self.limit, self.param = max_prompt(serving), param
        if truncate_to is not None:
            if truncate_to == 0 or truncate_to > self.limit:
                raise errors.bad_request(
                    f"truncate_prompt_tokens must be between 1 and {self.limit}, or -1 for {self.limit}",
                    "truncate_prompt_tokens",
                )
            truncate_to = self.limit if truncate_to < 0 else truncate_to
        self.cuts = truncate_to is not None
        try:
            self._encoder = BatchEncoder(serving.tokenizer, self.limit, truncate_to)
        except ValueError as error:
            raise errors.bad_request(
                f"truncate_prompt_tokens {error}", "truncate_prompt_tokens"
            ) from None

    async def texts(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        work = asyncio.to_thread(self._encoder.texts, texts, add_special_tokens)
        return await self._checked(work)

    async def pairs(self, pairs: list[tuple[str, str]]) -> list[Encoded]:
        return await self._checked(asyncio.to_thread(self._encoder.pairs, pairs))

    async def _checked(self, work: Awaitable[Result]) -> Result:
        try:
            return await work
        except TextTooLong as error:
            raise errors.bad_request(
                f"This model takes up to {self.limit} tokens of a text; number {error.index} of '{self.param}' has "
                "more. Shorten it, or send truncate_prompt_tokens: -1 to have what is beyond them cut off.",
                self.param,
                "context_length_exceeded",
            ) from None
        except ValueError as error:
            raise errors.bad_request(str(error), self.param) from None


def check_size(prompts: Sequence[Sequence[int]], param: str) -> None:
    """Bound what one request may cost in all. What has no tokens has no hidden states either."""
    if not all(prompts):
        raise errors.bad_request(f"An empty text of '{param}' has no tokens in this model.", param)
    tokens = sum(map(len, prompts))
    if tokens > limits.MAX_REQUEST_TOKENS:
        raise errors.bad_request(
            f"A request may have {limits.MAX_REQUEST_TOKENS} tokens in all, this one has {tokens}; send fewer texts.",
            param,
        )


async def run(
    request: Request,
    serving: Serving,
    prompts: Sequence[list[int]],
    asked: Sequence[Pooling],
    arrival: float,
) -> list[bytes]:
    """What each prompt is, little-endian float32, in order. Raises ApiError; ClientGone once nobody waits."""
    sequences = min(-(-len(prompts) // limits.TEXTS_PER_SEQUENCE), serving.max_sequences)
    serving.admit(sequences)
    try:
        if tenant := request.scope.get("tenant"):
            serving.metrics.borne(tenant.name)
        work = _Work(serving, prompts, asked)
        found = await sse.until_disconnect(request.receive, work.done())
    except sse.ClientGone:
        serving.metrics.disconnects.inc()
        raise
    finally:
        serving.release(sequences)
    seconds = time.perf_counter() - arrival
    serving.metrics.prompt_tokens.inc(sum(map(len, prompts)))
    for prompt in prompts:
        serving.metrics.finished(FinishReason.STOP, len(prompt), 0, seconds)
    return found


class _Work:
    """The texts of one request in the engine."""

    def __init__(self, serving: Serving, prompts: Sequence[list[int]], asked: Sequence[Pooling]):
        self.serving, self.prompts, self.asked = serving, prompts, asked
        self.id = uuid.uuid4().hex
        self.found: list[bytes] = [b""] * len(prompts)
        self.open = set(range(len(prompts)))
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def done(self) -> list[bytes]:
        engine = self.serving.engine
        try:
            for index, (prompt, pooling) in enumerate(zip(self.prompts, self.asked, strict=True)):
                params = SamplingParams(max_tokens=1, pooling=pooling)
                engine.submit(f"{self.id}-{index}", prompt, params, partial(self._heard, index))
            await self.end
        except EngineDeadError:
            raise errors.engine_dead() from None
        finally:
            if not self.end.done():
                self.end.cancel()
            for index in self.open:
                engine.abort(f"{self.id}-{index}")
        return self.found

    def _heard(self, index: int, output: RequestOutput | None) -> None:
        """Called by the engine's client with the news of one text: its only one."""
        if self.end.done():  # an abort of our own has its echo here
            return
        if output is None:
            self.end.set_exception(errors.engine_dead())
            return
        self.open.discard(index)
        if output.finish_reason == FinishReason.ABORT:
            message = "The server is shutting down; this request was cut off."
            self.end.set_exception(errors.unavailable(message, retry_after=10))
        elif output.error:
            self.end.set_exception(errors.internal(output.error))
        else:
            self.found[index] = output.embedding
            if not self.open:
                self.end.set_result(None)


def floats(data: bytes) -> list[float]:
    return array("f", data).tolist()


def usage(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """OpenAI's, of requests that generate nothing."""
    tokens = sum(map(len, prompts))
    return {"prompt_tokens": tokens, "total_tokens": tokens}
