"""Images of a conversation: from data URLs to files, and to what stands for them in the prompt's tokens.

image_url -> bytes -> the engine, which embeds them -> Placeholders -> text -> token ids, each run at its length
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence

import msgspec

from ...engine.messages import Placeholder
from ...engine.vision import ImageRefusedError
from .. import errors, limits
from ..serving import Serving
from .messages import Message

_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.=+-]+)*;base64,", re.ASCII)


class Images(msgspec.Struct, frozen=True):
    """Files, and what stands for each in the prompt. None at all: a conversation of words."""

    files: list[bytes] = []
    placeholders: list[Placeholder] = []

    def in_text(self, text: str, image_token: str) -> str:
        """A rendered conversation with the placeholders in their places. ValueError, fit for the client to read, unless
        the template has written one image token for each image; those that users write are marked."""
        pieces = text.split(image_token)
        if len(pieces) != len(self.files) + 1:
            raise ValueError(
                f"the chat template wrote {len(pieces) - 1} places for {len(self.files)} images"
            )
        texts = [*(placeholder.text for placeholder in self.placeholders), ""]
        return "".join(part for pair in zip(pieces, texts, strict=True) for part in pair)

    def in_tokens(self, token_ids: list[int], image_token_id: int) -> list[int]:
        """Token ids with each image token repeated for its run."""
        runs = iter([run for placeholder in self.placeholders for run in placeholder.runs])
        found: list[int] = []
        for token in token_ids:
            found += [token] * (next(runs, 1) if token == image_token_id else 1)
        return found


NO_IMAGES = Images()


async def images_of(serving: Serving, messages: Sequence[Message]) -> Images:
    """The images of a conversation, embedded. ApiError 400 that names the part for one that is not read, or where the
    model does not see; 503 where too many wait."""
    sent = [
        (f"messages[{i}].content[{j}].image_url", part.image_url.url)
        for i, message in enumerate(messages)
        for j, part in enumerate(message.parts)
        if part.image_url is not None
    ]
    if not sent:
        return NO_IMAGES
    if serving.engine.ready.vision is None:
        raise errors.bad_request(
            f"Invalid value for '{sent[0][0]}': the model `{serving.model_names[0]}` does not see images.",
            sent[0][0],
        )
    if len(sent) > limits.MAX_IMAGES:
        raise errors.bad_request(
            f"A request may have up to {limits.MAX_IMAGES} images, got {len(sent)}.", "messages"
        )
    files = await asyncio.to_thread(lambda: [_file(param, url) for param, url in sent])
    if serving.engine.num_encoding >= limits.MAX_ENCODING:
        serving.metrics.rejected("queue_full")
        raise errors.unavailable("The server's queue is full. Please try again.", retry_after=1)
    try:
        return Images(files, await serving.engine.encode_images(files))
    except ImageRefusedError as error:
        if error.index is None:
            raise errors.internal(str(error)) from None
        param = sent[error.index][0]
        raise errors.bad_request(f"Invalid value for '{param}': {error}", param) from None


def _file(param: str, url: str) -> bytes:
    """The bytes of a data URL."""
    head = _DATA_URL.match(url)
    if head is None:
        raise errors.bad_request(
            f"Invalid value for '{param}': images are sent as data URLs, "
            "data:image/png;base64,...; this server fetches none.",
            param,
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise errors.bad_request(
            f"Invalid value for '{param}': no base64: {error}", param
        ) from None
