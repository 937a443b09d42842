"""AsyncEngine: an engine in a process of its own, at the other end of one socket pair.

What a request brings is handed to its sink in the very callback that read it from the socket: no queue and no task
stands between (`generate` adds them for whoever wants to iterate). If the child dies, every open request hears of it
and `dead` is set. For an engine in this process, see `llm.py`.
"""

import asyncio
import hashlib
import itertools
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec

from ..errors import UserError
from . import child
from .config import EngineConfig
from .host_memory import gib, headroom
from .messages import (
    AbortRequests,
    AddRequest,
    CompileGrammar,
    EncodeImages,
    EngineStats,
    Fatal,
    FrameReader,
    FromEngine,
    GrammarCompiled,
    ImagesEncoded,
    Ping,
    Placeholder,
    Ready,
    RequestOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
    decode_from_engine,
    frame,
)
from .request import FinishReason
from .sampling_params import SamplingParams
from .vision import ImageRefusedError

logger = logging.getLogger(__name__)

# -P: a folder named like a library (kernels, tools) in the working directory must not be imported in its place.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "nibble.engine.process")

Sink = Callable[[RequestOutput | None], None]


class EngineDeadError(RuntimeError):
    """The engine process has ended; nothing can be generated any more."""


def child_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of sample `index` of n: with a seed given, each sample gets its own, a function of both."""
    if params.seed is None or index == 0:
        return params
    digest = hashlib.sha256(b"%d/%d" % (params.seed, index)).digest()
    return msgspec.structs.replace(params, seed=int.from_bytes(digest[:8], "little") >> 1)


class _Link(asyncio.Protocol):
    """This end of the socket pair. Whole messages go to `on_messages`, all that one read brought at once."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_messages: Callable[[list[FromEngine]], None] = self._first
        self.first: asyncio.Future[FromEngine] = asyncio.get_running_loop().create_future()
        self._frames = FrameReader()

    def data_received(self, data: bytes) -> None:
        messages = [decode_from_engine(body) for body in self._frames.feed(data)]
        if messages:
            self.on_messages(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)

    def _first(self, messages: list[FromEngine]) -> None:
        self.first.set_result(messages[0])


class AsyncEngine:
    """An engine in its own process, used from one asyncio event loop. Made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], transport: asyncio.Transport, link: _Link):
        self.stats = EngineStats()
        self.dead = asyncio.Event()
        self.messages_heard = 0  # so far, of any kind
        self.ready: Ready
        self._process = process
        self._transport = transport
        self._link = link
        self._names: dict[
            str, str
        ] = {}  # request id -> its name in the engine, which is never used again
        self._sinks: dict[str, Sink] = {}  # by that name
        self._serial = itertools.count()
        self._compiling: dict[int, asyncio.Future[str]] = {}
        self._encoding: dict[int, asyncio.Future[ImagesEncoded]] = {}
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, command: Sequence[str] = ENGINE_COMMAND
    ) -> "AsyncEngine":
        """Start the process and wait until it has loaded the model.

        UserError carries the engine's one line about bad input; EngineDeadError is a defect, with more in the log.
        """
        process, sock = child.spawn(command)
        transport, link = await asyncio.get_running_loop().create_connection(_Link, sock=sock)
        engine = cls(process, transport, link)
        try:
            engine._send(config)
            engine.ready = await engine._wait_until_ready()
        except BaseException:  # also when start is cancelled
            process.kill()
            process.wait()
            transport.close()
            raise
        engine.stats.num_blocks = engine.stats.num_free_blocks = engine.ready.num_blocks
        link.on_messages = engine._deliver
        engine._watching = asyncio.create_task(engine._watch(), name="engine-watch")
        return engine

    @property
    def is_alive(self) -> bool:
        return not self.dead.is_set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        cache_salt: bytes = b"",
        images: Sequence[bytes] = (),
    ) -> None:
        """Generate, and call `sink` with each news as soon as it is read from the engine, the last with a
        finish_reason; where that is "error", `error` says why. None instead of news: the engine has died. images: files
        whose embeddings stand in place of the prompt's image tokens.

        `sink` must neither block nor raise. ValueError for an id in use; EngineDeadError if the engine is dead.
        """
        if request_id in self._names:
            raise ValueError(f"request id {request_id!r} is already in use")
        if not self.is_alive:
            raise self.death()
        name = self._names[request_id] = f"{request_id}#{next(self._serial)}"
        self._sinks[name] = sink
        self._send(
            AddRequest(name, prompt_token_ids, params, time.time(), cache_salt, list(images))
        )

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: bytes = b"",
    ) -> AsyncGenerator[RequestOutput, None]:
        """The news of one request as an iterator; see `submit`. Leaving early (aclose, cancellation) aborts the
        request. EngineDeadError if the engine has died or dies."""
        queue: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
        self.submit(request_id, prompt_token_ids, params, queue.put_nowait, cache_salt)
        name = self._names[request_id]
        try:
            while True:
                output = await queue.get()
                if output is None:
                    raise self.death()
                output.request_id = request_id
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._names.get(request_id) == name:
                self.abort(request_id)

    @property
    def num_compiling(self) -> int:
        """Grammars that somebody waits for."""
        return len(self._compiling)

    async def compile_grammar(self, grammar: str) -> None:
        """Have a grammar, in llguidance's form, ready for the requests that ask for it. ValueError, fit for the client
        to read, if it cannot be kept to; EngineDeadError if the engine is dead."""
        if not self.is_alive:
            raise self.death()
        key = next(self._serial)
        told = self._compiling[key] = asyncio.get_running_loop().create_future()
        self._send(CompileGrammar(key, grammar))
        try:
            error = await told
        finally:
            del self._compiling[key]
        if error:
            raise ValueError(error)

    @property
    def num_encoding(self) -> int:
        """Requests whose images somebody waits for."""
        return len(self._encoding)

    async def encode_images(self, files: Sequence[bytes]) -> list[Placeholder]:
        """Have image files embedded for the request that brings them, and what stands for each in its prompt.
        ImageRefusedError for one that is not read; EngineDeadError if the engine is dead."""
        if not self.is_alive:
            raise self.death()
        key = next(self._serial)
        told: asyncio.Future[ImagesEncoded] = asyncio.get_running_loop().create_future()
        self._encoding[key] = told
        self._send(EncodeImages(key, list(files)))
        try:
            encoded = await told
        finally:
            del self._encoding[key]
        if encoded.error:
            raise ImageRefusedError(encoded.error, encoded.refused)
        return encoded.placeholders

    def abort(self, request_id: str) -> None:
        """End a request, whose sink then hears finish_reason "abort". One that is unknown or finished is ignored."""
        name = self._names.get(request_id)
        if name is None:
            return
        if self.is_alive:
            self._send(AbortRequests([name]))
        self._forget(name)(RequestOutput(name, finish_reason=FinishReason.ABORT))

    def ping(self) -> None:
        """Ask the engine's loop to be heard, between two steps."""
        if self.is_alive:
            self._send(Ping())

    def kill(self) -> None:
        """End the process at once, as an engine that is stuck must be; every open request then hears of its death."""
        self._process.kill()

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stop the engine process; open requests end with finish_reason "abort". It is killed after `timeout` s."""
        for request_id in list(self._names):
            self.abort(request_id)
        if self.is_alive:
            self._send(Shutdown())
        await asyncio.to_thread(_reap, self._process, timeout)
        if self._watching is not None:
            await self._watching
        self._transport.close()

    def death(self) -> EngineDeadError:
        """What to raise once `dead` is set."""
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return EngineDeadError(f"the engine process has ended ({how}); its log has the cause")

    def _send(self, message: ToEngine | EngineConfig) -> None:
        self._transport.write(frame(message))

    async def _wait_until_ready(self) -> Ready:
        link = self._link
        waited: set[asyncio.Future[Any]] = {link.first, link.closed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not link.first.done():
            raise _died_loading(await asyncio.to_thread(self._process.wait))
        message = link.first.result()
        if isinstance(message, Fatal):
            raise (
                UserError(message.message)
                if message.exit_code == 2
                else EngineDeadError(message.message)
            )
        if not isinstance(message, Ready):
            raise EngineDeadError(
                f"the engine process began with {type(message).__name__} instead of Ready"
            )
        return message

    async def _watch(self) -> None:
        """Wait for the end of the connection, which is the end of the engine."""
        await self._link.closed
        await asyncio.to_thread(_reap, self._process, 5.0)
        self.dead.set()
        for sink in list(self._sinks.values()):
            sink(None)
        waiting: list[asyncio.Future[Any]] = [*self._compiling.values(), *self._encoding.values()]
        for told in waiting:
            if not told.done():
                told.set_exception(self.death())

    def _deliver(self, messages: list[FromEngine]) -> None:
        """Hand each request's news to its sink: the first of the hands on a delta's way to its client."""
        self.messages_heard += len(messages)
        outputs: list[RequestOutput] = []
        for message in messages:
            if isinstance(message, Fatal):
                logger.error("%s", message.message)
            elif isinstance(message, StepOutputs):
                self.stats = message.stats
                outputs += message.outputs
            elif isinstance(message, GrammarCompiled):
                told = self._compiling.get(message.key)
                if told is not None and not told.done():
                    told.set_result(message.error)
            elif isinstance(message, ImagesEncoded):
                waiting = self._encoding.get(message.key)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        for output in outputs if len(messages) == 1 else _gathered(outputs):
            sink = self._sinks.get(output.request_id)
            if sink is None:  # aborted while this was on its way
                continue
            if output.finish_reason is not None:
                self._forget(output.request_id)
            sink(output)

    def _forget(self, name: str) -> Sink:
        del self._names[name.rpartition("#")[0]]
        return self._sinks.pop(name)


def _gathered(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """The news of several steps as one for each request: whoever cannot keep up has less to do."""
    first: dict[str, RequestOutput] = {}
    for output in outputs:
        so_far = first.setdefault(output.request_id, output)
        if so_far is output:
            continue
        so_far.token_ids += output.token_ids
        so_far.embedding = output.embedding
        if output.logprobs is not None:
            so_far.logprobs = (so_far.logprobs or []) + output.logprobs
        so_far.finish_reason, so_far.stop_reason, so_far.error = (
            output.finish_reason,
            output.stop_reason,
            output.error,
        )
    return list(first.values())


def _died_loading(code: int) -> EngineDeadError:
    """What is known of a child that ended without a word, as where memory is out: libraries abort, the kernel kills."""
    how = (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )
    room = headroom()
    return EngineDeadError(
        f"the engine process {how} while it loaded the model; if memory ran out: {gib(room.free)} are free of "
        f"{room.limit}"
    )


def _reap(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Wait for a process that is about to end; kill it if it does not within `timeout` seconds."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
