"""POST /api/chat, /api/generate and /api/show, GET /api/tags, /api/ps and /api/version.

Ollama's names end in a tag: NAME:latest is NAME.
"""

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import Request, Response

from .. import errors, limits
from ..openai import chat, completions
from ..openai.answer import json_response
from ..openai.stream import run
from ..serving import Serving
from .answer import LinesAnswer
from .errors import response
from .schema import ChatBody, GenerateBody, ShowBody

Json = dict[str, Any]
API_VERSION = "0.12.6"  # of the Ollama whose API this is: clients look for one that is new enough
_STARTED = datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def create_chat(request: Request, serving: Serving) -> Response:
    """The next message of a conversation; without messages only that the model is there."""
    arrival = time.perf_counter()
    try:
        serving.check_ready()
        body = await limits.parse_body(request, ChatBody)
        body = body.model_copy(update={"model": _model(body.model, serving)})
        if not body.messages:
            return json_response(
                _nothing(body.model, {"message": {"role": "assistant", "content": ""}})
            )
        return await _chat(request, serving, body.chat(), arrival, True)
    except errors.ApiError as error:
        return response(error)


async def generate(request: Request, serving: Serving) -> Response:
    """What follows a prompt; without one only that the model is there."""
    arrival = time.perf_counter()
    try:
        serving.check_ready()
        body = await limits.parse_body(request, GenerateBody)
        body = body.model_copy(update={"model": _model(body.model, serving)})
        if not body.prompt:
            return json_response(_nothing(body.model, {"response": ""}))
        if not body.raw:
            return await _chat(request, serving, body.chat(), arrival, False)
        asked = body.completion()
        prompts, params = await completions.prepare(asked, serving, None)
        answer = LinesAnswer(asked, body.model, None, False)
        return await run(request, serving, answer, prompts, params, 1, None, arrival)
    except errors.ApiError as error:
        return response(error)


async def _chat(
    request: Request, serving: Serving, body: chat.ChatRequest, arrival: float, chats: bool
) -> Response:
    asked = await chat.prepare(request, body, serving)
    answer = LinesAnswer(body, body.model, asked.new_parser, chats)
    return await chat.respond(request, serving, answer, asked, arrival)


async def show(request: Request, serving: Serving) -> Response:
    """What a model is, and can."""
    try:
        serving.check_ready()
        body = await limits.parse_body(request, ShowBody)
        _model(body.model or body.name or "", serving)
    except errors.ApiError as error:
        return response(error)
    ready, template = serving.engine.ready, serving.tokenizer.chat_template
    capabilities = {"generate": "completion", "embed": "embedding"}
    can = [capabilities[task] for task in ready.tasks if task in capabilities]
    if "generate" in ready.tasks:
        can.append("tools")
    if serving.output.thinks:
        can.append("thinking")
    return json_response(
        {
            "modelfile": "",
            "parameters": "",
            "template": template,
            "details": _details(serving),
            "model_info": {
                "general.architecture": "nibble",
                "nibble.context_length": ready.max_model_len,
                "nibble.vocab_size": ready.vocab_size,
            },
            "capabilities": can,
            "modified_at": _STARTED,
        }
    )


def tags(serving: Serving) -> Response:
    """The model under each of its names."""
    serving.check_ready()
    return json_response({"models": [_entry(name, serving) for name in serving.model_names]})


def running(serving: Serving) -> Response:
    """The same: what is served is loaded."""
    serving.check_ready()
    loaded = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
    loaded["context_length"] = serving.engine.ready.max_model_len
    return json_response(
        {"models": [_entry(name, serving) | loaded for name in serving.model_names]}
    )


def version() -> Response:
    return json_response({"version": API_VERSION})


def _model(name: str, serving: Serving) -> str:
    """The name without its tag. ApiError 404 for a model that is not served."""
    plain = name if name in serving.model_names else name.removesuffix(":latest")
    serving.check_model(plain)
    return plain


def _entry(name: str, serving: Serving) -> Json:
    return {
        "name": name,
        "model": name,
        "modified_at": _STARTED,
        "size": serving.engine.ready.ledger.get("weights", 0),
        "digest": "",
        "details": _details(serving),
    }


def _details(serving: Serving) -> Json:
    return {
        "parent_model": "",
        "format": "nibble",
        "family": "nibble",
        "families": ["nibble"],
        "parameter_size": "",
        "quantization_level": serving.engine.ready.quantization,
    }


def _nothing(model: str, empty: Json) -> Json:
    return {"model": model, "created_at": _STARTED, **empty, "done": True, "done_reason": "load"}
