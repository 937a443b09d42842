"""POST /v1/chat/completions: schema, prompt, answer.

Not streamed, the answer is one `chat.completion`. Streamed, it is `chat.completion.chunk`s: the role for each choice,
its text, reasoning and calls as they come, an empty delta with the finish_reason; then the usage if asked for, then
[DONE].
"""

import time
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Request, Response
from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from ...engine.grammar.structured_outputs import StructuredOutputs
from ...engine.sampling_params import MAX_INT, SamplingParams
from ...engine.text.chat_template import Conversation
from ...engine.text.parsers import Tool
from ...engine.text.tokenizer import TooManyTokens
from .. import errors, limits
from ..serving import Serving
from .answer import Answer
from .chat_answer import ChatAnswer
from .fields import (
    INTEGRAL,
    NOT_BOTH_ENDS,
    Ignored,
    OnlyEmptyList,
    OnlyFalse,
    OnlyNone,
    excludes,
)
from .images import images_of
from .messages import Messages, for_template
from .parsed_answer import NewParser
from .prompt import conversation_of, encode_chat
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
from .structured import compiled
from .tools import ToolFields, ToolUse

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


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(SamplingFields, ToolFields):
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
    reasoning_effort: ReasoningEffort | None = None  # "none": the model is asked not to think
    # Not supported
    functions: OnlyEmptyList = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: OnlyNone = None
    prediction: OnlyNone = None
    # there is one
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: OnlyFalse = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None  # of use with store
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    web_search_options: OnlyNone = None
    verbosity: Literal["low", "medium", "high"] | None = None  # for models that are told of it

    @property
    def asked_tokens(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is told besides the messages."""
        effort = self.reasoning_effort
        told: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort == "none":
            told["enable_thinking"] = False
        return told | dict(self.chat_template_kwargs or {})

    @property
    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise errors.bad_request(
                    "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs"
                )
            return None
        return self.top_logprobs or 0


class Asked(msgspec.Struct):
    """What a chat request comes to: what the engine computes, and what its answer is read with."""

    prompt: list[int]
    images: list[bytes]  # files
    params: SamplingParams
    n: int
    new_parser: NewParser | None
    kept_ids: frozenset[int]  # control tokens that stay in the text, for the parser to see


async def create(request: Request, serving: Serving) -> Response:
    """Answer one chat request."""
    arrival = time.perf_counter()
    serving.check_ready()
    body = await limits.parse_body(request, ChatRequest)
    serving.check_model(body.model)
    asked = await prepare(request, body, serving)
    answer = ChatAnswer(body, serving.tokenizer, body.top_logprobs or 0, asked.new_parser)
    return await respond(request, serving, answer, asked, arrival, body.cache_salt)


async def respond(
    request: Request,
    serving: Serving,
    answer: Answer,
    asked: Asked,
    arrival: float,
    salt: str | None = None,
) -> Response:
    """Generate what was asked for, and answer in the form of `answer`."""
    return await run(
        request,
        serving,
        answer,
        [asked.prompt],
        asked.params,
        asked.n,
        salt,
        arrival,
        asked.kept_ids,
        asked.images,
    )


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """What a request of another API comes to. ApiError 400 names the field at fault, by its name here."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise errors.from_validation(error) from None


async def prepare(request: Request, body: ChatRequest, serving: Serving) -> Asked:
    """Everything before the first token. ApiError 400 for what cannot be served."""
    use = body.tool_use()
    prompt, images = await prompt_of(request, body, serving, use)
    output = serving.output
    form = output.format_of(bool(use.tools))
    tail = "" if form is None else output.tail(prompt)
    outputs = await _structured(body, serving, use, tail)
    limit = serving.engine.ready.max_model_len
    max_tokens = completion_room(limit, len(prompt), body.asked_tokens, None, "messages")
    params = body.sampling_params(
        serving.engine.ready.vocab_size, max_tokens, body.num_logprobs, outputs
    )
    params = await for_engine(params, serving)
    n = body.n or 1
    check_size(n, params.max_tokens)
    if n * sum(map(len, images)) > limits.MAX_BODY_BYTES:
        raise errors.bad_request(
            f"n times the bytes of the images may be up to {limits.MAX_BODY_BYTES}.", "n"
        )
    tools = [Tool.of(tool) for tool in use.tools]
    new_parser = None if form is None else lambda: form.parser(tools, tail)
    kept = frozenset() if form is None else output.kept_ids(form)
    return Asked(prompt, images, params, n, new_parser, kept)


async def _structured(
    body: ChatRequest, serving: Serving, use: ToolUse, tail: str
) -> StructuredOutputs | None:
    """What holds the answer to its form: to calls where they are required, else to what the request says of its
    text. A model that thinks, thinks first."""
    given = body.structured()
    output = serving.output
    if use.required:
        try:
            grammar = output.calls_grammar(use.tools, use.named, use.parallel, tail)
        except ValueError as error:
            raise errors.bad_request(f"Invalid value for 'tools': {error}", "tools") from None
        return await compiled(serving, StructuredOutputs(grammar=grammar), "tools")
    if given is None:
        return None
    outputs, param = given
    outputs = msgspec.structs.replace(outputs, before=output.reasoning_grammar(tail))
    return await compiled(serving, outputs, param)


async def prompt_of(
    request: Request, body: ChatRequest, serving: Serving, use: ToolUse
) -> tuple[list[int], list[bytes]]:
    """The tokens of the conversation, and the files of its images. ApiError 400 if there are no tokens, or too many."""
    serving.check_task("generate")
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
    plain = for_template(body.messages)
    images = await images_of(serving, body.messages)
    messages, tools = conversation_of(serving, plain, use.tools)
    conversation = Conversation(
        messages,
        tools,
        add_generation_prompt=generation,
        continue_final_message=continued,
        variables=body.template_variables,
    )
    try:
        longest = longest_prompt(limit, body.truncate_prompt_tokens)
        token_ids = await encode_chat(request, serving, conversation, longest, images=images)
    except TooManyTokens as found:
        raise errors.context_length_exceeded(
            limit, found.count, body.asked_tokens or 1, "messages", found.at_least
        ) from None
    if not token_ids:
        raise errors.bad_request("The messages come to no tokens at all.", "messages")
    if images.files and body.truncate_prompt_tokens is not None:
        raise errors.bad_request(
            "'truncate_prompt_tokens' cannot be had with images: one of them might be cut.",
            "truncate_prompt_tokens",
        )
    kept = shortened(token_ids, body.truncate_prompt_tokens, limit, body.asked_tokens or 1)
    return kept, images.files
