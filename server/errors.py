"""Every error a client can see, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

`code` is a string or null, never a number. What the official client does with each status: 400, 401, 404, 413, 415 are
final; 429 and 5xx are retried twice unless `x-should-retry: false` says that trying again cannot help.
"""

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

_MAX_QUOTED = 200  # characters of the client's own words that are repeated back


class ApiError(Exception):
    """An answer that is not 2xx. `param` names the request field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = (
            status,
            message,
            type,
            param,
            code,
        )
        self.headers = headers or {}

    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "Incorrect API key provided. Send the server's key as `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def model_not_found(model: str) -> ApiError:
    return ApiError(
        404,
        f"The model `{model[:_MAX_QUOTED]}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def context_length_exceeded(
    limit: int, prompt: int, completion: int, param: str, at_least: bool = False
) -> ApiError:
    """`completion` is the number of tokens asked for, at least one. at_least: the prompt has `prompt` or more."""
    return bad_request(
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{'at least ' * at_least}{prompt + completion} tokens "
        f"({prompt} in the {param}, {completion} in the completion). Please reduce the length of the {param} or "
        "completion.",
        param,
        "context_length_exceeded",
    )


def unavailable(message: str, retry_after: int) -> ApiError:
    """503: not now, perhaps in `retry_after` seconds."""
    return ApiError(503, message, type="server_error", headers={"retry-after": str(retry_after)})


def loading() -> ApiError:
    return unavailable("The model is still loading.", retry_after=2)


def internal(message: str = "The server had an error while processing your request.") -> ApiError:
    return ApiError(500, message, type="server_error", headers={"x-should-retry": "false"})


def engine_dead() -> ApiError:
    return ApiError(
        503,
        "The engine has stopped; the server is shutting down.",
        type="server_error",
        headers={"retry-after": "10"},
    )


def from_validation(error: ValidationError) -> ApiError:
    """The first problem pydantic found, as a 400 that names the field."""
    # Of a union's failed members the one that got furthest is the one that was meant: the one of the right type.
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(
        found, key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type"))
    )
    # Union members appear in pydantic's locations as type names; only field names and list positions are the client's.
    path = [part for part in first["loc"] if isinstance(part, int) or not _is_type_name(part)]
    param = ".".join(str(part)[:_MAX_QUOTED] for part in path)[:_MAX_QUOTED] or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"Unsupported request argument: {param}", param, "unsupported_parameter")
    if first["type"] == "missing":
        return bad_request(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    if first["type"] in ("json_invalid", "model_type", "model_attributes_type") and param is None:
        return bad_request(
            f"We could not parse the JSON body of your request: {_plain(first['msg'])}"
        )
    return bad_request(f"Invalid value for '{param}': {_plain(first['msg'])}", param)


_TYPE_NAMES = {"str", "int", "float", "bool", "constrained-str", "constrained-int"}


def _is_type_name(part: str) -> bool:
    return part in _TYPE_NAMES or part.startswith(("list[", "dict[", "function-", "[key]"))


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")


def install(app: FastAPI) -> None:
    """Give every error OpenAI's shape, FastAPI's own 404, 405 and 422 included. Defects: app.RequestIdMiddleware."""

    async def api_error(_: Request, exc: ApiError) -> Response:
        return exc.response()

    async def http_error(request: Request, exc: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_supported"}.get(exc.status_code)
        message = {
            404: f"Unknown request URL: {request.method} {request.scope['path'][:_MAX_QUOTED]}",
            405: f"Not allowed to {request.method} on {request.scope['path'][:_MAX_QUOTED]}",
        }
        error = ApiError(
            exc.status_code,
            message.get(exc.status_code, str(exc.detail)),
            code=code,
            headers=dict(exc.headers or {}),
        )
        return error.response()

    async def invalid(_: Request, exc: RequestValidationError) -> Response:
        return bad_request(str(exc.errors()[0].get("msg", "invalid request"))).response()

    app.add_exception_handler(ApiError, api_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
