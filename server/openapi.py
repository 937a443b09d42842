"""GET /openapi.json: every path with all that it may answer.

The endpoints parse their own bodies and write their own answers, so FastAPI cannot know of either: request schemas are
those that the endpoints parse with, answers and errors are described here. `tests/server/test_openapi.py` holds them
against what the server does.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ..engine.request import MAX_INT
from . import metrics, rerank, score
from .auth import OPEN_PATHS
from .openai import chat, completions, embeddings, tokenize
from .openai.sampling import PROMPT_TEXT, TOKEN_ID
from .serving import Phase, Serving

JsonSchema = dict[str, Any]

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": chat.ChatRequest,
    "/v1/completions": completions.CompletionRequest,
    "/v1/embeddings": embeddings.EmbeddingRequest,
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), rerank.RerankRequest),
    **dict.fromkeys(("/score", "/v1/score"), score.ScoreRequest),
    "/tokenize": tokenize.TokenizeRequest,
    "/detokenize": tokenize.DetokenizeRequest,
}
_STREAMS = ("/v1/chat/completions", "/v1/completions")
_COMPUTED = tuple(path for path in _BODIES if "tokenize" not in path)  # by the engine
_ANSWERS = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/v1/embeddings": "Embeddings",
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), "Ranking"),
    **dict.fromkeys(("/score", "/v1/score"), "Scores"),
    "/v1/models": "ModelList",
    "/v1/models/{model}": "Model",
    "/tokenize": "Tokens",
    "/detokenize": "Text",
    "/version": "Version",
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
        _limit(schemas, serving.engine.ready.vocab_size, int(empty_text_is_none))
    else:
        _limit(schemas, MAX_INT + 1, 0)
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    components["headers"] = {
        "RequestId": {"schema": {"type": "string", "pattern": "^[\\w.:-]{1,128}$"}},
        "RetryAfter": {"description": "Seconds", "schema": {"type": "integer", "minimum": 0}},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] = _probe() if path in OPEN_PATHS else _responses(path)
            if path in _BODIES:
                content = {"application/json": {"schema": _ref(_BODIES[path].__name__)}}
                operation["requestBody"] = {"required": True, "content": content}
            if secured and path not in OPEN_PATHS:
                operation["security"] = [{"bearer": []}]
    return document


def _responses(path: str) -> JsonSchema:
    if path == "/metrics":
        answer: JsonSchema = {metrics.CONTENT_TYPE: {"schema": {"type": "string"}}}
    else:
        answer = {"application/json": {"schema": _ref(_ANSWERS[path])}}
    if path in _STREAMS:
        answer["text/event-stream"] = {"schema": _EVENT}
    statuses = [*_OF_ALL, *(_OF_BODIES if path in _BODIES else ())]
    if path == "/v1/models/{model}":
        statuses.append(404)
    if path in _COMPUTED:
        statuses.append(500)
    return {"200": _response("The answer", answer)} | {
        str(status): _response(
            _ERRORS[status], {"application/json": {"schema": _ref("Error")}}, status == 503
        )
        for status in sorted(statuses)
    }


def _probe() -> JsonSchema:
    content = {"application/json": {"schema": _ref("Status")}}
    either = {"application/json": {"schema": _ref("Error")}}
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
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
    return schemas | _answers()


def _limit(schema: Any, vocab_size: int, min_chars: int) -> None:
    """Where a schema has a token id, say how large it may be; where a prompt, how short."""
    if isinstance(schema, list):
        for item in schema:
            _limit(item, vocab_size, min_chars)
    elif isinstance(schema, dict):
        if schema.pop(PROMPT_TEXT, False):
            schema["minLength"] = min_chars
        if schema.pop(TOKEN_ID, False):
            name = "pattern" in schema  # of an object's property: an id in decimal
            schema |= {"pattern": _up_to(vocab_size - 1)} if name else {"maximum": vocab_size - 1}
        for item in schema.values():
            _limit(item, vocab_size, min_chars)


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


_TEXT: JsonSchema = {"type": "string"}
_NUMBER: JsonSchema = {"type": "number"}
_COUNT: JsonSchema = {"type": "integer", "minimum": 0}
_NULL: JsonSchema = {"type": "null"}


def _answers() -> JsonSchema:
    return (
        _generated()
        | _pooled()
        | {
            "Error": _object(
                error=_object(
                    message=_TEXT | {"minLength": 1},
                    type={"enum": ["invalid_request_error", "server_error"]},
                    param=_or_null(_TEXT),
                    code=_or_null(_TEXT),
                )
            ),
            "Status": _object(status={"enum": [phase.value for phase in Phase]}),
            "Version": _object(version=_TEXT),
            "Model": _object(
                id=_TEXT,
                object={"const": "model"},
                created=_COUNT,
                owned_by={"const": "nibble"},
                root=_TEXT,
                parent=_NULL,
                max_model_len=_COUNT,
                quantization=_TEXT,
            ),
            "ModelList": _object(object={"const": "list"}, data=_list(_ref("Model"))),
            "Tokens": _object(
                count=_COUNT,
                max_model_len=_COUNT,
                tokens=_list(_COUNT),
                token_strs=_or_null(_list(_TEXT)),
            ),
            "Text": _object(prompt=_TEXT),
        }
    )


def _generated() -> JsonSchema:
    """What the two generating endpoints answer when they do not stream."""
    token = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_COUNT)}
    message = _object(role={"const": "assistant"}, content=_TEXT, refusal=_NULL)
    chat_logprobs = _object(
        content=_list(_object(**token, top_logprobs=_list(_object(**token)))), refusal=_NULL
    )
    logprobs = _object(
        text_offset=_list(_COUNT),
        token_logprobs=_list(_or_null(_NUMBER)),
        tokens=_list(_TEXT),
        top_logprobs=_list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
    )
    return {
        "Usage": _object(
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=_object(cached_tokens=_COUNT),
        ),
        "ChatCompletion": _completion(
            "chatcmpl-", "chat.completion", chat_logprobs, message=message
        ),
        "Completion": _completion("cmpl-", "text_completion", logprobs, text=_TEXT),
    }


def _pooled() -> JsonSchema:
    """What is answered of texts that nothing is generated of."""
    embedding = {"anyOf": [_list(_NUMBER), _TEXT]}
    ranked = {"index": _COUNT, "relevance_score": _NUMBER}
    documented = _object(**ranked, document=_object(text=_TEXT))
    one = _object(object={"const": "embedding"}, index=_COUNT, embedding=embedding)
    score = _object(index=_COUNT, object={"const": "score"}, score=_NUMBER)
    every = {"model": _TEXT, "usage": _object(prompt_tokens=_COUNT, total_tokens=_COUNT)}
    return {
        "Embeddings": _object(object={"const": "list"}, data=_list(one), **every),
        "Ranking": _object(
            id=_TEXT, results=_list({"anyOf": [_object(**ranked), documented]}), **every
        ),
        "Scores": _object(
            id=_TEXT, object={"const": "list"}, created=_COUNT, data=_list(score), **every
        ),
    }


def _completion(prefix: str, kind: str, logprobs: JsonSchema, **content: JsonSchema) -> JsonSchema:
    choice = _object(
        index=_COUNT,
        **content,
        logprobs=_or_null(logprobs),
        finish_reason={"enum": ["stop", "length"]},
    )
    return _object(
        id=_TEXT | {"pattern": f"^{prefix}"},
        object={"const": kind},
        model=_TEXT,
        created=_COUNT,
        choices=_list(choice),
        usage=_ref("Usage"),
    )


def _object(**properties: JsonSchema) -> JsonSchema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


def _or_null(schema: JsonSchema) -> JsonSchema:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> JsonSchema:
    return {"$ref": f"#/components/schemas/{name}"}
