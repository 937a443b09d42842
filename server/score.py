"""POST /v1/score (and /score), as vLLM has it: one text with each of several, or two lists pair by pair."""

import time
import uuid
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import ConfigDict, Field, model_validator

from . import errors, limits
from .openai.answer import json_response
from .openai.fields import Ignored, Schema
from .pooled import TruncateTo, usage
from .scoring import scores
from .serving import Serving

_Texts = (
    str | Annotated[list[str], Field(min_length=1, max_length=limits.MAX_TEXTS, fail_fast=True)]
)
_NAMES = (("text_1", "text_2"), ("queries", "documents"))


def _only(names: tuple[str, str], others: tuple[str, str]) -> dict[str, Any]:
    """JSON schema: these two are given, and the other two are not."""
    given = {name: {"type": ["string", "array"]} for name in names}
    return {
        "properties": given | {name: {"type": "null"} for name in others},
        "required": list(names),
    }


class ScoreRequest(Schema):
    """`text_1` and `text_2`, or `queries` and `documents`."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [_only(_NAMES[0], _NAMES[1]), _only(_NAMES[1], _NAMES[0])]}
    )

    model: Annotated[str, Field(max_length=1024)]
    text_1: _Texts | None = None
    text_2: _Texts | None = None
    queries: _Texts | None = None
    documents: _Texts | None = None
    truncate_prompt_tokens: TruncateTo | None = None
    user: Ignored = None

    @model_validator(mode="after")
    def _one_form(self) -> "ScoreRequest":
        given = tuple(name for names in _NAMES for name in names if getattr(self, name) is not None)
        if given not in _NAMES:
            raise errors.bad_request(
                "Give either 'text_1' and 'text_2' or 'queries' and 'documents'.",
                given[0] if given else "text_1",
            )
        return self

    def sides(self) -> tuple[list[str], list[str], str]:
        """Both lists, and the name of the second."""
        names = _NAMES[self.text_1 is None]
        first, second = (_listed(getattr(self, name)) for name in names)
        return first, second, names[1]


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


async def create(request: Request, serving: Serving) -> Response:
    """Answer one request for scores."""
    arrival = time.perf_counter()
    serving.check_ready()
    body = await limits.parse_body(request, ScoreRequest)
    serving.check_model(body.model)
    first, second, param = body.sides()
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise errors.bad_request(
            f"{len(first)} texts cannot be paired with {len(second)}: give one, or as many", param
        )
    pairs = list(zip(first, second, strict=True))
    found, prompts = await scores(
        request, serving, pairs, body.truncate_prompt_tokens, param, arrival
    )
    return json_response(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [
                {"index": i, "object": "score", "score": score} for i, score in enumerate(found)
            ],
            "usage": usage(prompts),
        }
    )
