"""The engine's own process: `python -m nibble.engine.process --fd N`.

N is an inherited end of a private socket pair; nothing listens anywhere. The first frame is the EngineConfig, the
answer is Ready or Fatal, and from then on the loop is: take in what has arrived (waiting for it only when there is
nothing to compute), step, send the news.

The process lives exactly as long as its parent wants it to: it ends on Shutdown, when the socket closes, and, on
Linux, when the parent dies in any way at all. SIGINT and SIGTERM are left to the parent, which drains first; a
terminal or a service manager sends them to both.
"""

import contextlib
import gc
import logging
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from ..errors import UserError
from . import child, host_memory
from .config import EngineConfig
from .core import EngineCore
from .encoders.choose import is_encoder
from .encoders.core import EncoderCore
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
    Pong,
    Ready,
    RequestOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
    decode_to_engine,
    frame,
)
from .request import FinishReason
from .vision import ImageRefusedError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from llguidance import LLMatcher

    from .grammar.compiler import GrammarCompiler
    from .vision.encoder import EncodedImage, ImageEncoder

logger = logging.getLogger("nibble.engine")  # __name__ is __main__ here


class Core(Protocol):
    """What the loop feeds: core.EngineCore, or encoders.core.EncoderCore where a checkpoint is an encoder."""

    @property
    def grammars(self) -> "GrammarCompiler | None":
        """None: nothing is generated that could keep to one."""
        ...

    @property
    def images(self) -> "ImageEncoder | None":
        """None: the model does not see."""
        ...

    @property
    def has_work(self) -> bool: ...

    def ready(self) -> Ready: ...

    def stats(self) -> EngineStats: ...

    def add(self, message: AddRequest) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def check_idle(self) -> None: ...


CoreFactory = Callable[[EngineConfig], Core]


class Closed(Exception):
    """The parent has closed its end."""


class Channel:
    """The engine's end of the socket pair."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._frames = FrameReader()
        self._sending = threading.Lock()  # threads that compile grammars send, too

    def receive(self, wait: bool) -> list[bytes]:
        """Every frame that has arrived whole; if `wait`, at least one. Raises Closed."""
        bodies: list[bytes] = []
        while True:
            try:
                data = self._sock.recv(1 << 18, 0 if wait and not bodies else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return bodies
            except ConnectionError:
                data = b""
            if not data:
                raise Closed
            bodies += self._frames.feed(data)

    def send(self, message: FromEngine) -> None:
        try:
            with self._sending:
                self._sock.sendall(frame(message))
        except (BrokenPipeError, ConnectionError):
            raise Closed from None


class EngineLoop:
    """Feeds one core from a channel until it is told to stop."""

    def __init__(self, core: Core, channel: Channel):
        self.core = core
        self.channel = channel
        self._sent_stats = EngineStats()

    def run(self) -> None:
        """Returns on Shutdown; raises Closed, or whatever makes it impossible to go on."""
        while True:
            idle = not self.core.has_work
            if idle:
                self.core.check_idle()
            refused: list[RequestOutput] = []
            for body in self.channel.receive(wait=idle):
                message = decode_to_engine(body)
                if isinstance(message, Shutdown):
                    return
                refused += self._handle(message)
            self._report(refused + self.core.step())

    def _handle(self, message: ToEngine) -> list[RequestOutput]:
        if isinstance(message, AbortRequests):
            for request_id in message.request_ids:
                self.core.abort(request_id)
        elif isinstance(message, AddRequest):
            try:
                self.core.add(message)
            except ValueError as error:
                return [
                    RequestOutput(
                        message.request_id, finish_reason=FinishReason.ERROR, error=str(error)
                    )
                ]
        elif isinstance(message, CompileGrammar):
            self._compile(message)
        elif isinstance(message, EncodeImages):
            self._encode(message)
        elif isinstance(message, Ping):
            self.channel.send(Pong())
        return []

    def _tell(self, message: FromEngine) -> None:
        """From another thread."""
        with contextlib.suppress(Closed, OSError):  # the loop has ended, and nobody waits
            self.channel.send(message)

    def _encode(self, message: EncodeImages) -> None:
        def on_done(encoded: "Future[list[EncodedImage]]") -> None:
            error = encoded.exception()
            if error is None:
                found = [image.placeholder for image in encoded.result()]
                self._tell(ImagesEncoded(message.key, found))
            else:
                self._tell(_refusal(message.key, error))

        images = self.core.images
        if images is None:
            self._tell(ImagesEncoded(message.key, [], "this model does not see images"))
        else:
            images.encode(message.files).add_done_callback(on_done)

    def _compile(self, message: CompileGrammar) -> None:
        def tell(error: str) -> None:
            self._tell(GrammarCompiled(message.key, error))

        def on_done(compiled: "Future[LLMatcher]") -> None:
            error = compiled.exception()
            tell("" if error is None else str(error))

        grammars = self.core.grammars
        if grammars is None:
            tell("this model generates nothing")
        else:
            grammars.compile(message.grammar).add_done_callback(on_done)

    def _report(self, outputs: list[RequestOutput]) -> None:
        stats = self.core.stats()
        if outputs or stats != self._sent_stats:
            self.channel.send(StepOutputs(outputs, stats))
            self._sent_stats = stats


def _refusal(key: int, error: BaseException) -> ImagesEncoded:
    """A file that is not read is its sender's matter, all else a defect."""
    if isinstance(error, ImageRefusedError):
        return ImagesEncoded(key, [], str(error), error.index)
    logger.error("images could not be encoded", exc_info=error)
    return ImagesEncoded(key, [], "the engine failed on these images; its log has the cause")


def serve(sock: socket.socket, make_core: CoreFactory) -> int:
    """Load and run one engine over `sock`. Returns the exit code: 0 told to stop, 1 a defect, 2 bad input."""
    channel = Channel(sock)
    try:
        config = msgspec.msgpack.decode(channel.receive(wait=True)[0], type=EngineConfig)
        core = _made(make_core, config)
        channel.send(core.ready())
        # What loading left behind never dies: keep the collector from walking it between steps.
        gc.collect()
        gc.freeze()
        EngineLoop(core, channel).run()
    except Closed:
        return 0
    except Exception as error:
        fatal = _fatal(error)
        try:
            channel.send(fatal)
        except Closed:
            logger.error("%s", fatal.message)
        return fatal.exit_code
    return 0


def _made(make_core: CoreFactory, config: EngineConfig) -> Core:
    """UserError where there is not enough memory: the limit is the user's to raise, and no defect."""
    room = host_memory.headroom()  # before: what a failed start has taken is not free yet
    try:
        return make_core(config)
    except Exception as error:
        if not host_memory.ran_out(error):
            raise
        raise UserError(
            f"memory ran out while the model was loaded: {host_memory.gib(room.free)} were free of "
            f"{room.limit}; raise the limit, or serve a smaller or a quantized checkpoint"
        ) from error


def _fatal(error: Exception) -> Fatal:
    if isinstance(error, UserError):
        return Fatal(str(error), exit_code=2)
    logger.critical("the engine cannot go on", exc_info=error)
    return Fatal(f"the engine failed with {type(error).__name__}; its log has the cause")


def _load(config: EngineConfig) -> Core:
    core: Core
    if is_encoder(config.model, config.revision):
        core = EncoderCore(config, progress=_show)
    else:
        core = EngineCore(config, progress=_show)
    _show("")
    return core


def _show(line: str) -> None:
    """Where a person looks on: the stage of loading, on one line that the next overwrites."""
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None, make_core: CoreFactory = _load) -> int:
    """Entry point of the child process. `make_core` is another one only in tests."""
    sock = child.enter("nibble.engine.process", "The engine process of `nibble serve`.", argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with sock:
        return serve(sock, make_core)


if __name__ == "__main__":
    sys.exit(main())
