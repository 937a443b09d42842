"""POST /v1/completions: schema, prompts, answer.

A prompt is text or token ids, one or several; choice `i * n + j` is sample j of prompt i. With `echo`, a choice begins
with its prompt, and with `logprobs` too its prompt's log-probabilities: what lm-eval reads to score a continuation
(`max_tokens` 0 or 1). With `max_tokens` 0 one token is computed, since that is what computes the prompt, and dropped.
"""

import time
from typing import Annotated, Any

import msgspec
from fastapi import Request, Response
from pydantic import ConfigDict, Field, Tag, model_validator

from ...engine.grammar.structured_outputs import StructuredOutputs
from ...engine.messages import TokenLogprobs
from ...engine.request import FinishReason
from ...engine.sampling_params import SamplingParams
from ...engine.text.detokenizer import Detokenizer
from ...engine.text.fill_in import with_suffix
from ...engine.text.tokenizer import TooManyTokens
from .. import errors, limits
from ..generation import Delta, Sequence, usage
from ..serving import Serving
from .answer import FINGERPRINT, Answer, encode, json_response
from .fields import INTEGRAL, excludes
from .inputs import BY_KIND, SOME, Ids, Listed, Text, listed
from .logprobs import completion_logprobs, prompt_logprobs
from .prompt import encode_texts
from .sampling import (
    STREAM_OPTIONS_NEED_STREAM,
    SamplingFields,
    check_size,
    completion_room,
    for_engine,
    longest_prompt,
    shortened,
)
from .stream import run
from .structured import wanted

DEFAULT_MAX_TOKENS = 16  # OpenAI's


Prompt = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[Text], SOME, Tag("list[str]")]
    | Annotated[Ids, Tag("list[int]")]
    | Annotated[list[Ids], SOME, Tag("list[list[int]]")],
    BY_KIND,
]


# What best_of needs, as far as a schema can say it
_FREE_OF_RANKING: dict[str, Any] = {
    "properties": {
        "n": {"enum": [1, None]},
        "stream": {"enum": [False, None]},
        "max_tokens": {"anyOf": [{"type": "null"}, {"minimum": 1}]},
    }
}


class CompletionRequest(SamplingFields):
    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                STREAM_OPTIONS_NEED_STREAM,
                {"anyOf": [{"properties": {"best_of": {"type": "null"}}}, _FREE_OF_RANKING]},
                excludes(
                    "max_tokens", unless={"echo": True}, anyOf=[{"type": "null"}, {"minimum": 1}]
                ),
            ]
        }
    )

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS), INTEGRAL] | None = None
    add_special_tokens: bool | None = None  # vLLM: whether text prompts get the model's BOS
    # Of so many samples the n whose tokens are the most probable, on average; at least n, which a schema cannot say
    best_of: Annotated[int, Field(ge=1, le=limits.MAX_N), INTEGRAL] | None = None
    # What comes after the answer, where the model has tokens to say so with: a schema knows of no model
    suffix: Annotated[str, Field(json_schema_extra={"maxLength": 0})] | None = None

    @property
    def num_samples(self) -> int:
        """Of each prompt."""
        return self.best_of or self.n or 1

    @property
    def is_ranked(self) -> bool:
        return self.num_samples > (self.n or 1)

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.num_samples < (self.n or 1):
            raise errors.bad_request("'best_of' must be at least 'n'.", "best_of")
        if self.is_ranked and self.stream:
            raise errors.bad_request(
                "'best_of' greater than 'n' is not available when 'stream' is enabled.", "best_of"
            )
        if self.is_ranked and self.max_tokens == 0:
            raise errors.bad_request("'best_of' needs max_tokens of at least 1.", "best_of")
        return self

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise errors.bad_request("max_tokens must be at least 1, or 0 with echo", "max_tokens")
        return self


async def create(request: Request, serving: Serving) -> Response:
    """Answer one completion request."""
    arrival = time.perf_counter()
    serving.check_ready()
    body = await limits.parse_body(request, CompletionRequest)
    serving.check_model(body.model)
    prompts, params = await prepare(body, serving)
    answer = CompletionAnswer(body, serving, prompts)
    if body.max_tokens == 0 and params.prompt_logprobs is None:
        return answer.echo_alone()
    n, salt = body.num_samples, body.cache_salt
    return await run(request, serving, answer, prompts, params, n, salt, arrival)


async def prepare(
    body: CompletionRequest, serving: Serving, max_tokens: int | None = DEFAULT_MAX_TOKENS
) -> tuple[list[list[int]], SamplingParams]:
    """The prompts' tokens, and how to go on. max_tokens: where the request does not say; None: what there is room for.
    ApiError 400 for what cannot be served."""
    serving.check_task("generate")
    given = listed(body.prompt)
    check_size(len(given) * body.num_samples, 1, "prompt")
    prompts = await _token_ids(body, given, serving)
    room = _room(body, serving, max(map(len, prompts)), max_tokens)
    params = _params(body, serving, room, await wanted(body, serving))
    params = await for_engine(params, serving)
    check_size(len(prompts) * body.num_samples, params.max_tokens)
    return prompts, params


async def _token_ids(body: CompletionRequest, given: Listed, serving: Serving) -> list[list[int]]:
    ready = serving.engine.ready
    limit = ready.max_model_len
    prompts: list[list[int]]
    if isinstance(given[0], str):
        try:
            prompts = await encode_texts(
                serving,
                given,
                body.add_special_tokens is not False,
                longest_prompt(limit, body.truncate_prompt_tokens),
            )
        except TooManyTokens as found:
            raise errors.context_length_exceeded(
                limit, found.count, body.max_tokens or 1, "prompt", found.at_least
            ) from None
    else:
        prompts = given
    for token_ids in prompts:
        if not token_ids:
            raise errors.bad_request("'prompt' must have at least one token.", "prompt")
        if not 0 <= min(token_ids) <= max(token_ids) < ready.vocab_size:
            raise errors.bad_request(
                f"Token ids must be between 0 and {ready.vocab_size - 1}.", "prompt"
            )
    max_tokens = body.max_tokens or 1
    kept = [shortened(prompt, body.truncate_prompt_tokens, limit, max_tokens) for prompt in prompts]
    return _before_suffix(body, kept, serving)


def _before_suffix(
    body: CompletionRequest, prompts: list[list[int]], serving: Serving
) -> list[list[int]]:
    """Prompts that ask for the text between themselves and the suffix, where there is one."""
    if not body.suffix:
        return prompts
    if body.echo:
        raise errors.bad_request("'echo' and 'suffix' exclude each other.", "suffix")
    try:
        return with_suffix(serving.tokenizer, prompts, body.suffix)
    except ValueError as error:
        raise errors.bad_request(f"'suffix': {error}.", "suffix", "unsupported_parameter") from None


def _room(
    body: CompletionRequest, serving: Serving, prompt_tokens: int, default: int | None
) -> int:
    asked = body.max_tokens if body.max_tokens is None else max(1, body.max_tokens)
    limit = serving.engine.ready.max_model_len
    return completion_room(limit, prompt_tokens, asked, default, "prompt")


def _params(
    body: CompletionRequest,
    serving: Serving,
    max_tokens: int,
    structured_outputs: StructuredOutputs | None,
) -> SamplingParams:
    logprobs = 0 if body.is_ranked and body.logprobs is None else body.logprobs
    vocab_size = serving.engine.ready.vocab_size
    params = body.sampling_params(vocab_size, max_tokens, logprobs, structured_outputs)
    if body.echo and body.logprobs is not None:
        most = max(body.logprobs, body.prompt_logprobs or 0)
        params = msgspec.structs.replace(params, prompt_logprobs=most)
    return params


class _Echo:
    """A prompt as text, and where in it each token starts."""

    def __init__(self, serving: Serving, token_ids: list[int], skip_special_tokens: bool):
        params = SamplingParams(skip_special_tokens=skip_special_tokens, ignore_eos=True)
        detokenizer = Detokenizer(serving.tokenizer, params)
        self.text = detokenizer.push(token_ids) + detokenizer.finish()
        self.offsets = detokenizer.token_offsets


class CompletionAnswer(Answer):
    """Writes deltas as text completions."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, serving: Serving, prompts: list[list[int]]):
        super().__init__(body, body.model)
        self.asked, self.tokenizer = body, serving.tokenizer
        self.top_n = body.logprobs or 0
        self.n, self.num_samples = body.n or 1, body.num_samples
        self.num_prompt_tokens = sum(map(len, prompts))
        skip = body.skip_special_tokens is not False
        self.echoes = [_Echo(serving, prompt, skip) for prompt in prompts] if body.echo else []
        self.started: set[int] = set()  # sequences that have had their first event
        self.prompt_only = body.max_tokens == 0

    def choices(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        if self.num_samples > self.n:
            of_each = range(0, len(deltas), self.num_samples)
            groups = (deltas[i : i + self.num_samples] for i in of_each)
            deltas = [best for group in groups for best in most_probable(group, self.n)]
        return [self.choice(delta) | {"index": i} for i, delta in enumerate(deltas)]

    def choice(self, whole: Delta) -> dict[str, Any]:
        text, logprobs = self._content(whole, first=True)
        finish_reason = FinishReason.LENGTH if self.prompt_only else whole.finish_reason
        choice = {
            "index": whole.sequence.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if self.asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.tokenizer, whole.sequence.prompt_logprobs or [], self.asked.prompt_logprobs
            )
        return choice

    def usage(self, counted: dict[str, Any]) -> dict[str, Any]:
        return usage(self.num_prompt_tokens, 0, 0) if self.prompt_only else counted

    def event(self, delta: Delta) -> bytes:
        index = delta.sequence.index
        first = bool(self.echoes) and index not in self.started
        if not (delta.text or delta.logprobs or delta.finish_reason or first):
            return b""
        self.started.add(index)
        text, logprobs = self._content(delta, first)
        return self.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (
                index,
                encode(text),
                b"null" if logprobs is None else encode(logprobs),
                b"null" if delta.finish_reason is None else encode(delta.finish_reason),
            ),
            delta.sequence,
        )

    def echo_alone(self) -> Response:
        """max_tokens 0 without logprobs: nothing needs to be computed."""
        if self.body.stream:
            raise errors.bad_request("max_tokens 0 needs logprobs when streamed", "max_tokens")
        choices = [
            {
                "index": i * self.n + j,
                "text": echo.text,
                "logprobs": None,
                "finish_reason": FinishReason.LENGTH,
            }
            for i, echo in enumerate(self.echoes)
            for j in range(self.n)
        ]
        return json_response(
            {
                "id": f"{self.id_prefix}echo",
                "object": self.object,
                "created": self.created,
                "model": self.model,
                "system_fingerprint": FINGERPRINT,
                "choices": choices,
                "usage": usage(self.num_prompt_tokens, 0, 0),
            }
        )

    def _content(self, delta: Delta, first: bool) -> tuple[str, dict[str, list[Any]] | None]:
        """Text and logprobs of one delta, the prompt's before them if it is to be echoed and this is the first."""
        text, positions, offsets = delta.text, delta.logprobs, delta.offsets
        if self.prompt_only:
            text, positions, offsets = "", [], []
        if self.asked.logprobs is None:
            positions = None
        if not self.echoes:
            if positions is None:
                return text, None
            ids = [position.token_id for position in positions]
            return text, completion_logprobs(self.tokenizer, positions, ids, offsets, self.top_n)
        return self._echoed(text, positions, offsets, delta.sequence, first)

    def _echoed(
        self,
        text: str,
        positions: list[TokenLogprobs] | None,
        offsets: list[int],
        sequence: Sequence,
        first: bool,
    ) -> tuple[str, dict[str, list[Any]] | None]:
        echo = self.echoes[sequence.index // self.num_samples]
        shown: list[TokenLogprobs | None] = [*(positions or [])]
        ids = [position.token_id for position in positions or []]
        offsets = [len(echo.text) + offset for offset in offsets]
        if first:
            text = echo.text + text
            if self.asked.logprobs is not None and sequence.prompt_logprobs is not None:
                shown = [*sequence.prompt_logprobs, *shown]
                ids, offsets = sequence.prompt_token_ids + ids, echo.offsets + offsets
        if not shown:
            return text, None
        return text, completion_logprobs(self.tokenizer, shown, ids, offsets, self.top_n)


def most_probable(samples: list[Delta], n: int) -> list[Delta]:
    """Those of a prompt's samples whose tokens have the greatest log-probabilities, on average."""

    def mean(delta: Delta) -> float:
        positions = delta.logprobs or []
        return sum(position.logprob for position in positions) / max(1, len(positions))

    return sorted(samples, key=mean, reverse=True)[:n]
