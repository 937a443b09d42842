"""POST /api/chat, /api/generate and /api/show: their bodies, and the requests that they come to.

    model, messages | prompt, system, format, think, options, stream    ->  ChatRequest, or with `raw` CompletionRequest

Options of the machine (num_ctx, num_thread, ...) are not a request's to choose here: they are taken and change nothing.
Defaults of temperature, top_k and top_p are Ollama's. Format: docs/api.md and docs/modelfile.mdx of Ollama.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ...engine.sampling_params import MAX_INT
from .. import errors, limits
from ..openai.answer import encode
from ..openai.chat import ChatRequest, chat_request
from ..openai.completions import CompletionRequest
from ..openai.fields import INTEGRAL, OnlyEmptyList, OnlyNone, Schema, StopString
from ..openai.tools import Tools

Json = dict[str, Any]
NotAsked = bool | int | float | Annotated[str, Field(max_length=1024)] | None
Think = bool | Literal["low", "medium", "high"]
Format = Literal["", "json"] | Json
_SAME = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop")
_PENALTIES = ("presence_penalty", "frequency_penalty")


class Options(Schema):
    num_predict: Annotated[int, Field(ge=-2, le=MAX_INT), INTEGRAL] | None = None  # < 0: no limit
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.8
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT), INTEGRAL] = 40
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    typical_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), INTEGRAL] | None = None
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=limits.MAX_STOP_STRINGS)] | None
    ) = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    # Of the machine, or of samplers that there are none of any more
    num_ctx: NotAsked = None
    num_keep: NotAsked = None
    num_batch: NotAsked = None
    num_gpu: NotAsked = None
    main_gpu: NotAsked = None
    num_thread: NotAsked = None
    use_mmap: NotAsked = None
    use_mlock: NotAsked = None
    low_vram: NotAsked = None
    numa: NotAsked = None
    repeat_last_n: NotAsked = None
    penalize_newline: NotAsked = None
    tfs_z: NotAsked = None
    mirostat: Annotated[int, Field(ge=0, le=0)] | None = None
    mirostat_tau: NotAsked = None
    mirostat_eta: NotAsked = None

    def fields(self) -> Json:
        """As the fields of our requests."""
        found = {name: getattr(self, name) for name in (*_SAME, *_PENALTIES)}
        found["repetition_penalty"] = self.repeat_penalty
        if self.num_predict is not None and self.num_predict >= 0:
            found["max_tokens"] = max(1, self.num_predict)
        return found


class CalledFunction(Schema):
    name: str
    arguments: Json = {}
    index: int | None = None


class ToolCall(Schema):
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class Message(Schema):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: OnlyEmptyList = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOL_CALLS)] | None = None
    tool_name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class Common(Schema):
    model: Annotated[str, Field(max_length=1024)]
    stream: bool = True
    options: Options | None = None
    keep_alive: NotAsked = None

    @property
    def asked(self) -> Options:
        return self.options or Options()


class AnswerForm(Common):
    format: Format | None = None
    think: Think | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

    def form_fields(self) -> Json:
        """What its text must be, and whether it thinks."""
        fields: Json = {}
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            fields["guided_json"] = self.format
        if isinstance(self.think, bool):
            fields["chat_template_kwargs"] = {"enable_thinking": self.think}
        elif self.think is not None:
            fields["reasoning_effort"] = self.think
        return fields


class ChatBody(AnswerForm):
    messages: Annotated[list[Message], Field(max_length=limits.MAX_MESSAGES)] = []
    tools: Tools | None = None

    def chat(self) -> ChatRequest:
        """The chat request that it comes to. ApiError 400 if that is none."""
        fields = self.asked.fields() | self.form_fields()
        fields |= {"model": self.model, "stream": self.stream, "messages": _messages(self.messages)}
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        return chat_request(fields | ({"tools": tools} if tools else {}))


class GenerateBody(AnswerForm):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = None  # the prompt as it is, without the model's template
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    images: OnlyEmptyList = None
    context: list[int] | None = (
        None  # tokens of an earlier answer: the prefix cache knows them by the text
    )

    def chat(self) -> ChatRequest:
        """ApiError 400 if it comes to no chat request."""
        messages = [{"role": "user", "content": self.prompt}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        fields = self.asked.fields() | self.form_fields()
        return chat_request(
            fields | {"model": self.model, "stream": self.stream, "messages": messages}
        )

    def completion(self) -> CompletionRequest:
        """ApiError 400 if it comes to no completion request."""
        fields = self.asked.fields() | self.form_fields()
        fields.pop("chat_template_kwargs", None)
        fields.pop("reasoning_effort", None)
        fields |= {"model": self.model, "stream": self.stream, "prompt": self.prompt}
        try:
            return CompletionRequest.model_validate(fields)
        except ValidationError as error:
            raise errors.from_validation(error) from None


class ShowBody(Schema):
    model: Annotated[str, Field(max_length=1024)] | None = None
    name: Annotated[str, Field(max_length=1024)] | None = None  # the field's older name
    verbose: NotAsked = None
    system: OnlyNone = None
    template: OnlyNone = None
    options: OnlyNone = None


def _messages(messages: list[Message]) -> list[Json]:
    """With ids for calls and results, which Ollama's need not have: a result is of the next call of its name."""
    found: list[Json] = []
    waiting: list[tuple[str, str]] = []  # name and id of calls without their result
    for number, message in enumerate(messages):
        plain: Json = {"role": message.role, "content": message.content}
        if message.thinking:
            plain["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [_call(call, f"call_{number}_{i}") for i, call in enumerate(message.tool_calls)]
            waiting += [(call["function"]["name"], call["id"]) for call in calls]
            plain["tool_calls"] = calls
        if message.role == "tool":
            plain["tool_call_id"] = message.tool_call_id or _answered(waiting, message.tool_name)
        found.append(plain)
    return found


def _call(call: ToolCall, made_up: str) -> Json:
    function = {"name": call.function.name, "arguments": encode(call.function.arguments).decode()}
    return {"id": call.id or made_up, "type": "function", "function": function}


def _answered(waiting: list[tuple[str, str]], name: str | None) -> str:
    for index, (called, call_id) in enumerate(waiting):
        if name is None or name == called:
            del waiting[index]
            return call_id
    return "call_unknown"
