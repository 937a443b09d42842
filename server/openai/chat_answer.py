"""Deltas as chat completions: a message with content, reasoning and calls, or chunks with what is new of them."""

from collections.abc import Sequence as Items
from typing import Any

from fastapi import Response

from ...engine.text.parsers import Parsed, ToolCallDelta
from ...engine.text.tokenizer import Tokenizer
from ..generation import Delta, Sequence
from .answer import encode, json_response
from .logprobs import chat_logprobs, prompt_logprobs
from .parsed_answer import NewParser, ParsedAnswer
from .sampling import SamplingFields


class ChatAnswer(ParsedAnswer):
    """Writes deltas as chat completions."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, body: SamplingFields, tokenizer: Tokenizer, top_n: int, new_parser: NewParser | None
    ):
        super().__init__(body, body.model, new_parser)
        self.asked, self.tokenizer, self.top_n = body, tokenizer, top_n

    def choice(self, whole: Delta) -> dict[str, Any]:
        parsed = self.parsed(whole)
        # a message without text has none where it has calls, and else an empty one
        content = parsed.content or (None if parsed.tool_calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= _reasoning(parsed)
        if parsed.tool_calls:
            message["tool_calls"] = [_whole_call(call) for call in parsed.tool_calls]
        return {
            "index": whole.sequence.index,
            "message": message,
            "logprobs": self._logprobs(whole),
            "finish_reason": self.finish_reason(whole),
        }

    def whole(self, deltas: list[Delta], usage: dict[str, Any]) -> Response:
        answer = self.object_of(deltas, usage)
        top_n = self.asked.prompt_logprobs
        if top_n is not None:
            positions = deltas[0].sequence.prompt_logprobs or []
            answer["prompt_logprobs"] = prompt_logprobs(self.tokenizer, positions, top_n)
        return json_response(answer)

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
        news = self._news(delta)
        if news is not None or delta.logprobs:
            logprobs = encode(self._logprobs(delta)) if delta.logprobs else b"null"
            data = self.chunk(
                b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null}'
                % (sequence.index, news or b'{"content":""}', logprobs),
                sequence,
            )
        if delta.finish_reason is not None:
            data += self.chunk(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}'
                % (sequence.index, encode(self.finish_reason(delta))),
                sequence,
            )
        return data

    def finish_reason(self, delta: Delta) -> str | None:
        return "tool_calls" if self.ends_in_calls(delta) else delta.finish_reason

    def _news(self, delta: Delta) -> bytes | None:
        """The delta of a chunk, as JSON; None where there is nothing to tell."""
        if self.new_parser is None:
            return b'{"content":%b}' % encode(delta.text) if delta.text else None
        parsed = self.parsed(delta)
        news: dict[str, Any] = _reasoning(parsed)
        if parsed.content:
            news["content"] = parsed.content
        if parsed.tool_calls:
            news["tool_calls"] = [_call_delta(call) for call in parsed.tool_calls]
        return encode(news) if news else None

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return (
            None
            if delta.logprobs is None
            else chat_logprobs(self.tokenizer, delta.logprobs, self.top_n)
        )


def _reasoning(parsed: Parsed) -> dict[str, Any]:
    """Under both names that clients look for."""
    text = parsed.reasoning
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _whole_call(call: ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_whole_call(call)}
