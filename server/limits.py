"""What one request may ask for. Applied before anything is tokenised; beyond it is a 400 (413: the body)."""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from . import errors
from .structure import check_structure

MAX_BODY_BYTES = 10 * 2**20  # held in memory while it is parsed
BODY_SECONDS = 60.0  # for the whole body to arrive
DISCARD_SECONDS = 1.0  # that the body of a refused request is still read
MAX_N = 128  # samples of one prompt
MAX_TEXTS = 2048  # of one request for embeddings, and documents of one for scores; as OpenAI
TEXTS_PER_SEQUENCE = (
    16  # that take a sequence's place in the queue: each is computed once, and holds nothing after
)
MAX_SEQUENCES = 1024  # prompts x n in one request
MAX_REQUEST_TOKENS = 2**18  # sequences x max_tokens in one request
MAX_STOP_STRINGS = 16  # each is searched in every delta
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 256
MAX_ALLOWED_TOKEN_IDS = 65536
MAX_BAD_WORDS = 1024
MAX_SEQUENCE_BREAKERS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_IMAGES = 32  # of one request
MAX_ENCODING = 32  # requests whose images wait to be encoded: seconds each, on a CPU
MAX_TOKENIZE_TOKENS = 2**17  # of /tokenize, or the context where that is longer, and of /detokenize
MAX_TEMPLATE_KWARG_CHARS = 4096
MAX_CACHE_SALT_CHARS = 128
MAX_REQUEST_ID_CHARS = 128
MAX_CHOICES = 4096
MAX_COMPILING = 64  # grammars that wait to be compiled: seconds each, at worst
MAX_TOOLS = 1024
MAX_TOOL_CALLS = 1024  # of one message
MAX_HEADER_BYTES = 65536  # h11: request line and headers together

# The variables a request may set in the chat template. An allowlist: any other name could be an argument of the
# renderer itself (`chat_template`, `tokenize`), which has been a way in elsewhere (CVE-2025-61620, CVE-2025-62426).
TEMPLATE_KWARGS = frozenset(
    {
        "enable_thinking",
        "thinking",
        "thinking_budget",
        "reasoning_effort",
        "preserve_thinking",
        "clear_thinking",
        "date_string",
        "current_date",
        "custom_instructions",
        "model_identity",
        "language",
        "lang",
    }
)

_LONG_BODY = 2**17  # bytes: what takes more than a millisecond is left to a thread

Model = TypeVar("Model", bound=BaseModel)
_JSON = re.compile(r"application/([\w.-]+\+)?json\s*(;|$)", re.IGNORECASE)


def check_template_kwargs(kwargs: Mapping[str, object] | None) -> None:
    """Raise ApiError 400 unless every key is in TEMPLATE_KWARGS. Values are scalars already, by the schema."""
    for name in kwargs or ():
        if name not in TEMPLATE_KWARGS:
            raise errors.bad_request(
                f"chat_template_kwargs: '{name[:64]}' is not one of {', '.join(sorted(TEMPLATE_KWARGS))}",
                "chat_template_kwargs",
            )


async def parse_body(request: Request, schema: type[Model]) -> Model:
    """The request's JSON body as `schema`. Raises ApiError 400, 413 or 415.

    The content type must be JSON, so that a web page cannot post here without the browser asking first. pydantic's
    parser refuses invalid UTF-8, lone surrogates and nesting deeper than 200.
    """
    if not _JSON.match(request.headers.get("content-type", "")):
        raise errors.ApiError(
            415, "Send a JSON body with the header `Content-Type: application/json`."
        )
    body = await read_body(request)
    if len(body) > _LONG_BODY:
        return await asyncio.to_thread(_parsed, body, schema)
    return _parsed(body, schema)


def _parsed(body: bytes, schema: type[Model]) -> Model:
    check_structure(body)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise errors.from_validation(error) from None


async def _discard(request: Request) -> None:
    """Read and drop a body that is refused, for a moment: a connection closed with bytes unread is reset, and a client
    that is still sending would lose the answer."""
    size = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > 2 * MAX_BODY_BYTES:
                    return


async def read_body(request: Request) -> bytes:
    """The whole body. Raises ApiError 413 once it is known to exceed MAX_BODY_BYTES, 408 if it is late."""
    too_long = errors.ApiError(
        413,
        f"The request body is larger than {MAX_BODY_BYTES} bytes.",
        code="request_too_large",
        headers={"connection": "close"},
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        await _discard(request)
        raise too_long
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise too_long
                chunks.append(chunk)
    except TimeoutError:
        raise errors.ApiError(
            408,
            f"The request body did not arrive within {BODY_SECONDS:g} seconds.",
            headers={"connection": "close"},
        ) from None
    return b"".join(chunks)
