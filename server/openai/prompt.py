"""Texts and conversations to token ids, for every endpoint that takes them. The event loop waits for neither.

    conversation -> template process -> text -> a thread, which lets others run -> token ids

Where it has images, their placeholders go into the text, and the tokens of each run into the token ids.

A text that is too long is refused as soon as its beginning has too many tokens.
"""

import asyncio
from typing import Any

from fastapi import Request

from ...engine.text.chat_template import Conversation
from ...engine.text.renderer import RendererBusyError, RendererClosedError
from ...engine.text.tokenizer import TooManyTokens
from .. import errors, limits, sse
from ..serving import Serving
from .images import NO_IMAGES, Images

_SHORT = 1024  # characters, which take less time than the way to a thread and back


async def encode_texts(
    serving: Serving, texts: list[str], add_special_tokens: bool, max_tokens: int
) -> list[list[int]]:
    """The tokens of each text. TooManyTokens if one has more than max_tokens."""

    def encode() -> list[list[int]]:
        encode_one = serving.tokenizer.encode
        return [encode_one(text, add_special_tokens, max_tokens=max_tokens) for text in texts]

    try:
        return await asyncio.to_thread(encode)
    except TooManyTokens:
        raise
    except ValueError as error:
        raise errors.bad_request(str(error), "prompt") from None


def conversation_of(
    serving: Serving, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as the model's template takes them. ApiError 400 where it cannot."""
    try:
        return serving.output.conversation(messages, tools)
    except ValueError as error:
        raise errors.bad_request(str(error), "messages") from None


async def encode_chat(
    request: Request,
    serving: Serving,
    conversation: Conversation,
    max_tokens: int,
    add_special_tokens: bool = False,
    images: Images = NO_IMAGES,
) -> list[int]:
    """The tokens of a conversation with these images. TooManyTokens if there are more than max_tokens; a client that
    leaves gives up its turn."""
    limits.check_template_kwargs(conversation.variables)
    idle = serving.renderer.is_idle
    encoding = _encode(serving, conversation, max_tokens, add_special_tokens, images)
    try:
        return await (encoding if idle else sse.until_disconnect(request.receive, encoding))
    except sse.ClientGone:
        serving.metrics.disconnects.inc()
        raise
    except RendererBusyError:
        serving.metrics.rejected("queue_full")
        raise errors.unavailable(
            "The server's queue is full. Please try again.", retry_after=1
        ) from None
    except RendererClosedError:
        raise errors.unavailable("The server is shutting down.", retry_after=10) from None
    except TooManyTokens:
        raise
    except ValueError as error:
        raise errors.bad_request(str(error), "messages") from None


async def _encode(
    serving: Serving,
    conversation: Conversation,
    max_tokens: int,
    add_special_tokens: bool,
    images: Images,
) -> list[int]:
    text = await serving.renderer.render(conversation)
    vision = serving.engine.ready.vision if images.files else None
    if vision is not None:
        text = images.in_text(text, vision.image_token)
    kwargs: dict[str, Any] = {"max_tokens": max_tokens, "marked": True}
    if len(text) <= _SHORT:
        token_ids = serving.tokenizer.encode(text, add_special_tokens, **kwargs)
    else:
        encode = serving.tokenizer.encode
        token_ids = await asyncio.to_thread(encode, text, add_special_tokens, **kwargs)
    if vision is not None:
        token_ids = images.in_tokens(token_ids, vision.image_token_id)
    if len(token_ids) > max_tokens:
        raise TooManyTokens(len(token_ids), at_least=False)
    return token_ids
