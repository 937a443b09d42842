"""What the endpoints see of the server: is it ready, who is the engine, is there room.

    LOADING --engine and tokenizer up--> READY --SIGTERM--> DRAINING
       \\------------------- the engine dies -----------------> DEAD

Only READY admits. A sequence is counted from `admit` to `release`; the drain waits for the count to reach zero.
"""

import asyncio
import enum
import hashlib
from typing import TYPE_CHECKING

from . import errors
from .metrics import Metrics

if TYPE_CHECKING:
    from ..engine.client import AsyncEngine
    from ..engine.pooling import Task
    from ..engine.text.chat_output import ChatOutput
    from ..engine.text.renderer import Renderer
    from ..engine.text.tokenizer import Tokenizer

_PATHS: "dict[Task, tuple[str, ...]]" = {
    "generate": ("/v1/chat/completions", "/v1/completions"),
    "embed": ("/v1/embeddings", "/v1/rerank", "/v1/score"),
    "score": ("/v1/rerank", "/v1/score"),
}
_NO_NAMES = ("tgi", "dummy")  # text-generation's; huggingface_hub's


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Serving:
    """One model being served. Changed only on the event loop."""

    def __init__(
        self,
        model_names: tuple[str, ...],
        *,
        max_num_seqs: int = 64,
        max_queued_requests: int = 1024,
        takes_priorities: bool = False,
        media_hosts: frozenset[str] = frozenset(),
    ):
        """takes_priorities: of requests, each its own. media_hosts: which images are fetched from."""
        self.model_names, self.media_hosts = model_names, media_hosts
        self.takes_priorities = takes_priorities
        self.max_sequences = max_num_seqs + max_queued_requests
        self.phase = Phase.LOADING
        self._loaded: tuple[AsyncEngine, Tokenizer, Renderer, ChatOutput] | None = None
        self.active_sequences = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.metrics = Metrics(model_names[0])

    def ready(
        self,
        engine: "AsyncEngine",
        tokenizer: "Tokenizer",
        renderer: "Renderer",
        output: "ChatOutput",
    ) -> None:
        self._loaded = engine, tokenizer, renderer, output
        self.metrics.watch(engine)
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def drain(self) -> None:
        self.phase = Phase.DRAINING

    def lost(self) -> None:
        """The engine has died."""
        self.phase = Phase.DEAD

    @property
    def is_ready(self) -> bool:
        """Whether anything is admitted."""
        return self.alive and self.phase is Phase.READY

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def engine(self) -> "AsyncEngine":
        return self._all()[0]

    @property
    def tokenizer(self) -> "Tokenizer":
        return self._all()[1]

    @property
    def renderer(self) -> "Renderer":
        return self._all()[2]

    @property
    def output(self) -> "ChatOutput":
        return self._all()[3]

    def _all(self) -> "tuple[AsyncEngine, Tokenizer, Renderer, ChatOutput]":
        if self._loaded is None:
            raise errors.loading()
        return self._loaded

    @property
    def alive(self) -> bool:
        return self.phase is not Phase.DEAD and (self._loaded is None or self.engine.is_alive)

    def check_ready(self) -> None:
        """Raise ApiError 503 unless requests can be served now."""
        if not self.alive:
            raise errors.engine_dead()
        if self.phase is Phase.LOADING:
            raise errors.loading()
        if self.phase is Phase.DRAINING:
            raise errors.unavailable("The server is shutting down.", retry_after=10)

    def admit(self, sequences: int) -> None:
        """Count `sequences` in, or raise ApiError: 503 where there is no room now, 400 where there never is. Each
        admitted sequence must be released once."""
        self.check_ready()
        if sequences > self.max_sequences:
            raise errors.bad_request(
                f"prompts x n must be at most {self.max_sequences} on this server, got {sequences}",
                "n",
            )
        if self.active_sequences + sequences > self.max_sequences:
            self.metrics.rejected("queue_full")
            raise errors.unavailable("The server's queue is full. Please try again.", retry_after=1)
        self.active_sequences += sequences
        self.idle.clear()

    def release(self, sequences: int) -> None:
        self.active_sequences -= sequences
        if not self.active_sequences:
            self.idle.set()

    def check_task(self, *tasks: "Task") -> None:
        """Raise ApiError 400, which says what there is, unless one of these may be asked of the model."""
        served = self.engine.ready.tasks
        if not set(tasks) & set(served):
            paths = dict.fromkeys(path for task in served for path in _PATHS[task])
            raise errors.bad_request(
                f"The model `{self.model_names[0]}` does not {tasks[0]}; it serves {', '.join(paths)}.",
                "model",
                "unsupported_endpoint",
            )

    def check_model(self, model: str) -> None:
        """ApiError 404 for a name that is neither the model's nor one that clients send who know of none."""
        if model not in self.model_names and model not in _NO_NAMES:
            raise errors.model_not_found(model)


def cache_salt(tenant: bytes, salt: str | None) -> bytes:
    """The prefix cache's salt: requests with different API keys or `cache_salt` never share blocks (CVE-2025-46570)."""
    if not tenant and not salt:
        return b""
    return hashlib.sha256(tenant + (salt or "").encode()).digest()[:16]
