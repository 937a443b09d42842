"""POST /v1/chat/completions: schema, prompt, answer.

Not streamed, the answer is one `chat.completion`. Streamed, it is `chat.completion.chunk`s: the role for each choice,
its text as it comes, an empty delta with the finish_reason; then the usage if asked for, then [DONE].
"""

import time
from collections.abc import Sequence as Items
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

from ...engine.request import MAX_INT, SamplingParams
from ...engine.text.chat_template import Conversation
from ...engine.text.tokenizer import TooManyTokens
from .. import errors, limits
from ..generation import Delta, Sequence
from ..serving import Serving
from .answer import Answer, encode
from .logprobs import chat_logprobs
from .prompt import encode_chat
from .sampling import (
    INTEGRAL,
    NOT_BOTH_ENDS,
    STREAM_OPTIONS_NEED_STREAM,
    Ignored,
    OnlyEmptyList,
    OnlyFalse,
    OnlyNone,
    SamplingFields,
    Schema,
    check_size,
    completion_room,
    excludes,
)
from .stream import run


class TextPart(Schema):
    type: Annotated[str, Field(json_schema_extra={"const": "text"})]
    text: str | None = None
    # Named so that the refusal of a part we cannot read says what kind it was, not that this field is unknown.
    image_url: OnlyNone = None
    input_audio: OnlyNone = None
    video_url: OnlyNone = None
    file: OnlyNone = None
    refusal: OnlyNone = None

    @field_validator("type")
    @classmethod
    def _text_only(cls, type: str) -> str:
        if type != "text":
            raise ValueError(f"content part type '{type[:64]}' is not supported, only 'text' is")
        return type


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Ignored = None
    # What a client sends back when it repeats an answer of ours.
    refusal: OnlyNone = None
    audio: OnlyNone = None
    function_call: OnlyNone = None
    tool_calls: OnlyEmptyList = None
    annotations: OnlyEmptyList = None
    reasoning_content: OnlyNone = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text or "" for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, str]:
        """`developer` is OpenAI's newer name for what every template calls `system`."""
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        return message | ({"name": self.name} if self.name else {})


TemplateValue = (
    StrictBool
    | Annotated[StrictInt, Field(ge=-(2**63), lt=2**63), INTEGRAL]
    | Annotated[StrictStr, Field(max_length=limits.MAX_TEMPLATE_KWARG_CHARS)]
    | None
)
TemplateKwargs = Annotated[
    dict[str, TemplateValue],
    Field(json_schema_extra={"propertyNames": {"enum": sorted(limits.TEMPLATE_KWARGS)}}),
]


Messages = Annotated[
    list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)
]


class ChatRequest(SamplingFields):
    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                STREAM_OPTIONS_NEED_STREAM,
                NOT_BOTH_ENDS,
                excludes("top_logprobs", unless={"logprobs": True}, enum=[None, 0]),
            ]
        }
    )

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS), INTEGRAL] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    # Not supported
    tools: OnlyEmptyList = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools these are the same
    parallel_tool_calls: bool | None = None  # means nothing without tools
    functions: OnlyEmptyList = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: OnlyNone = None
    prediction: OnlyNone = None
    reasoning_effort: Literal["none"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: OnlyFalse = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = (
        None  # of use only with store
    )
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    web_search_options: OnlyNone = None
    verbosity: Literal["medium"] | None = None

    @property
    def asked_tokens(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise errors.bad_request(
                    "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs"
                )
            return None
        return self.top_logprobs or 0


async def create(request: Request, serving: Serving) -> Response:
    """Answer one chat request."""
    arrival = time.perf_counter()
    serving.check_ready()
    body = await limits.parse_body(request, ChatRequest)
    serving.check_model(body.model)
    serving.check_task("generate")
    prompt = await _prompt(request, body, serving)
    params = _params(body, serving, len(prompt))
    n = body.n or 1
    check_size(n, params.max_tokens)
    return await run(
        request, serving, ChatAnswer(body, serving), [prompt], params, n, body.cache_salt, arrival
    )


async def _prompt(request: Request, body: ChatRequest, serving: Serving) -> list[int]:
    limit = serving.engine.ready.max_model_len
    continued = bool(body.continue_final_message)
    if continued and body.add_generation_prompt:
        raise errors.bad_request(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.",
            "continue_final_message",
        )
    if continued and body.messages[-1].role != "assistant":
        raise errors.bad_request(
            "'continue_final_message' needs a last message of the assistant.", "messages"
        )
    generation = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    conversation = Conversation(
        [message.for_template() for message in body.messages],
        add_generation_prompt=generation,
        continue_final_message=continued,
        variables=dict(body.chat_template_kwargs or {}),
    )
    try:
        token_ids = await encode_chat(request, serving, conversation, limit)
    except TooManyTokens as found:
        raise errors.context_length_exceeded(
            limit, found.count, body.asked_tokens or 1, "messages", found.at_least
        ) from None
    if not token_ids:
        raise errors.bad_request("The messages come to no tokens at all.", "messages")
    return token_ids


def _params(body: ChatRequest, serving: Serving, prompt_tokens: int) -> SamplingParams:
    ready = serving.engine.ready
    asked = body.asked_tokens
    max_tokens = completion_room(ready.max_model_len, prompt_tokens, asked, None, "messages")
    return body.sampling_params(ready.vocab_size, max_tokens, body.num_logprobs)


class ChatAnswer(Answer):
    """Writes deltas as chat completions."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, serving: Serving):
        super().__init__(body, body.model)
        self.tokenizer = serving.tokenizer
        self.top_n = body.top_logprobs or 0

    def choice(self, whole: Delta) -> dict[str, Any]:
        return {
            "index": whole.sequence.index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
        }

    def opening(self, sequences: Items[Sequence]) -> bytes:
        return b"".join(
            self.chunk(
                b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
                b'"finish_reason":null}' % sequence.index,
                sequence,
            )
            for sequence in sequences
        )

    def event(self, delta: Delta) -> bytes:
        sequence, data = delta.sequence, b""
        if delta.text or delta.logprobs:
            logprobs = encode(self._logprobs(delta)) if delta.logprobs else b"null"
            data = self.chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}'
                % (sequence.index, encode(delta.text), logprobs),
                sequence,
            )
        if delta.finish_reason is not None:
            data += self.chunk(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}'
                % (sequence.index, encode(delta.finish_reason)),
                sequence,
            )
        return data

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return (
            None
            if delta.logprobs is None
            else chat_logprobs(self.tokenizer, delta.logprobs, self.top_n)
        )
