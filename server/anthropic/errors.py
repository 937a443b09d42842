"""Errors in Anthropic's shape: {"type": "error", "error": {"type", "message"}}."""

import msgspec
from fastapi import Response

from ..errors import ApiError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    500: "api_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> bytes:
    kind = _TYPES.get(error.status, "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": error.message}})


def response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, media_type="application/json")
