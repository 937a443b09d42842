"""POST /v1/messages and /v1/messages/count_tokens."""

import time

from fastapi import Request, Response

from .. import errors, limits
from ..openai import chat
from ..openai.answer import json_response
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
        chat_body = body.chat()
        asked = await chat.prepare(request, chat_body, serving)
        answer = MessageAnswer(chat_body, body.model, asked.new_parser)
        return await chat.respond(request, serving, answer, asked, arrival)
    except errors.ApiError as error:
        return response(error)


async def count_tokens(request: Request, serving: Serving) -> Response:
    """How many tokens a message's prompt has."""
    try:
        serving.check_ready()
        body = await limits.parse_body(request, CountRequest)
        serving.check_model(body.model)
        chat_body = chat.chat_request(body.chat_fields())
        prompt, _ = await chat.prompt_of(request, chat_body, serving, chat_body.tool_use())
        return json_response({"input_tokens": len(prompt)})
    except errors.ApiError as error:
        return response(error)
