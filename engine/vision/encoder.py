"""ImageEncoder: images of requests, embedded in a thread beside the engine's loop, and kept for those that come again.

    file --SHA-256--> kept?  --no--> thread: read, cut into frames, vision tower --> EncodedImage, kept

It is a thread of the engine's process because that has the tower and torch, which the server's must not load; one
thread, because the tower uses all cores or the whole device by itself. What is kept is bounded in bytes and the least
recently used goes first; a request holds on to its own images until it ends.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from ..messages import Placeholder, VisionInfo
from ..request import ImageSpan
from . import KEPT_BYTES, ImageRefusedError
from .image import ImageError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Tower(Protocol):
    """What embeds: tower.VisionTower, or a fake in tests."""

    info: VisionInfo
    is_whole: bool  # tokens of a run see each other

    def encode(self, data: bytes) -> "tuple[Placeholder, Tensor]": ...


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What stands for an image in a prompt, and the embeddings [*, hidden_size] of its image tokens."""

    placeholder: Placeholder
    digest: bytes
    embeddings: "Tensor"


class ImageEncoder:
    """Of one model's vision tower. Thread-safe."""

    def __init__(self, tower: Tower, kept_bytes: int = KEPT_BYTES):
        self.info = tower.info
        self._tower, self._kept_bytes = tower, kept_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._kept: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = Lock()

    def encode(self, files: Sequence[bytes]) -> "Future[list[EncodedImage]]":
        """Begin to embed image files; done at once where all are kept. ImageRefusedError for one that is not read."""
        kept = [self._find(sha256(data).digest()) for data in files]
        found = [image for image in kept if image is not None]
        if len(found) < len(files):
            return self._thread.submit(self._encoded, files)
        done: Future[list[EncodedImage]] = Future()
        done.set_result(found)
        return done

    def spans(self, prompt: Sequence[int], files: Sequence[bytes]) -> tuple[ImageSpan, ...]:
        """The images of a prompt in their places; waits for one that is not kept. ValueError if the prompt has more or
        fewer image tokens than they have embeddings."""
        images = self.encode(files).result()
        places = [i for i, token in enumerate(prompt) if token == self.info.image_token_id]
        wanted = sum(len(image.embeddings) for image in images)
        if len(places) != wanted:
            raise ValueError(f"the prompt has {len(places)} image tokens, its images need {wanted}")
        spans = []
        for image in images:
            count = len(image.embeddings)
            whole = self._runs(places, image.placeholder) if self._tower.is_whole else ()
            spans.append(ImageSpan(places[:count], image.digest, image.embeddings, whole))
            places = places[count:]
        return tuple(spans)

    @staticmethod
    def _runs(places: Sequence[int], placeholder: Placeholder) -> tuple[range, ...]:
        """The positions of each run of an image whose tokens begin at the first of `places`."""
        firsts = accumulate(placeholder.runs[:-1], initial=0)
        starts = [places[first] for first in firsts]
        return tuple(
            range(start, start + length)
            for start, length in zip(starts, placeholder.runs, strict=True)
        )

    def _encoded(self, files: Sequence[bytes]) -> list[EncodedImage]:
        return [self._one(index, data) for index, data in enumerate(files)]

    def _one(self, index: int, data: bytes) -> EncodedImage:
        digest = sha256(data).digest()
        if (kept := self._find(digest)) is not None:
            return kept
        try:
            image = EncodedImage(*self._embedded(data, digest))
        except ImageError as error:
            raise ImageRefusedError(str(error), index) from error
        self._keep(image)
        return image

    def _embedded(self, data: bytes, digest: bytes) -> "tuple[Placeholder, bytes, Tensor]":
        placeholder, embeddings = self._tower.encode(data)
        return placeholder, digest, embeddings

    def _find(self, digest: bytes) -> EncodedImage | None:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def _keep(self, image: EncodedImage) -> None:
        with self._lock:
            self._kept[image.digest] = image
            held = sum(each.embeddings.nbytes for each in self._kept.values())
            while held > self._kept_bytes:
                _, gone = self._kept.popitem(last=False)
                held -= gone.embeddings.nbytes
