"""ResponseStore: responses that clients may come back to, in memory.

Invariant: it never holds more than MAX_RESPONSES and MAX_BYTES; those that nobody has asked for the longest go first.
Whose key made a response may read it and go on from it, and nobody else: for others it is not there.
"""

from collections import OrderedDict
from typing import Any

import msgspec

Json = dict[str, Any]
MAX_RESPONSES = 1024
MAX_BYTES = 64 * 2**20


class Stored(msgspec.Struct):
    """`input`: its own input items; `before`: those of all responses that it went on from, with what they answered."""

    response: Json
    input: list[Json]
    before: list[Json]
    nbytes: int = 0

    def items(self) -> list[Json]:
        """What a response that goes on from this one has before its own input."""
        return [*self.before, *self.input, *self.response["output"]]


class ResponseStore:
    """Keys are (tenant, response id)."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES):
        self._kept: OrderedDict[tuple[bytes, str], Stored] = OrderedDict()
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._nbytes = 0

    def put(self, tenant: bytes, stored: Stored) -> None:
        """Keep a response, in place of an earlier one of the same id."""
        self.delete(tenant, stored.response["id"])
        stored.nbytes = len(msgspec.json.encode(stored))
        self._kept[tenant, stored.response["id"]] = stored
        self._nbytes += stored.nbytes
        while len(self._kept) > self._max_responses or self._nbytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= oldest.nbytes

    def get(self, tenant: bytes, response_id: str) -> Stored | None:
        found = self._kept.get((tenant, response_id))
        if found is not None:
            self._kept.move_to_end((tenant, response_id))
        return found

    def delete(self, tenant: bytes, response_id: str) -> bool:
        """Whether it was there."""
        gone = self._kept.pop((tenant, response_id), None)
        if gone is not None:
            self._nbytes -= gone.nbytes
        return gone is not None
