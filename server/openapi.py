"""GET /openapi.json: every path with all that it may answer.

The endpoints parse their own bodies and write their own answers, so FastAPI cannot know of either: request schemas are
those that the endpoints parse with, answers and errors are described here. `tests/server/test_openapi.py` holds them
against what the server does.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ..engine.sampling_params import MAX_INT
from . import metrics, rerank, score
from .anthropic.schema import CountRequest, MessagesRequest
from .auth import OPEN_PATHS
from .ollama.schema import ChatBody, GenerateBody, ShowBody
from .openai import chat, completions, embeddings, tokenize
from .openai.fields import CONTENT_PART, PROMPT_TEXT, TOKEN_ID
from .openai.messages import TEXT_PART
from .openai.responses.schema import ResponsesRequest
from .openapi_answers import answers, ref
from .serving import Serving
from .tgi.schema import EitherRequest, GenerateRequest, StreamedRequest

JsonSchema = dict[str, Any]

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": chat.ChatRequest,
    "/v1/completions": completions.CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/embeddings": embeddings.EmbeddingRequest,
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), rerank.RerankRequest),
    **dict.fromkeys(("/score", "/v1/score"), score.ScoreRequest),
    "/": EitherRequest,
    "/generate": GenerateRequest,
    "/generate_stream": StreamedRequest,
    "/chat_tokenize": chat.ChatRequest,
    "/api/chat": ChatBody,
    "/api/generate": GenerateBody,
    "/api/show": ShowBody,
    "/tokenize": tokenize.TokenizeRequest,
    "/detokenize": tokenize.DetokenizeRequest,
}
_STREAMS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/",
    "/generate_stream",
)
_COMPUTED = tuple(path for path in _BODIES if "token" not in path)  # by the engine
_ANSWERS = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/v1/responses": "Response",
    "/v1/responses/{response_id}": "Response",
    "/v1/responses/{response_id}/input_items": "ItemList",
    "/v1/responses/{response_id}/cancel": "Response",
    "/v1/messages": "Message",
    "/v1/messages/count_tokens": "TokenCount",
    "/": "GenerationList",
    "/generate": "Generation",
    "/chat_tokenize": "ChatTokens",
    "/info": "Info",
    **dict.fromkeys(("/api/chat", "/api/generate"), "Line"),
    "/api/show": "ModelDetails",
    **dict.fromkeys(("/api/tags", "/api/ps"), "Tags"),
    "/api/version": "Version",
    "/v1/embeddings": "Embeddings",
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), "Ranking"),
    **dict.fromkeys(("/score", "/v1/score"), "Scores"),
    "/v1/models": "ModelList",
    "/v1/models/{model}": "Model",
    "/v1/models/{model}/card": "Card",
    "/tokenize": "Tokens",
    "/detokenize": "Text",
    "/tokenizer_info": "TokenizerInfo",
    "/version": "Version",
}
_BY_ID = (
    "/v1/models/{model}",
    "/v1/models/{model}/card",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/input_items",
    "/v1/responses/{response_id}/cancel",
)
_ERROR_FORMS = {  # of those paths whose errors are not OpenAI's
    **dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens"), "MessageError"),
    **dict.fromkeys(("/", "/generate", "/generate_stream", "/chat_tokenize"), "GenerationError"),
    **dict.fromkeys(("/api/chat", "/api/generate", "/api/show"), "LineError"),
}
_EVENT: JsonSchema = {  # each event of a stream
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "A chunk or an error as JSON; [DONE]"}
    },
    "required": ["data"],
}
_ERRORS = {
    400: "A field is unknown, missing, of the wrong type or out of range; or the request is no HTTP",
    401: "No API key, or a wrong one",
    404: "The model does not exist",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    500: "This request failed; others are unaffected",
    503: "Loading, shutting down, full, or the engine is gone",
}
_OF_ALL = (400, 401, 503)
_OF_BODIES = (404, 408, 413, 415)


def describe(app: FastAPI, serving: Serving, secured: bool) -> JsonSchema:
    """The OpenAPI document; with what depends on the model once it is loaded. `secured`: there are API keys."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    components["schemas"] = schemas = _schemas()
    if serving.is_loaded:
        empty_text_is_none = not serving.tokenizer.encode("", True)
        ready = serving.engine.ready
        sees = ready.vision is not None
        _limit(schemas, ready.vocab_size, int(empty_text_is_none), sees)
    else:
        _limit(schemas, MAX_INT + 1, 0, sees=True)
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    components["headers"] = {
        "RequestId": {"schema": {"type": "string", "pattern": "^[\\w.:-]{1,128}$"}},
        "RetryAfter": {"description": "Seconds", "schema": {"type": "integer", "minimum": 0}},
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _probe() if path in OPEN_PATHS else _responses(path, method)
            if path in _BODIES:
                content = {"application/json": {"schema": ref(_BODIES[path].__name__)}}
                operation["requestBody"] = {"required": True, "content": content}
            if secured and path not in OPEN_PATHS:
                operation["security"] = [{"bearer": []}]
    return document


def _responses(path: str, method: str) -> JsonSchema:
    if path == "/metrics":
        answer: JsonSchema = {metrics.CONTENT_TYPE: {"schema": {"type": "string"}}}
    elif path == "/generate_stream":
        answer = {}
    else:
        name = "Deleted" if method == "delete" else _ANSWERS[path]
        answer = {"application/json": {"schema": ref(name)}}
    if path in ("/api/chat", "/api/generate"):
        answer["application/x-ndjson"] = {"schema": ref("Line")}
    if path in _STREAMS:
        answer["text/event-stream"] = {"schema": _EVENT}
    statuses = [*_OF_ALL, *(_OF_BODIES if path in _BODIES else ())]
    if path in _BY_ID:
        statuses.append(404)
    error = _ERROR_FORMS.get(path, "Error")
    if path in _COMPUTED:
        statuses.append(500)
    return {"200": _response("The answer", answer)} | {
        str(status): _response(
            _ERRORS[status],
            {"application/json": {"schema": _either("Error", error)}},
            status == 503,
        )
        for status in sorted(statuses)
    }


def _either(name: str, other: str) -> JsonSchema:
    """Of two names, which may be one."""
    return ref(name) if name == other else {"anyOf": [ref(name), ref(other)]}


def _probe() -> JsonSchema:
    content = {"application/json": {"schema": ref("Status")}}
    either = {"application/json": {"schema": ref("Error")}}
    return {
        "200": _response("Yes", content),
        "400": _response("The request is no HTTP", either),
        "503": _response("No", content, True),
    }


def _response(description: str, content: JsonSchema, retry: bool = False) -> JsonSchema:
    headers = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
    if retry:
        headers["retry-after"] = {"$ref": "#/components/headers/RetryAfter"}
    return {"description": description, "headers": headers, "content": content}


def _schemas() -> JsonSchema:
    schemas: JsonSchema = {}
    for body in _BODIES.values():
        name = body.__name__
        # each API has a Message and a Tool of its own
        schema = body.model_json_schema(ref_template=f"#/components/schemas/{name}.{{model}}")
        schemas |= {f"{name}.{part}": of for part, of in schema.pop("$defs", {}).items()}
        schemas[name] = schema
    return schemas | answers()


def _limit(schema: Any, vocab_size: int, min_chars: int, sees: bool) -> None:
    """Where a schema has a token id, say how large it may be; where a prompt, how short; where a part of a message,
    whether it may be an image."""
    if isinstance(schema, list):
        for item in schema:
            _limit(item, vocab_size, min_chars, sees)
    elif isinstance(schema, dict):
        if schema.pop(CONTENT_PART, False) and not sees:
            schema["anyOf"] = [TEXT_PART]
        if schema.pop(PROMPT_TEXT, False):
            schema["minLength"] = min_chars
        if schema.pop(TOKEN_ID, False):
            name = "pattern" in schema  # of an object's property: an id in decimal
            schema |= {"pattern": _up_to(vocab_size - 1)} if name else {"maximum": vocab_size - 1}
        for item in schema.values():
            _limit(item, vocab_size, min_chars, sees)


def _up_to(number: int) -> str:
    """A pattern for the decimal numbers from 0 to `number`."""
    digits = str(number)
    shorter = [f"[1-9][0-9]{{{length - 1}}}" for length in range(1, len(digits))]
    smaller = [  # as many digits, of which the first that differs is smaller
        f"{digits[:i]}[{int(i == 0 and number > 9)}-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}"
        for i, digit in enumerate(digits)
        if int(digit) > int(i == 0 and number > 9)
    ]
    return f"^({'|'.join(dict.fromkeys(['0', *shorter, *smaller, digits]))})$"
