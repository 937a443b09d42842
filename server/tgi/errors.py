"""Errors in TGI's shape: {"error": message, "error_type": what its clients raise}."""

import msgspec
from fastapi import Response

from ..errors import ApiError

_TYPES = {500: "generation", 503: "overloaded"}


def error_body(error: ApiError) -> bytes:
    kind = _TYPES.get(error.status, "validation")
    return msgspec.json.encode({"error": error.message, "error_type": kind})


def response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, media_type="application/json")
