"""POST /v1/messages and /v1/messages/count_tokens."""

import time

from fastapi import Request, Response
from pydantic import ValidationError

from .. import errors, limits
from ..openai import chat
from ..openai.answer import json_response
from ..openai.stream import run
from ..serving import Serving
from .answer import MessageAnswer
from .errors import response
from .schema import CountRequest, MessagesRequest


async def create(request: Request, serving: Serving) -> Response:
    """Answer one message request."""
    arrival = time.perf_counter()
    try:
        serving.check_ready()
        body = await limits.parse_body(request, MessagesRequest)
        serving.check_model(body.model)
        asked_for = _chat(body)
        asked = await chat.prepare(request, asked_for, serving)
        answer = MessageAnswer(asked_for, body.model, asked.new_parser)
        return await run(
            request,
            serving,
            answer,
            [asked.prompt],
            asked.params,
            1,
            None,
            arrival,
            asked.kept_ids,
            asked.images,
        )
    except errors.ApiError as error:
        return response(error)


async def count_tokens(request: Request, serving: Serving) -> Response:
    """How many tokens a message's prompt has."""
    try:
        serving.check_ready()
        body = await limits.parse_body(request, CountRequest)
        serving.check_model(body.model)
        fields = chat.ChatRequest.model_validate(body.chat_fields())
        prompt, _ = await chat.prompt_of(request, fields, serving, fields.tool_use())
        return json_response({"input_tokens": len(prompt)})
    except errors.ApiError as error:
        return response(error)
    except ValidationError as error:
        return response(errors.from_validation(error))


def _chat(body: MessagesRequest) -> chat.ChatRequest:
    try:
        return body.chat()
    except ValidationError as error:
        raise errors.from_validation(error) from None
