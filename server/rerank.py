"""POST /v1/rerank (and /rerank, /v2/rerank), as Cohere, Jina and vLLM have it: documents by how well they answer a
query, the best first."""

import time
import uuid
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field

from ..engine.sampling_params import MAX_INT
from . import limits
from .openai.answer import json_response
from .openai.fields import INTEGRAL, Ignored, Schema
from .pooled import TruncateTo, usage
from .scoring import scores
from .serving import Serving


class DocumentText(Schema):
    text: str


class RerankRequest(Schema):
    model: Annotated[str, Field(max_length=1024)]
    query: str
    documents: Annotated[
        list[str | DocumentText],
        Field(min_length=1, max_length=limits.MAX_TEXTS, fail_fast=True),
    ]
    # So many of the best; 0: all
    top_n: Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL] | None = None
    return_documents: bool | None = None  # default: true
    truncate_prompt_tokens: TruncateTo | None = None
    user: Ignored = None


async def create(request: Request, serving: Serving) -> Response:
    """Answer one request to rank documents."""
    arrival = time.perf_counter()
    serving.check_ready()
    body = await limits.parse_body(request, RerankRequest)
    serving.check_model(body.model)
    documents = [each if isinstance(each, str) else each.text for each in body.documents]
    pairs = [(body.query, document) for document in documents]
    found, prompts = await scores(
        request, serving, pairs, body.truncate_prompt_tokens, "documents", arrival
    )
    best = sorted(range(len(found)), key=lambda i: -found[i])[: body.top_n or None]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": found[i]} for i in best]
    if body.return_documents is not False:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    return json_response(
        {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model,
            "results": results,
            "usage": usage(prompts),
        }
    )
