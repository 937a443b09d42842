"""POST /generate, /generate_stream, / and /chat_tokenize, GET /info."""

import asyncio
import time
from typing import Any

from fastapi import Request, Response

from ...engine.sampling_params import SamplingParams
from ...engine.text.detokenizer import Detokenizer
from ...version import __version__
from .. import errors, limits
from ..openai import chat, completions
from ..openai.answer import json_response
from ..openai.stream import run
from ..serving import Serving
from .answer import GenerationAnswer
from .errors import response
from .schema import DEFAULT_MAX_NEW_TOKENS, EitherRequest, GenerateRequest, StreamedRequest


async def generate(request: Request, serving: Serving) -> Response:
    """One object."""
    return await _answered(request, serving, GenerateRequest, False)


async def generate_stream(request: Request, serving: Serving) -> Response:
    """An event for each token."""
    return await _answered(request, serving, StreamedRequest, True)


async def generate_as_asked(request: Request, serving: Serving) -> Response:
    """POST /: either, as the body's `stream` says; one object in a list."""
    return await _answered(request, serving, EitherRequest, None)


async def _answered(
    request: Request, serving: Serving, schema: type[GenerateRequest], streams: bool | None
) -> Response:
    """streams: None where the body says; what is not streamed then comes in a list."""
    arrival = time.perf_counter()
    try:
        serving.check_ready()
        asked = await limits.parse_body(request, schema)
        stream = bool(asked.stream) if streams is None else streams
        body = asked.completion(serving.model_names[0], stream)
        prompts, params = await completions.prepare(body, serving, DEFAULT_MAX_NEW_TOKENS)
        answer = GenerationAnswer(asked, body, serving.tokenizer, streams is None)
        return await run(request, serving, answer, prompts, params, body.num_samples, None, arrival)
    except errors.ApiError as error:
        return response(error)


async def chat_tokenize(request: Request, serving: Serving) -> Response:
    """The text that a conversation comes to, and its tokens, each with its place in it."""
    try:
        serving.check_ready()
        body = await limits.parse_body(request, chat.ChatRequest)
        serving.check_model(body.model)
        token_ids, _ = await chat.prompt_of(request, body, serving, body.tool_use())
        return json_response(await asyncio.to_thread(_tokenized, token_ids, serving))
    except errors.ApiError as error:
        return response(error)


def _tokenized(token_ids: list[int], serving: Serving) -> dict[str, Any]:
    detokenizer = Detokenizer(
        serving.tokenizer, SamplingParams(skip_special_tokens=False, ignore_eos=True)
    )
    text = detokenizer.push(token_ids) + detokenizer.finish()
    ends = [*detokenizer.token_offsets[1:], len(text)]
    tokens = [
        {"id": i, "text": text[start:stop], "start": start, "stop": stop}
        for i, start, stop in zip(token_ids, detokenizer.token_offsets, ends, strict=True)
    ]
    return {"tokenize_response": tokens, "templated_text": text}


def info(serving: Serving) -> Response:
    """What is served, and its limits."""
    serving.check_ready()
    ready = serving.engine.ready
    return json_response(
        {
            "model_id": serving.model_names[0],
            "model_sha": None,
            "model_dtype": ready.dtype,
            "model_device_type": ready.device.partition(":")[0],
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": serving.max_sequences,
            "max_best_of": limits.MAX_N,
            "max_stop_sequences": limits.MAX_STOP_STRINGS,
            "max_input_tokens": ready.max_model_len - 1,
            "max_total_tokens": ready.max_model_len,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "nibble",
            "version": __version__,
            "quantization": ready.quantization,
        }
    )
