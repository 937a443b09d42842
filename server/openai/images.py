"""Images of a conversation: from URLs to files, and to what stands for them in the prompt's tokens.

image_url -> file -> the engine, which embeds them -> Placeholders -> text -> token ids, each run at its length
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
from ..fetch import FetchError, fetch
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
        raise _invalid(sent[0][0], f"the model `{serving.model_names[0]}` does not see images.")
    if len(sent) > limits.MAX_IMAGES:
        raise errors.bad_request(
            f"A request may have up to {limits.MAX_IMAGES} images, got {len(sent)}.", "messages"
        )
    files = await _files(serving, sent)
    if serving.engine.num_encoding >= limits.MAX_ENCODING:
        serving.metrics.rejected("queue_full")
        raise errors.unavailable("The server's queue is full. Please try again.", retry_after=1)
    try:
        return Images(files, await serving.engine.encode_images(files))
    except ImageRefusedError as error:
        if error.index is None:
            raise errors.internal(str(error)) from None
        raise _invalid(sent[error.index][0], str(error)) from None


async def _files(serving: Serving, sent: Sequence[tuple[str, str]]) -> list[bytes]:
    """Of (param, URL)s, in order. Those that are fetched come one after the other: a request is one client's, and hosts
    are not ours to load."""
    return [
        await _fetched(serving, param, url)
        if url.startswith(("http:", "https:"))
        else await asyncio.to_thread(_decoded, param, url)
        for param, url in sent
    ]


async def _fetched(serving: Serving, param: str, url: str) -> bytes:
    hosts = serving.media_hosts
    if not hosts:
        raise _invalid(
            param,
            "this server fetches no images (--allowed-media-domains); send a data URL, "
            "data:image/png;base64,...",
        )
    try:
        return await fetch(url, hosts)
    except FetchError as error:
        raise _invalid(param, str(error)) from None


def _decoded(param: str, url: str) -> bytes:
    """The bytes of a data URL."""
    head = _DATA_URL.match(url)
    if head is None:
        raise _invalid(
            param, "an image is a data URL, data:image/png;base64,..., or an http(s) URL"
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise _invalid(param, f"no base64: {error}") from None


def _invalid(param: str, problem: str) -> errors.ApiError:
    return errors.bad_request(f"Invalid value for '{param}': {problem}", param)
