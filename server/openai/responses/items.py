"""The output items of one answer, as they grow, and the events that tell of it.

    reasoning       { added, content_part.added, reasoning_text.delta..., .done, content_part.done, item.done }
    message         { added, content_part.added, output_text.delta..., .done, content_part.done, item.done }
    function_call   { added, function_call_arguments.delta..., .done, item.done }

One item is open at a time: it is done when something of another kind comes.
"""

from collections.abc import Iterator
from typing import Any

from ....engine.text.parsers import Parsed

Json = dict[str, Any]
Event = tuple[str, Json]  # its type, without `response.`, and its fields
_TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class OutputItems:
    """`items` is the output so far; what is open in it is in progress."""

    def __init__(self, answer_id: str):
        self.items: list[Json] = []
        self._answer_id = answer_id
        self._open: tuple[str, int] | None = None  # kind, and of calls which

    def take(self, parsed: Parsed, logprobs: list[Json]) -> Iterator[Event]:
        """Take in what is new, with the log-probabilities of its content."""
        if parsed.reasoning:
            yield from self._text("reasoning", parsed.reasoning, [])
        if parsed.content:
            yield from self._text("message", parsed.content, logprobs)
        for call in parsed.tool_calls:
            if self._open != ("function_call", call.index):
                fields = {"call_id": call.id, "name": call.name, "arguments": ""}
                yield from self._begin("function_call", call.index, fields)
            if call.arguments:
                self.items[-1]["arguments"] += call.arguments
                yield "function_call_arguments.delta", self._at() | {"delta": call.arguments}

    def end(self, status: str) -> Iterator[Event]:
        """The open item is done: `completed`, or `incomplete`."""
        if self._open is None:
            return
        item, (kind, _) = self.items[-1], self._open
        item["status"] = status
        at = self._at()
        if kind == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", at | told
        else:
            part = item["content"][0]
            done = {"text": part["text"]}
            if kind == "message":
                done["logprobs"] = part["logprobs"]
            yield f"{_TEXTS[kind]}.done", at | {"content_index": 0} | done
            yield "content_part.done", at | {"content_index": 0, "part": part}
        yield "output_item.done", {"output_index": at["output_index"], "item": item}
        self._open = None

    def _text(self, kind: str, text: str, logprobs: list[Json]) -> Iterator[Event]:
        if self._open != (kind, 0):
            yield from self._begin(kind, 0, self._empty(kind))
            part = self.items[-1]["content"][0]
            yield "content_part.added", self._at() | {"content_index": 0, "part": part}
        part = self.items[-1]["content"][0]
        part["text"] += text
        delta: Json = {"content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"] += logprobs
            delta["logprobs"] = logprobs
        yield f"{_TEXTS[kind]}.delta", self._at() | delta

    def _begin(self, kind: str, index: int, fields: Json) -> Iterator[Event]:
        yield from self.end("completed")
        item_id = f"{_PREFIXES[kind]}{self._answer_id}{len(self.items)}"
        item = {"id": item_id, "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._open = kind, index
        shown = {**item, "content": []} if kind in _TEXTS else item
        yield "output_item.added", {"output_index": len(self.items) - 1, "item": shown}

    def _empty(self, kind: str) -> Json:
        if kind == "reasoning":
            return {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {"role": "assistant", "content": [part]}

    def _at(self) -> Json:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
