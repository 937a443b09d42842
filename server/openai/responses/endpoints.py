"""POST /v1/responses, and GET, DELETE and POST .../cancel of one that was stored."""

import asyncio
import time
from typing import Any

from fastapi import Request, Response

from ... import errors, limits
from ...serving import Serving
from .. import chat
from ..answer import json_response
from ..stream import api_error, begun, collect
from .answer import ResponseAnswer
from .schema import ResponsesRequest
from .store import ResponseStore, Stored

Json = dict[str, Any]


class Responses:
    """The responses of one server."""

    def __init__(self, serving: Serving):
        self.serving = serving
        self.store = ResponseStore()
        self._running: dict[tuple[bytes, str], asyncio.Task[None]] = {}  # in the background

    async def create(self, request: Request) -> Response:
        """Answer one request, now or in the background."""
        arrival = time.perf_counter()
        serving = self.serving
        serving.check_ready()
        body = await limits.parse_body(request, ResponsesRequest)
        serving.check_model(body.model)
        tenant = _tenant(request)
        before = self._before(tenant, body.previous_response_id)
        chat_body = body.chat(before)
        asked = await chat.prepare(request, chat_body, serving)

        def on_end(response: Json) -> None:
            if body.is_stored:
                self.store.put(tenant, Stored(response, body.input_items(), before))

        answer = ResponseAnswer(body, chat_body, serving.tokenizer, asked.new_parser, on_end)
        if body.background:
            return self._in_background(request, asked, answer, arrival)
        return await chat.respond(request, serving, answer, asked, arrival)

    def retrieve(self, request: Request, response_id: str) -> Response:
        return json_response(self._found(request, response_id).response)

    def input_items(self, request: Request, response_id: str) -> Response:
        items = [
            {"id": f"item_{index}", **item}
            for index, item in enumerate(self._found(request, response_id).input)
        ]
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"], "has_more": False}
        return json_response({"object": "list", "data": items, **ends})

    def delete(self, request: Request, response_id: str) -> Response:
        tenant = _tenant(request)
        self._stop(tenant, response_id)
        if not self.store.delete(tenant, response_id):
            raise _not_found(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request, response_id: str) -> Response:
        """End one that runs in the background."""
        found = self._found(request, response_id)
        if not found.response["background"]:
            raise errors.bad_request(
                "Only a response that was created with 'background' can be cancelled; a stream ends "
                "with its connection.",
                "response_id",
            )
        if self._stop(_tenant(request), response_id):
            found.response["status"] = "cancelled"
        return json_response(found.response)

    def _before(self, tenant: bytes, previous: str | None) -> list[Json]:
        if previous is None:
            return []
        stored = self.store.get(tenant, previous)
        if stored is None:
            raise errors.ApiError(
                404,
                f"Previous response with id '{previous[:64]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return stored.items()

    def _in_background(
        self, request: Request, asked: chat.Asked, answer: ResponseAnswer, arrival: float
    ) -> Response:
        serving, tenant = self.serving, _tenant(request)
        serving.admit(1)
        generation = begun(
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
        response = answer.response("in_progress", None)
        answer.on_end(response)  # kept from its beginning on

        async def work() -> None:
            try:
                answer.finished((await collect(generation))[0])
            except Exception as error:
                answer.failure(api_error(error))
            finally:
                serving.release(1)
                self._running.pop((tenant, answer.id), None)

        self._running[tenant, answer.id] = asyncio.create_task(work())
        return json_response(response)

    def _stop(self, tenant: bytes, response_id: str) -> bool:
        """Whether it was running."""
        task = self._running.pop((tenant, response_id), None)
        return task is not None and task.cancel()

    def _found(self, request: Request, response_id: str) -> Stored:
        found = self.store.get(_tenant(request), response_id)
        if found is None:
            raise _not_found(response_id)
        return found


def _tenant(request: Request) -> bytes:
    tenant = request.scope.get("tenant")
    return tenant.digest if tenant else b""


def _not_found(response_id: str) -> errors.ApiError:
    return errors.ApiError(
        404,
        f"Response with id '{response_id[:64]}' not found.",
        param="response_id",
        code="not_found",
    )
