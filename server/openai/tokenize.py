"""POST /tokenize and /detokenize, in vLLM's shapes: how a text or a conversation comes out in tokens, and back."""

import asyncio
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import ConfigDict, Field

from .. import errors, limits
from ..serving import Serving
from .answer import json_response
from .chat import Message, TemplateKwargs
from .sampling import INTEGRALS, NOT_BOTH_ENDS, Schema, TokenId


def _one_without_the_other(field: str, type: str, other: str) -> dict[str, Any]:
    return {
        "properties": {field: {"type": type}, other: {"type": "null"}},
        "required": [field],
    }


class TokenizeRequest(Schema):
    """`prompt` or `messages`."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [NOT_BOTH_ENDS],
            "anyOf": [
                _one_without_the_other("prompt", "string", "messages"),
                _one_without_the_other("messages", "array", "prompt"),
            ],
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)] | None
    ) = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for messages
    add_generation_prompt: bool | None = (
        None  # default: true, unless the final message is continued
    )
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @property
    def generation_prompt(self) -> bool:
        given = self.add_generation_prompt
        return not self.continue_final_message if given is None else given


class DetokenizeRequest(Schema):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20), INTEGRALS]


async def tokenize(request: Request, serving: Serving) -> Response:
    serving.check_ready()
    body = await limits.parse_body(request, TokenizeRequest)
    if body.model is not None:
        serving.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise errors.bad_request("Give either 'prompt' or 'messages'.", "prompt")
    tokens = await asyncio.to_thread(_encode, body, serving)
    strings = [serving.tokenizer.token_str(i) for i in tokens] if body.return_token_strs else None
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": serving.engine.ready.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }
    )


async def detokenize(request: Request, serving: Serving) -> Response:
    serving.check_ready()
    body = await limits.parse_body(request, DetokenizeRequest)
    if body.model is not None:
        serving.check_model(body.model)
    vocab_size = serving.engine.ready.vocab_size
    if not all(0 <= token_id < vocab_size for token_id in body.tokens):
        raise errors.bad_request(f"Token ids must be between 0 and {vocab_size - 1}.", "tokens")
    text = await asyncio.to_thread(serving.tokenizer.decode, body.tokens, False)
    return json_response({"prompt": text})


def _encode(body: TokenizeRequest, serving: Serving) -> list[int]:
    tokenizer = serving.tokenizer
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    limits.check_template_kwargs(body.chat_template_kwargs)
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    try:
        text = tokenizer.apply_chat_template(
            [message.for_template() for message in body.messages or ()],
            add_generation_prompt=body.generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            **kwargs,
        )
    except ValueError as error:
        raise errors.bad_request(str(error), "messages") from None
    return tokenizer.encode(text, bool(body.add_special_tokens))
