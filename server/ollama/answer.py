"""Deltas as Ollama writes them: one object, or a JSON line for each piece and a last one with counts and times.

{"model", "created_at", "message": {"role", "content", "thinking", "tool_calls"} | "response", "done": false}
"""

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import Response

from ...engine.text.parsers import Parsed, ToolCallDelta
from .. import errors
from ..generation import Delta
from ..openai.answer import AnswerBody, encode, json_response
from ..openai.parsed_answer import NewParser, ParsedAnswer
from .errors import error_body

Json = dict[str, Any]


class LinesAnswer(ParsedAnswer):
    """Of one sequence. Calls come whole, as Ollama has them: their arguments are objects."""

    media_type, ping = "application/x-ndjson", b"\n"

    def __init__(self, body: AnswerBody, model: str, new_parser: NewParser | None, chats: bool):
        """chats: it is a message, not a `response`."""
        super().__init__(body, model, new_parser)
        self.chats = chats
        self.arrival = time.time_ns()
        self.first: int | None = None  # time of the first text
        self.calls: dict[int, ToolCallDelta] = {}

    def begin(self, generation_id: str) -> None:
        """Ollama's answers bear no id."""

    def event(self, delta: Delta) -> bytes:
        self.first = self.first or time.time_ns()
        parsed = self._with_whole_calls(delta)
        says = parsed.content or parsed.reasoning or parsed.tool_calls
        lines = encode(self._object(parsed) | {"done": False}) + b"\n" if says else b""
        if delta.finish_reason is not None:
            lines += encode(self._object(Parsed()) | self._end(delta)) + b"\n"
        return lines

    def closing(self, usage: Json) -> bytes:
        return b""

    def failure(self, error: errors.ApiError) -> bytes:
        return error_body(error) + b"\n"

    def whole(self, deltas: list[Delta], usage: Json) -> Response:
        (delta,) = deltas
        return json_response(self._object(self._with_whole_calls(delta)) | self._end(delta))

    def _with_whole_calls(self, delta: Delta) -> Parsed:
        """What a delta says, with calls once all is known of them: at the end."""
        parsed = self.parsed(delta)
        for call in parsed.tool_calls:
            known = self.calls.setdefault(call.index, call)
            if known is not call:
                known.arguments += call.arguments
        parsed.tool_calls = list(self.calls.values()) if delta.finish_reason is not None else []
        return parsed

    def _object(self, parsed: Parsed) -> Json:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        answer: Json = {"model": self.model, "created_at": now}
        thinking = {"thinking": parsed.reasoning} if parsed.reasoning else {}
        if not self.chats:
            return answer | {"response": parsed.content} | thinking
        message: Json = {"role": "assistant", "content": parsed.content} | thinking
        if parsed.tool_calls:
            message["tool_calls"] = [_call(call) for call in parsed.tool_calls]
        return answer | {"message": message}

    def _end(self, delta: Delta) -> Json:
        sequence, now = delta.sequence, time.time_ns()
        first = self.first or now
        return {
            "done": True,
            "done_reason": "length" if delta.finish_reason == "length" else "stop",
            "total_duration": now - self.arrival,
            "load_duration": 0,
            "prompt_eval_count": len(sequence.prompt_token_ids),
            "prompt_eval_duration": first - self.arrival,
            "eval_count": sequence.num_tokens,
            "eval_duration": now - first,
        }


def _call(call: ToolCallDelta) -> Json:
    try:
        arguments = msgspec.json.decode(call.arguments or "{}")
    except msgspec.DecodeError:  # the answer broke off
        arguments = {"partial_json": call.arguments}
    return {"id": call.id, "function": {"name": call.name, "arguments": arguments}}
