"""The two ways to use an engine: LLM, in this process, and AsyncEngine, in a process of its own.

    AsyncEngine   one child process, one socket pair, one reader task; each open `generate` has a queue that the reader
                  fills. Closing the iterator aborts the request. If the child dies, every open and later `generate`
                  raises EngineDeadError and `dead` is set.
    LLM           the same EngineCore, stepped by the caller. torch is imported when one is made, not before.
"""

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from ..quant.errors import NibbleError
from .config import EngineConfig
from .detokenizer import Detokenizer
from .messages import (
    AbortRequests,
    AddRequest,
    EngineStats,
    Fatal,
    FrameReader,
    Ready,
    RequestOutput,
    Shutdown,
    StepOutputs,
    TokenLogprobs,
    decode_from_engine,
    frame,
)
from .request import FinishReason, SamplingParams
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from .core import EngineCore

logger = logging.getLogger(__name__)

# -P: a folder named like a library (kernels, tools) in the working directory must not be imported in its place.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "nibble.engine.process")


class EngineDeadError(RuntimeError):
    """The engine process has ended; nothing can be generated any more."""


def child_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of sample `index` of n: with a seed given, each sample gets its own, a function of both."""
    if params.seed is None or index == 0:
        return params
    digest = hashlib.sha256(b"%d/%d" % (params.seed, index)).digest()
    return msgspec.structs.replace(params, seed=int.from_bytes(digest[:8], "little") >> 1)


class AsyncEngine:
    """An engine in its own process, used from one asyncio event loop. Made by `start`."""

    def __init__(self, process: subprocess.Popen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.stats = EngineStats()
        self.dead = asyncio.Event()
        self.ready: Ready
        self._process = process
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self._queues: dict[str, asyncio.Queue[RequestOutput | None]] = {}
        self._reading: asyncio.Task | None = None

    @classmethod
    async def start(cls, config: EngineConfig, command: Sequence[str] = ENGINE_COMMAND) -> "AsyncEngine":
        """Start the process and wait until it has loaded the model.

        NibbleError carries the engine's one line about bad input; EngineDeadError is a defect, with more in the log.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            engine = cls(process, reader, writer)
            writer.write(frame(config))
            engine.ready = await engine._wait_until_ready()
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise
        engine.stats.num_blocks = engine.stats.num_free_blocks = engine.ready.num_blocks
        engine._reading = asyncio.create_task(engine._read(), name="engine-reader")
        return engine

    @property
    def is_alive(self) -> bool:
        return not self.dead.is_set()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, cache_salt: bytes = b""
    ) -> AsyncIterator[RequestOutput]:
        """The news of one request, the last with a finish_reason; where that is "error", `error` says why.

        Leaving early (aclose, cancellation) aborts the request. EngineDeadError if the engine has died or dies.
        """
        if request_id in self._queues:
            raise ValueError(f"request id {request_id!r} is already in use")
        self._check_alive()
        queue = self._queues[request_id] = asyncio.Queue()
        finished = False
        try:
            self._send(AddRequest(request_id, prompt_token_ids, params, time.time(), cache_salt))
            while not finished:
                output = await queue.get()
                if output is None:
                    self._check_alive()
                finished = output.finish_reason is not None
                yield output
        finally:
            self._queues.pop(request_id, None)
            if not finished and self.is_alive:
                self._send(AbortRequests([request_id]))

    def abort(self, request_id: str) -> None:
        """End a request from outside its `generate`, which then sees finish_reason "abort"."""
        queue = self._queues.pop(request_id, None)
        if queue is not None:
            queue.put_nowait(RequestOutput(request_id, finish_reason=FinishReason.ABORT))
            if self.is_alive:
                self._send(AbortRequests([request_id]))

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stop the engine process; open requests end with finish_reason "abort". It is killed after `timeout` s."""
        for request_id in list(self._queues):
            self.abort(request_id)
        with contextlib.suppress(OSError):
            self._send(Shutdown())
        try:
            await asyncio.to_thread(self._process.wait, timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self._reading is not None:
            await self._reading  # ends when the process has closed its socket
        self._writer.close()

    def _send(self, message: AddRequest | AbortRequests | Shutdown) -> None:
        self._writer.write(frame(message))

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDeadError(f"the engine process has ended ({self._exit_text()}); its log has the cause")

    def _exit_text(self) -> str:
        code = self._process.poll()
        return "still exiting" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    async def _wait_until_ready(self) -> Ready:
        bodies: list[bytes] = []
        while not bodies:
            data = await self._reader.read(1 << 16)
            if not data:
                code = await asyncio.to_thread(self._process.wait)
                raise EngineDeadError(f"the engine process ended while it loaded the model (exit code {code})")
            bodies = self._frames.feed(data)
        message = decode_from_engine(bodies[0])
        if isinstance(message, Fatal):
            raise NibbleError(message.message) if message.exit_code == 2 else EngineDeadError(message.message)
        return message

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 18):
                for body in self._frames.feed(data):
                    self._take(decode_from_engine(body))
        except ConnectionError:
            pass
        finally:
            await asyncio.to_thread(self._process.wait)
            self.dead.set()
            for queue in self._queues.values():
                queue.put_nowait(None)

    def _take(self, message: StepOutputs | Fatal | Ready) -> None:
        if isinstance(message, Fatal):
            logger.error("%s", message.message)
        elif isinstance(message, StepOutputs):
            self.stats = message.stats
            for output in message.outputs:
                queue = self._queues.get(output.request_id)
                if queue is not None:  # None: aborted while this was on its way
                    queue.put_nowait(output)


@dataclass(slots=True)
class Completion:
    """One finished generation."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class _Generation:
    """A Completion in the making."""

    request_id: str
    detokenizer: Detokenizer
    completion: Completion
    pieces: list[str] = field(default_factory=list)

    def take(self, output: RequestOutput) -> bool:
        """Add one output. True once a stop string has ended the text before the engine has."""
        done = self.completion
        if output.finish_reason == FinishReason.ERROR:
            raise RuntimeError(output.error)
        self.pieces.append(self.detokenizer.push(output.token_ids))
        done.token_ids += output.token_ids
        done.num_cached_tokens = output.num_cached_tokens
        if output.logprobs is not None:
            done.logprobs = (done.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            done.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            done.finish_reason, done.stop_reason = output.finish_reason, output.stop_reason
            self.pieces.append(self.detokenizer.finish())
        if self.detokenizer.stopped:
            done.finish_reason, done.stop_reason = FinishReason.STOP, self.detokenizer.stop_reason
        done.text = "".join(self.pieces)
        return self.detokenizer.stopped and output.finish_reason is None
