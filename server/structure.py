"""How much structure a JSON body has, told before anything is built of it.

Parsing and checking a body holds up every other request while it lasts. A string costs next to nothing, however long it
is; a value, a member or an object costs about a microsecond, and 10 MiB hold millions. So these are counted first, in
one pass over the bytes, and a body that has more than any request needs is refused unread.
"""

from collections.abc import Iterator, Mapping

from . import errors

MAX_COMMAS = 2**18  # token ids, most of all
MAX_MEMBERS = 24_576  # names in objects: MAX_MESSAGES with five each
MAX_OBJECTS = 8_448  # MAX_MESSAGES, each with a part
MAX_LISTS = 8_448
MAX_STRINGS = 2**16

_QUOTE, _BACKSLASH = b'"', 0x5C
_LIMITS = {b",": MAX_COMMAS, b":": MAX_MEMBERS, b"{": MAX_OBJECTS, b"[": MAX_LISTS}
_NAMES = {b",": "values", b":": "members", b"{": "objects", b"[": "lists", _QUOTE: "strings"}
_DROPPED = bytes(set(range(256)) - set(b"".join(_NAMES)))
_PIECE = 2**20  # bytes in a row: milliseconds, after which other threads may run


def check_structure(body: bytes) -> None:
    """Raise ApiError 400 for a JSON text with more values, members, objects, lists or strings than any request needs.
    Of what is no JSON the parser says so."""
    counts = dict.fromkeys(_NAMES, 0)
    in_string = False
    for piece in _pieces(body):
        # Each quote that is left begins or ends a string
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        kept = plain.translate(None, _DROPPED)
        quotes = kept.count(_QUOTE)
        counts[_QUOTE] += quotes
        _check(counts, _QUOTE, 2 * MAX_STRINGS)
        outside = b"".join(kept.split(_QUOTE)[in_string::2])
        in_string ^= quotes % 2 == 1
        for sign, limit in _LIMITS.items():
            counts[sign] += outside.count(sign)
            _check(counts, sign, limit)


def _pieces(body: bytes) -> Iterator[bytes]:
    """The body, not cut within an escape."""
    start = 0
    while start < len(body):
        end = start + _PIECE
        while end < len(body) and body[end - 1] == _BACKSLASH:
            end += 1
        yield body[start:end]
        start = end


def _check(counts: Mapping[bytes, int], sign: bytes, limit: int) -> None:
    if counts[sign] > limit:
        raise errors.bad_request(f"The request body has too many {_NAMES[sign]}.")
