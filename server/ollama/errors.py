"""Errors in Ollama's shape: {"error": message}."""

import msgspec
from fastapi import Response

from ..errors import ApiError


def error_body(error: ApiError) -> bytes:
    return msgspec.json.encode({"error": error.message})


def response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, media_type="application/json")
