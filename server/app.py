"""The HTTP application: routes, and what wraps them.

    TrimMiddleware -> RequestIdMiddleware -> RoomMiddleware -> AuthMiddleware -> routes -> errors in OpenAI's shape

The routes take the raw request: each endpoint parses its own body (limits.parse_body), so no answer is ever FastAPI's.
"""

import logging
import re
import uuid

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..version import __version__
from . import errors, metrics, openapi, rerank, score, sse
from .anthropic import messages
from .auth import OPEN_PATHS, AuthMiddleware
from .keys import ApiKey
from .memory import TrimMiddleware
from .ollama import endpoints as ollama
from .openai import chat, completions, embeddings, models, tokenize
from .openai.answer import json_response
from .openai.responses.endpoints import Responses
from .protocol import PROBES_ONLY
from .serving import Phase, Serving
from .tgi import endpoints as tgi
from .ui.files import INDEX, Page

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class RequestIdMiddleware:
    """Around all that answers: puts `x-request-id` on the answer, the client's own if it is harmless to repeat, else a
    new one. Whatever goes wrong inside becomes a plain 500."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id)],
                }
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            tenant = scope.get("tenant")
            whose = f" of {tenant.name}" if tenant else ""
            log.exception("request %s%s failed", request_id.decode(), whose)
            if not started:  # the exception's text may hold what is not the client's to see
                await errors.internal().response()(scope, receive, send_with_id)


class RoomMiddleware:
    """Answers 503 to all but probes on a connection beyond the server's limit."""

    def __init__(self, app: ASGIApp, serving: Serving):
        self.app, self.serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if PROBES_ONLY in scope.get("extensions", {}) and scope["path"] not in OPEN_PATHS:
            self.serving.metrics.rejected("connections")
            full = errors.unavailable("The server has too many connections.", retry_after=1)
            full.headers["connection"] = "close"
            app = full.response()
        await app(scope, receive, send)


def create_app(
    serving: Serving,
    api_keys: tuple[ApiKey, ...] = (),
    ui: bool = True,
    allowed_origins: tuple[str, ...] = (),
) -> FastAPI:
    """The application for one Serving. With no keys, anybody may ask. allowed_origins: of web pages that may, too."""
    middleware = [
        Middleware(TrimMiddleware),
        Middleware(RequestIdMiddleware),
        Middleware(RoomMiddleware, serving=serving),
        *_cors(allowed_origins),
        Middleware(AuthMiddleware, api_keys=api_keys),
    ]
    app = FastAPI(
        title="Nibble",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        middleware=middleware,
        redirect_slashes=False,
    )
    errors.install(app)
    app.add_exception_handler(sse.ClientGone, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)  # before its body was whole
    _add_probes(app, serving)
    for add in (_add_generating, _add_responses, _add_tgi, _add_ollama, _add_pooled, _add_others):
        add(app, serving)
    _add_refused(app)
    if ui:
        _add_page(app)
    app.openapi = lambda: openapi.describe(app, serving, bool(api_keys))  # type: ignore[method-assign]
    return app


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    """Outside of authentication: a browser asks first, without a key, whether it may ask."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    ]


def _add_page(app: FastAPI) -> None:
    page = Page()

    @app.get("/", include_in_schema=False)
    @app.get("/ui", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _found(page.file(request, INDEX))

    @app.get("/ui/{name}", include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        return _found(page.file(request, name))


def _found(response: Response | None) -> Response:
    if response is None:
        raise HTTPException(404)
    return response


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _add_probes(app: FastAPI, serving: Serving) -> None:
    @app.get("/livez")
    async def livez() -> Response:
        """The process works; restart it if not."""
        return _probe(serving.alive, serving)

    @app.get("/readyz")
    async def readyz() -> Response:
        """Requests are accepted; send none if not."""
        return _probe(serving.is_ready, serving)

    @app.get("/health")
    async def health() -> Response:
        """The model is loaded and the engine alive."""
        return _probe(serving.alive and serving.is_loaded, serving)


def _probe(ok: bool, serving: Serving) -> Response:
    status = serving.phase.value if serving.alive else Phase.DEAD.value
    response = json_response({"status": status})
    if not ok:
        response.status_code = 503
        response.headers["retry-after"] = "2"
    return response


def _add_generating(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return await chat.create(request, serving)

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        return await completions.create(request, serving)

    @app.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        return await messages.create(request, serving)

    @app.post("/v1/messages/count_tokens")
    async def count_message_tokens(request: Request) -> Response:
        return await messages.count_tokens(request, serving)


def _add_responses(app: FastAPI, serving: Serving) -> None:
    responses = Responses(serving)

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        return await responses.create(request)

    @app.get("/v1/responses/{response_id}")
    async def retrieve_response(request: Request, response_id: str) -> Response:
        return responses.retrieve(request, response_id)

    @app.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(request: Request, response_id: str) -> Response:
        return responses.input_items(request, response_id)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        return responses.delete(request, response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        return await responses.cancel(request, response_id)


def _add_tgi(app: FastAPI, serving: Serving) -> None:
    @app.post("/")
    async def generate_as_asked(request: Request) -> Response:
        return await tgi.generate_as_asked(request, serving)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        return await tgi.generate(request, serving)

    @app.post("/generate_stream")
    async def generate_stream(request: Request) -> Response:
        return await tgi.generate_stream(request, serving)

    @app.post("/chat_tokenize")
    async def chat_tokenize(request: Request) -> Response:
        return await tgi.chat_tokenize(request, serving)

    @app.get("/info")
    async def info() -> Response:
        return tgi.info(serving)


def _add_ollama(app: FastAPI, serving: Serving) -> None:
    @app.post("/api/chat")
    async def chat_in_lines(request: Request) -> Response:
        return await ollama.create_chat(request, serving)

    @app.post("/api/generate")
    async def generate_in_lines(request: Request) -> Response:
        return await ollama.generate(request, serving)

    @app.post("/api/show")
    async def show_model(request: Request) -> Response:
        return await ollama.show(request, serving)

    @app.get("/api/tags")
    async def list_tags() -> Response:
        return ollama.tags(serving)

    @app.get("/api/ps")
    async def list_running() -> Response:
        return ollama.running(serving)

    @app.get("/api/version")
    async def api_version() -> Response:
        return ollama.version()


def _add_pooled(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/embeddings")
    async def create_embeddings(request: Request) -> Response:
        return await embeddings.create(request, serving)

    @app.post("/rerank")
    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    async def create_rerank(request: Request) -> Response:
        return await rerank.create(request, serving)

    @app.post("/score")
    @app.post("/v1/score")
    async def create_score(request: Request) -> Response:
        return await score.create(request, serving)


def _add_refused(app: FastAPI) -> None:
    """What clients know of OpenAI's and no model here has: said so, where an unknown path would say less."""

    @app.post("/v1/audio/{what:path}", include_in_schema=False)
    @app.post("/v1/images/{what:path}", include_in_schema=False)
    async def refused(what: str) -> Response:
        raise errors.ApiError(
            404,
            f"Nothing here hears, speaks or paints ({what[:64]}): the models that are served take text, some of them "
            "images, and answer in text.",
            code="unsupported_endpoint",
        )


def _add_others(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        return models.list_models(serving)

    @app.get("/v1/models/{model:path}/card")
    async def accuracy_card(model: str) -> Response:
        return models.card(model, serving)

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        return models.retrieve(model, serving)

    @app.post("/tokenize")
    async def create_tokens(request: Request) -> Response:
        return await tokenize.tokenize(request, serving)

    @app.post("/detokenize")
    async def create_text(request: Request) -> Response:
        return await tokenize.detokenize(request, serving)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return tokenize.tokenizer_info(serving)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(
            serving.metrics.exposition(), headers={"content-type": metrics.CONTENT_TYPE}
        )

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})
