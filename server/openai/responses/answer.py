"""Deltas as one response object, or as the events of one.

    response.created, response.in_progress, { events of items.py }..., response.completed | incomplete | failed

Every event has its sequence_number. A response that is stored can be gone on from as soon as its last event is written.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Any

from fastapi import Response

from ....engine.text.tokenizer import Tokenizer
from ... import errors
from ...generation import Delta, Sequence
from ..answer import encode, json_response
from ..chat import ChatRequest
from ..logprobs import chat_logprobs
from ..parsed_answer import NewParser, ParsedAnswer
from .items import Event, OutputItems
from .schema import ResponsesRequest

Json = dict[str, Any]


class ResponseAnswer(ParsedAnswer):
    """Of one sequence. `on_end` hears of the response when it is whole."""

    id_prefix = "resp_"

    def __init__(
        self,
        asked: ResponsesRequest,
        body: ChatRequest,
        tokenizer: Tokenizer,
        new_parser: NewParser | None,
        on_end: Callable[[Json], None],
    ):
        super().__init__(body, body.model, new_parser)
        self.asked, self.tokenizer, self.on_end = asked, tokenizer, on_end
        self.top_n = body.top_logprobs or 0
        self.sequence_number = 0
        self.completed_at: int | None = None

    def begin(self, generation_id: str) -> None:
        self.id = self.id_prefix + generation_id
        self.items = OutputItems(generation_id)

    def opening(self, sequences: Items[Sequence]) -> bytes:
        response = self.response("in_progress", None)
        return self._event("created", {"response": response}) + self._event(
            "in_progress", {"response": response}
        )

    def event(self, delta: Delta) -> bytes:
        events = b"".join(self._event(*event) for event in self._take(delta))
        if delta.finish_reason is None:
            return events
        response = self._end(delta)
        return events + self._event(response["status"], {"response": response})

    def closing(self, _: Json) -> bytes:
        return b""

    def failure(self, error: errors.ApiError) -> bytes:
        response = self.response("failed", None)
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        self.on_end(response)
        return self._event("failed", {"response": response})

    def whole(self, deltas: list[Delta], _: Json) -> Response:
        return json_response(self.finished(deltas[0]))

    def finished(self, whole: Delta) -> Json:
        """The response, of an answer that was not streamed."""
        for _ in self._take(whole):
            pass
        return self._end(whole)

    def response(self, status: str, counted: Json | None) -> Json:
        """The response object as it stands."""
        asked = self.asked
        reasoning = asked.reasoning
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": self.completed_at,
            "status": status,
            "background": bool(asked.background),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "model": self.model,
            "output": self.items.items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {
                "effort": reasoning and reasoning.effort,
                "summary": reasoning and reasoning.summary,
            },
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": asked.is_stored,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {
                "format": _format(asked),
                "verbosity": (asked.text and asked.text.verbosity) or "medium",
            },
            "tool_choice": _choice(asked),
            "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in asked.tools or ()],
            "top_logprobs": self.top_n,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": counted,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }

    def _take(self, delta: Delta) -> Iterator[Event]:
        logprobs = self._logprobs(delta)
        yield from self.items.take(self.parsed(delta), logprobs)
        if delta.finish_reason is not None:
            yield from self.items.end(
                "incomplete" if delta.finish_reason == "length" else "completed"
            )

    def _end(self, delta: Delta) -> Json:
        self.completed_at = int(time.time())
        status = "incomplete" if delta.finish_reason == "length" else "completed"
        response = self.response(status, _usage(delta.sequence))
        self.on_end(response)
        return response

    def _logprobs(self, delta: Delta) -> list[Json]:
        if not delta.logprobs:
            return []
        content: list[Json] = chat_logprobs(self.tokenizer, delta.logprobs, self.top_n)["content"]
        return content

    def _event(self, name: str, fields: Json) -> bytes:
        name = f"response.{name}"
        event = {"type": name, "sequence_number": self.sequence_number, **fields}
        self.sequence_number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(event))


def _usage(sequence: Sequence) -> Json:
    prompt, output = len(sequence.prompt_token_ids), sequence.num_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": sequence.num_cached_tokens},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }


def _format(asked: ResponsesRequest) -> Json:
    given = asked.text and asked.text.format
    return given.model_dump(by_alias=True, exclude_none=True) if given else {"type": "text"}


def _choice(asked: ResponsesRequest) -> Any:
    choice = asked.tool_choice
    if choice is None:
        return "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _tool(tool: Json) -> Json:
    """Clients' types want these fields, whether they were given or not."""
    return {"parameters": None, "strict": None, **tool}
