"""The two ways to use an engine: LLM, in this process, and AsyncEngine, in a process of its own.

    AsyncEngine   one child process, one socket pair, one reader task; each open `generate` has a queue that the reader
                  fills. Closing the iterator aborts the request. If the child dies, every open and later `generate`
                  raises EngineDeadError and `dead` is set.
    LLM           the same EngineCore, stepped by the caller. torch is imported when one is made, not before.
"""

import asyncio
import hashlib
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
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
        self._names: dict[str, str] = {}  # request id -> its name in the engine, which is never used again
        self._queues: dict[str, asyncio.Queue[RequestOutput | None]] = {}  # by that name
        self._serial = itertools.count()
        self._reading: asyncio.Task | None = None

    @classmethod
    async def start(cls, config: EngineConfig, command: Sequence[str] = ENGINE_COMMAND) -> "AsyncEngine":
        """Start the process and wait until it has loaded the model.

        NibbleError carries the engine's one line about bad input; EngineDeadError is a defect, with more in the log.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        engine = cls(process, reader, writer)
        try:
            writer.write(frame(config))
            engine.ready = await engine._wait_until_ready()
        except BaseException:  # also when start is cancelled
            process.kill()
            process.wait()
            writer.close()
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
    ) -> AsyncGenerator[RequestOutput, None]:
        """The news of one request, the last with a finish_reason; where that is "error", `error` says why.

        Leaving early (aclose, cancellation) aborts the request. EngineDeadError if the engine has died or dies.
        """
        if request_id in self._names:
            raise ValueError(f"request id {request_id!r} is already in use")
        self._check_alive()
        name = self._names[request_id] = f"{request_id}#{next(self._serial)}"
        queue = self._queues[name] = asyncio.Queue()
        finished = False
        try:
            self._send(AddRequest(name, prompt_token_ids, params, time.time(), cache_salt))
            while not finished:
                output = await queue.get()
                if output is None:
                    raise self._death()
                finished = output.finish_reason is not None
                output.request_id = request_id
                yield output
        finally:
            if name in self._queues:  # not if `abort` has been here
                self._forget(request_id)
            if not finished and self.is_alive:
                self._send(AbortRequests([name]))

    def abort(self, request_id: str) -> None:
        """End a request from outside its `generate`, which then sees finish_reason "abort"."""
        if request_id in self._names:
            name, queue = self._forget(request_id)
            queue.put_nowait(RequestOutput(name, finish_reason=FinishReason.ABORT))
            if self.is_alive:
                self._send(AbortRequests([name]))

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stop the engine process; open requests end with finish_reason "abort". It is killed after `timeout` s."""
        for request_id in list(self._names):
            self.abort(request_id)
        if self.is_alive:
            self._send(Shutdown())
        await asyncio.to_thread(_reap, self._process, timeout)
        if self._reading is not None:
            await self._reading
        self._writer.close()

    def _send(self, message: AddRequest | AbortRequests | Shutdown) -> None:
        self._writer.write(frame(message))

    def _forget(self, request_id: str) -> tuple[str, asyncio.Queue[RequestOutput | None]]:
        name = self._names.pop(request_id)
        return name, self._queues.pop(name)

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise self._death()

    def _death(self) -> EngineDeadError:
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return EngineDeadError(f"the engine process has ended ({how}); its log has the cause")

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
        except Exception:
            logger.exception("what the engine says cannot be read any more")
            self._process.kill()
        await asyncio.to_thread(_reap, self._process, 5.0)
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


def _reap(process: subprocess.Popen, timeout: float) -> None:
    """Wait for a process that is about to end; kill it if it does not within `timeout` seconds."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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

    def add(self, output: RequestOutput, detokenizer: Detokenizer) -> None:
        """Take in the next output of the engine. RuntimeError if the request failed."""
        if output.error:
            raise RuntimeError(output.error)
        self.text += detokenizer.push(output.token_ids)
        self.token_ids += output.token_ids
        self.num_cached_tokens = output.num_cached_tokens
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
            self.text += detokenizer.finish()
        if detokenizer.stopped:
            self.finish_reason, self.stop_reason = FinishReason.STOP, detokenizer.stop_reason


class LLM:
    """A model in this process.

    >>> LLM("models/SmolLM2-AWQ", max_num_seqs=8).generate("Once upon a time")[0].text
    """

    def __init__(self, model: str, **engine_config: Any):
        """Load `model`: a local folder, a .gguf file or a Hub id. Further arguments are the fields of EngineConfig.

        NibbleError on bad input.
        """
        from .core import EngineCore  # torch comes in with the runner, when one is made

        config = EngineConfig(model=str(model), **engine_config)
        self.tokenizer = Tokenizer.from_pretrained(model, config.revision)
        self.core = EngineCore(config)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One Completion for each prompt (text or token ids), in order; a single prompt gives a list of one.

        `sampling_params`: one for all or one for each. ValueError for a prompt that cannot be served.
        """
        token_ids = [self._encode(prompt) for prompt in _as_batch(prompts)]
        params = sampling_params or SamplingParams()
        each = [params] * len(token_ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(token_ids):
            raise ValueError(f"{len(token_ids)} prompts, but {len(each)} sampling_params")
        return self._run(token_ids, each)

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[Completion]:
        """The answer to one conversation, or to each of several. ValueError if the model has no chat template."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], dict) else messages
        texts = [self.tokenizer.apply_chat_template(chat, **(chat_template_kwargs or {})) for chat in conversations]
        return self.generate([self.tokenizer.encode(t, add_special_tokens=False) for t in texts], sampling_params)

    def logits(self, token_ids: list[int]) -> "Tensor":
        """float32 [T, vocab]: the model's logits after each of T tokens."""
        return self.core.runner.logits(token_ids)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        done: dict[str, tuple[Completion, Detokenizer]] = {}
        try:
            for token_ids, each in zip(prompts, params, strict=True):
                request_id = str(next(self._ids))
                self.core.add(AddRequest(request_id, token_ids, each))
                done[request_id] = Completion("", [], "", token_ids), Detokenizer(self.tokenizer, each, token_ids)
            while self.core.has_work:
                for output in self.core.step():
                    completion, detokenizer = done[output.request_id]
                    completion.add(output, detokenizer)
                    if detokenizer.stopped:
                        self.core.abort(output.request_id)
        finally:  # also on KeyboardInterrupt: nothing may stay behind in the engine
            for request_id in done:
                self.core.abort(request_id)
        self.core.check_idle()
        return [completion for completion, _ in done.values()]


def _as_batch(prompts: Any) -> list[Any]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)
