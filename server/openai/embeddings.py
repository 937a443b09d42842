"""POST /v1/embeddings: schema, texts or token ids, answer.

Text gets the special tokens that the model was trained with and the prompt that its files put before texts, if they do;
token ids are taken as they are. An answer's vectors are in the order of the inputs.
"""

import base64
import time
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import Field, Tag

from ...engine.pooling import Pooling
from ...engine.sampling_params import MAX_INT
from .. import errors, limits
from ..pooled import Encoder, TruncateTo, check_size, floats, max_prompt, run, usage, with_prompts
from ..serving import Serving
from .answer import json_response
from .fields import INTEGRAL, Ignored, Schema
from .inputs import BY_KIND, Ids, Text, listed

_MANY = Field(min_length=1, max_length=limits.MAX_TEXTS, fail_fast=True)
Input = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[Text], _MANY, Tag("list[str]")]
    | Annotated[Ids, Tag("list[int]")]
    | Annotated[list[Ids], _MANY, Tag("list[list[int]]")],
    BY_KIND,
]


class EmbeddingRequest(Schema):
    model: Annotated[str, Field(max_length=1024)]
    input: Input
    dimensions: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: Ignored = None
    # vLLM's extras
    truncate_prompt_tokens: TruncateTo | None = None
    add_special_tokens: bool | None = None  # default: true
    # sentence-transformers' name of a prompt that the model's files have
    prompt_name: Annotated[str, Field(max_length=64)] | None = None


async def create(request: Request, serving: Serving) -> Response:
    """Answer one request for embeddings."""
    arrival = time.perf_counter()
    serving.check_ready()
    body = await limits.parse_body(request, EmbeddingRequest)
    serving.check_model(body.model)
    serving.check_task("embed")
    _check_dimensions(body, serving)
    prompts = await _token_ids(body, serving)
    check_size(prompts, "input")
    pooling = Pooling(dimensions=body.dimensions)
    vectors = await run(request, serving, prompts, [pooling] * len(prompts), arrival)
    as_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector).decode() if as_text else floats(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    return json_response(
        {"object": "list", "data": data, "model": body.model, "usage": usage(prompts)}
    )


def _check_dimensions(body: EmbeddingRequest, serving: Serving) -> None:
    info = serving.engine.ready.embedding
    if info is not None and body.dimensions is not None and body.dimensions > info.dimensions:
        raise errors.bad_request(
            f"dimensions must be at most {info.dimensions}, which this model has, got {body.dimensions}",
            "dimensions",
        )


async def _token_ids(body: EmbeddingRequest, serving: Serving) -> list[list[int]]:
    encoder = Encoder(serving, body.truncate_prompt_tokens, "input")
    given: Any = listed(body.input)
    if isinstance(given[0], str):
        texts = with_prompts(serving, given, body.prompt_name)
        return await encoder.texts(texts, body.add_special_tokens is not False)
    return _cut(given, body, serving)


def _cut(given: list[list[int]], body: EmbeddingRequest, serving: Serving) -> list[list[int]]:
    """Token ids, checked; of each the first so many, where that was asked for."""
    vocab_size, limit = serving.engine.ready.vocab_size, max_prompt(serving)
    if body.prompt_name is not None:
        raise errors.bad_request(
            "A prompt can be put before text, not before token ids.", "prompt_name"
        )
    to = body.truncate_prompt_tokens
    if to is not None:
        given = [token_ids[: limit if to < 0 else to] for token_ids in given]
    for index, token_ids in enumerate(given):
        if max(token_ids) >= vocab_size:
            raise errors.bad_request(f"Token ids must be between 0 and {vocab_size - 1}.", "input")
        if len(token_ids) > limit:
            raise errors.bad_request(
                f"This model takes up to {limit} tokens of a text; number {index} of 'input' has {len(token_ids)}.",
                "input",
                "context_length_exceeded",
            )
    return given
