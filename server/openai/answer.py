"""Deltas as OpenAI writes them, the same for chat and completions: one JSON object, or the bytes of events.

Chunks are joined from bytes made once (the head: id, object, created, model) and what is new in each (the choice); the
text is the only thing that is encoded per token. An answer knows nothing of where deltas come from or bytes go to.
"""

import time
from collections.abc import Sequence as Items
from typing import Any, Protocol

import msgspec
from fastapi import Response

from ...version import __version__
from .. import errors, sse
from ..generation import Delta, Sequence

encode = msgspec.json.Encoder().encode
FINGERPRINT = f"nibble-{__version__}"


class AnswerBody(Protocol):
    """What an answer needs to know of its request."""

    @property
    def stream(self) -> bool | None: ...

    @property
    def include_usage(self) -> bool: ...

    @property
    def continuous_usage(self) -> bool: ...

    @property
    def request_id(self) -> str | None: ...


class Answer:
    """How one kind of answer is written. Subclasses give `choice` and `event`."""

    id_prefix: str
    object: str
    chunk_object: str
    media_type = "text/event-stream"  # of a stream
    ping = sse.PING  # what a stream may say when there is nothing to say

    def __init__(self, body: AnswerBody, model: str):
        self.body, self.model = body, model
        self.created = int(time.time())
        self.tail = b',"usage":null}\n\n' if body.include_usage else b"}\n\n"
        self.head = b""

    def begin(self, generation_id: str) -> None:
        self.id = self.id_prefix + (self.body.request_id or generation_id)
        fields = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }
        self.head = b"data: " + encode(fields)[:-1] + b',"choices":['

    def choice(self, whole: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def choices(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        """Of an answer that is one object."""
        return [self.choice(delta) for delta in deltas]

    def opening(self, sequences: Items[Sequence]) -> bytes:
        """The events before any text."""
        return b""

    def event(self, delta: Delta) -> bytes:
        """The events of one delta; nothing where it holds nothing to tell yet."""
        raise NotImplementedError

    def closing(self, usage: dict[str, Any]) -> bytes:
        """The events at the end: the usage, if it was asked for, without choices, and [DONE]."""
        if not self.body.include_usage:
            return sse.DONE
        return self.head + b'],"usage":' + encode(self.usage(usage)) + b"}\n\n" + sse.DONE

    def failure(self, error: errors.ApiError) -> bytes:
        """The events that end a stream which cannot go on."""
        return b"data: " + error.body() + b"\n\n" + sse.DONE

    def usage(self, counted: dict[str, Any]) -> dict[str, Any]:
        """What is said of the usage, of which `counted` is what the engine did."""
        return counted

    def chunk(self, choice: bytes, sequence: Sequence) -> bytes:
        """One event with one choice, an encoded JSON object."""
        if not self.body.continuous_usage:
            return self.head + choice + b"]" + self.tail
        return self.head + choice + b'],"usage":' + encode(sequence.usage()) + b"}\n\n"

    def whole(self, deltas: list[Delta], usage: dict[str, Any]) -> Response:
        return json_response(self.object_of(deltas, usage))

    def object_of(self, deltas: list[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that is one object."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": self.choices(deltas),
            "usage": self.usage(usage),
        }


def json_response(body: object) -> Response:
    return Response(encode(body), media_type="application/json")
