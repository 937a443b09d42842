"""POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's shapes: how a text or a conversation comes out in
tokens, and back, and what tokens there are."""

import asyncio
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import ConfigDict, Field

from ...engine.text.chat_template import Conversation
from ...engine.text.tokenizer import TooManyTokens
from .. import errors, limits
from ..serving import Serving
from .answer import json_response
from .chat import TemplateKwargs
from .fields import INTEGRALS, NOT_BOTH_ENDS, Schema, TokenId
from .images import images_of
from .messages import Messages, for_template
from .prompt import conversation_of, encode_chat, encode_texts
from .tools import Tools, plain_tools

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


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
    messages: Messages | None = None
    tools: Tools | None = None  # with messages
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
    tokens: Annotated[
        list[TokenId], Field(max_length=limits.MAX_TOKENIZE_TOKENS, fail_fast=True), INTEGRALS
    ]


async def tokenize(request: Request, serving: Serving) -> Response:
    serving.check_ready()
    body = await limits.parse_body(request, TokenizeRequest)
    if body.model is not None:
        serving.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise errors.bad_request("Give either 'prompt' or 'messages'.", "prompt")
    tokens = await _encode(request, body, serving)
    strings = await asyncio.to_thread(_strings, tokens, serving) if body.return_token_strs else None
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
    if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < vocab_size:
        raise errors.bad_request(f"Token ids must be between 0 and {vocab_size - 1}.", "tokens")
    text = await asyncio.to_thread(serving.tokenizer.decode, body.tokens, False)
    return json_response({"prompt": text})


def tokenizer_info(serving: Serving) -> Response:
    """What lm-eval's `tokenizer_backend=remote` asks for, in vLLM's shape."""
    tokenizer = serving.tokenizer
    return json_response(
        {
            **{role: tokenizer.special_tokens.get(role) for role in _ROLES},
            "additional_special_tokens": sorted(tokenizer.special_token_ids),
            "chat_template": tokenizer.chat_template or None,
            "model_max_length": serving.engine.ready.max_model_len,
            "vocab_size": tokenizer.vocab_size,
        }
    )


async def _encode(request: Request, body: TokenizeRequest, serving: Serving) -> list[int]:
    limit = max(serving.engine.ready.max_model_len, limits.MAX_TOKENIZE_TOKENS)
    try:
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            return (await encode_texts(serving, [body.prompt], special, limit))[0]
        plain = for_template(body.messages or [])
        images = await images_of(serving, body.messages or [])
        messages, tools = conversation_of(serving, plain, plain_tools(body.tools or []))
        conversation = Conversation(
            messages,
            tools,
            add_generation_prompt=body.generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            variables=dict(body.chat_template_kwargs or {}),
        )
        return await encode_chat(
            request, serving, conversation, limit, bool(body.add_special_tokens), images
        )
    except TooManyTokens as found:
        raise errors.bad_request(
            f"The text has {'at least ' * found.at_least}{found.count} tokens; /tokenize takes up to {limit}.",
            "prompt" if body.prompt is not None else "messages",
            "context_length_exceeded",
        ) from None


def _strings(tokens: list[int], serving: Serving) -> list[str]:
    return [serving.tokenizer.token_str(token_id) for token_id in tokens]
