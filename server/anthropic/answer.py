"""Deltas as Anthropic's messages: one `message`, or the events of one.

    message_start, { content_block_start, content_block_delta..., content_block_stop }..., message_delta, message_stop

A block is what belongs together: a run of thinking, a run of text, one call. A new one begins when the kind changes.
"""

from collections.abc import Sequence as Items
from typing import Any

import msgspec
from fastapi import Response

from ...engine.text.parsers import Parsed
from .. import errors
from ..generation import Delta, Sequence
from ..openai.answer import AnswerBody, encode, json_response
from ..openai.parsed_answer import NewParser, ParsedAnswer
from .errors import error_body

Json = dict[str, Any]
_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class Piece(msgspec.Struct, frozen=True):
    """A piece of a block: `key` tells blocks apart that follow one another, `start` is what a new one begins as."""

    key: str
    start: Json
    delta: Json


class MessageAnswer(ParsedAnswer):
    """Of one sequence."""

    id_prefix = "msg_"

    def __init__(self, body: AnswerBody, model: str, new_parser: NewParser | None):
        super().__init__(body, model, new_parser)
        self.key: str | None = None  # of the block that is open
        self.index = -1

    def begin(self, generation_id: str) -> None:
        self.id = self.id_prefix + generation_id

    def opening(self, sequences: Items[Sequence]) -> bytes:
        message = self._message([], None, None, usage(sequences[0]))
        return _event("message_start", message=message) + _event("ping")

    def event(self, delta: Delta) -> bytes:
        parsed = self.parsed(delta)
        events = b"".join(self._piece(piece) for piece in _pieces(parsed))
        if delta.finish_reason is None:
            return events
        reason, stopped_by = self._stop(delta)
        ended = {"stop_reason": reason, "stop_sequence": stopped_by}
        return (
            events
            + self._close()
            + _event("message_delta", delta=ended, usage=usage(delta.sequence))
        )

    def closing(self, _: Json) -> bytes:
        return _event("message_stop")

    def failure(self, error: errors.ApiError) -> bytes:
        return b"event: error\ndata: " + error_body(error) + b"\n\n"

    def whole(self, deltas: list[Delta], _: Json) -> Response:
        delta = deltas[0]
        blocks: list[Json] = []
        for piece in _pieces(self.parsed(delta)):
            if self.key != piece.key:
                self.key = piece.key
                blocks.append(dict(piece.start))
            _extend(blocks[-1], piece.delta)
        return json_response(self._message(blocks, *self._stop(delta), usage(delta.sequence)))

    def _message(
        self, content: list[Json], reason: str | None, stopped_by: str | None, counted: Json
    ) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stopped_by,
            "usage": counted,
        }

    def _stop(self, delta: Delta) -> tuple[str, str | None]:
        """stop_reason and stop_sequence."""
        stopped_by = delta.sequence.detokenizer.stop_reason
        if self.ends_in_calls(delta):
            return "tool_use", None
        if stopped_by is not None:
            return "stop_sequence", stopped_by
        return _STOP_REASONS[delta.finish_reason or "stop"], None

    def _piece(self, piece: Piece) -> bytes:
        events = b""
        if self.key != piece.key:
            events = self._close()
            self.key = piece.key
            self.index += 1
            events += _event("content_block_start", index=self.index, content_block=piece.start)
        return events + _event("content_block_delta", index=self.index, delta=piece.delta)

    def _close(self) -> bytes:
        if self.key is None:
            return b""
        events = b""
        if self.key == "thinking":
            signed = {"type": "signature_delta", "signature": ""}
            events = _event("content_block_delta", index=self.index, delta=signed)
        self.key = None
        return events + _event("content_block_stop", index=self.index)


def usage(sequence: Sequence) -> Json:
    """Anthropic's: input_tokens are those that were not found in the cache."""
    cached = sequence.num_cached_tokens
    return {
        "input_tokens": len(sequence.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": sequence.num_tokens,
    }


def _pieces(parsed: Parsed) -> list[Piece]:
    pieces = []
    if parsed.reasoning:
        start = {"type": "thinking", "thinking": "", "signature": ""}
        pieces.append(
            Piece("thinking", start, {"type": "thinking_delta", "thinking": parsed.reasoning})
        )
    if parsed.content:
        delta = {"type": "text_delta", "text": parsed.content}
        pieces.append(Piece("text", {"type": "text", "text": ""}, delta))
    for call in parsed.tool_calls:
        begun: Json = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        pieces.append(Piece(f"call {call.index}", begun, delta))
    return pieces


def _extend(block: Json, delta: Json) -> None:
    """A block that is not streamed has its one delta at once."""
    kind = delta["type"]
    if kind == "input_json_delta":
        try:
            block["input"] = msgspec.json.decode(delta["partial_json"] or "{}")
        except msgspec.DecodeError:  # the answer broke off
            block["input"] = {"partial_json": delta["partial_json"]}
    else:
        name = "thinking" if kind == "thinking_delta" else "text"
        block[name] += delta[name]


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode({"type": name, **fields}))
