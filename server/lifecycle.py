"""The server process from its first line to its exit code. It never imports torch; the engine is a child process.

    start      bind the port, start the engine process, then import the application and load the tokenizer meanwhile
               (after the engine, which downloads it, where the model is on the Hub)
    loading    /livez 200, /readyz 503; every endpoint 503 with Retry-After
    ready      the ledger is printed
    1st SIGTERM or SIGINT    nothing is admitted, /readyz 503; open requests finish, at most `shutdown_timeout` seconds
    2nd        exit at once
    engine dies              open streams get an error event; exit
    engine is stuck          it is killed (engine/watchdog.py)
    any task fails           its traceback is logged; exit

Exit codes: 0 told to stop, 1 the engine died or a task failed, 2 bad input (one line on stderr), 128 + signal when
forced.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import msgspec

from ..engine.client import AsyncEngine, EngineDeadError
from ..engine.config import EngineConfig
from ..engine.grammar.structured_outputs import StructuredOutputs, to_grammar
from ..engine.messages import Ready
from ..engine.text.chat_output import ChatOutput
from ..engine.text.renderer import Renderer
from ..engine.text.tokenizer import Tokenizer
from ..engine.watchdog import until_stuck
from ..errors import UserError
from ..version import __version__
from . import limits
from .connections import ACCEPTED_AT_ONCE, BACKLOG, Connections, Listener, connection_limit
from .keys import ApiKey

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 60  # an idle connection is kept
CLOSE_SECONDS = 2  # after the drain, for the last bytes to leave
GRAMMAR_SECONDS = 2.0  # after the start
DEAD_SECONDS = 1.0  # between the engine's death and the exit, for open streams to hear of it

_LEDGER = {  # parts of Ready.ledger, as printed: what is used is one thing, what is reserved another
    "weights": "weights",
    "kv_cache": "KV cache, reserved",
    "activations": "activations, at most",
    "recurrent_states": "states, reserved",
}

StartEngine = Callable[[EngineConfig], Awaitable[AsyncEngine]]


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side is told at start-up."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    model_names: tuple[str, ...]  # the names clients may use; the first is the one in metrics
    api_keys: tuple[ApiKey, ...] = ()  # none: anybody may ask
    shutdown_timeout: float = 30.0  # seconds
    engine_timeout: float = 60.0  # seconds of silence after which the engine is stuck; 0: never
    max_queued_requests: int = 1024  # sequences beyond max_num_seqs that are admitted
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    ui: bool = True  # the page at / and /ui
    allowed_origins: tuple[str, ...] = ()  # of web pages elsewhere that may ask; "*": any
    max_connections: int | None = None  # None: connections.connection_limit
    # That wait, from one address beyond loopback; 0: any number, None: a quarter of all
    max_connections_per_ip: int | None = None
    parse_special_tokens: bool = False  # those written out in messages count as such
    tool_call_parser: str | None = None  # how answers are read; None: as the chat template says
    reasoning_parser: str | None = None
    allowed_media_domains: tuple[str, ...] = ()  # hosts that images are fetched from


def serve(
    config: EngineConfig, options: ServeOptions, start_engine: StartEngine = AsyncEngine.start
) -> int:
    """Serve until told to stop. Returns the exit code; UserError for bad input."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(config, options, start_engine))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    return import_module("uvloop").new_event_loop if _has_uvloop() else None


def _has_uvloop() -> bool:
    return find_spec("uvloop") is not None


async def _serve(config: EngineConfig, options: ServeOptions, start_engine: StartEngine) -> int:
    connection_limit(options.max_connections)  # bad input is found before anything is started
    sock = _bind(options)
    _on_signals(asyncio.current_task().cancel)  # type: ignore[union-attr]
    # The child is running before anything heavy is imported here.
    engine = asyncio.ensure_future(start_engine(config))
    await asyncio.sleep(0)
    tokenizer = asyncio.ensure_future(_tokenizer(config, engine))
    lifecycle: Lifecycle | None = None
    try:
        await asyncio.to_thread(import_module, ".app", __package__)
        lifecycle = Lifecycle(config, options, sock)
        return await lifecycle.run(engine, tokenizer)
    except asyncio.CancelledError:  # told to stop before there was a lifecycle
        _on_signals(None)
        return 0
    finally:
        await _end(engine, tokenizer, told=lifecycle.failure if lifecycle else None)
        sock.close()


async def _tokenizer(config: EngineConfig, engine: "asyncio.Future[AsyncEngine]") -> Tokenizer:
    if config.is_from_hub:
        await engine  # downloads it: a child can be killed while it does, a thread here could not
    return await asyncio.to_thread(Tokenizer.from_pretrained, config.model, config.revision)


async def _end(*tasks: "asyncio.Future[Any]", told: BaseException | None) -> None:
    """Cancel what still runs (an engine's start that is cancelled kills its process) and stop an engine that nobody
    took over. A defect other than the one already told is logged."""
    for task in tasks:
        task.cancel()
    expected = UserError | EngineDeadError | asyncio.CancelledError
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, AsyncEngine):
            await result.shutdown()
        elif not (result is told or isinstance(result, Tokenizer | expected)):
            log.error("a task failed while the server started", exc_info=result)


class Lifecycle:
    """One run of the server: HTTP on `sock`, the engine beside it."""

    def __init__(self, config: EngineConfig, options: ServeOptions, sock: socket.socket):
        from .app import create_app
        from .serving import Serving

        self.options, self.sock = options, sock
        self.serving = Serving(
            options.model_names,
            max_num_seqs=config.max_num_seqs,
            max_queued_requests=options.max_queued_requests,
            takes_priorities=options.scheduling_policy == "priority",
            media_hosts=frozenset(host.lower() for host in options.allowed_media_domains),
        )
        limit = connection_limit(options.max_connections)
        per_address = options.max_connections_per_ip
        table = Connections(limit, max(1, limit // 4) if per_address is None else per_address)
        self.http = _http_server(
            create_app(self.serving, options.api_keys, options.ui, options.allowed_origins), table
        )
        self.exit_code = 0
        self.failure: BaseException | None = None  # what ended the server
        self.signals = 0
        self.renderer: Renderer | None = None
        self.tasks: set[asyncio.Task[Any]] = set()

    async def run(
        self, engine: "asyncio.Future[AsyncEngine]", tokenizer: "asyncio.Future[Tokenizer]"
    ) -> int:
        """Serve until told to stop or until the engine is lost."""
        _on_signals(self._on_signal)
        watch = self._keep(asyncio.create_task(self._watch(engine, tokenizer)))
        try:
            await self.http.serve(sockets=[self.sock])
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            if self.renderer is not None:
                self.renderer.close()
            if self.serving.is_loaded:
                await self.serving.engine.shutdown(timeout=0 if self.signals > 1 else 5)
        if isinstance(self.failure, UserError):
            raise self.failure
        return self.exit_code

    async def _watch(
        self, engine: "asyncio.Future[AsyncEngine]", tokenizer: "asyncio.Future[Tokenizer]"
    ) -> None:
        """Wait until ready, then for the engine's death."""
        try:
            loaded, ready_tokenizer, renderer = await asyncio.gather(
                engine, tokenizer, self._start_renderer(tokenizer)
            )
            options = self.options
            output = ChatOutput(ready_tokenizer, options.tool_call_parser, options.reasoning_parser)
        except UserError as error:
            self.failure = error
            self._exit(2)
            return
        except EngineDeadError as error:
            log.error("%s", error)
            self._exit(1)
            return
        self.serving.ready(loaded, ready_tokenizer, renderer, output)
        if self.http.should_exit:  # told to stop at this very moment: the socket may be closed
            return
        print(_ledger(loaded.ready, self.options, self.sock), file=sys.stderr, flush=True)
        gc.collect()
        gc.freeze()  # what loading left behind never dies: the collector need not walk it between tokens
        beside = [self._kill_if_stuck(loaded), self._prepare_grammars(loaded)]
        tasks = [self._keep(asyncio.create_task(work)) for work in beside]
        try:
            await loaded.dead.wait()
        finally:
            for task in tasks:
                task.cancel()
        if not self.http.should_exit:
            log.critical("the engine process has ended; shutting down")
            self.serving.lost()
            await asyncio.sleep(DEAD_SECONDS)
            self._exit(1)

    async def _kill_if_stuck(self, engine: AsyncEngine) -> None:
        if not self.options.engine_timeout:
            return
        silent = await until_stuck(engine, self.options.engine_timeout)
        log.critical(
            "the engine is stuck: nothing was heard of it for %.0f s (--engine-timeout %g)",
            silent,
            self.options.engine_timeout,
        )
        engine.kill()

    async def _prepare_grammars(self, engine: AsyncEngine) -> None:
        """The first grammar costs the engine half a second, in which it does nothing else: better when nobody waits."""
        await asyncio.sleep(GRAMMAR_SECONDS)
        await self.serving.idle.wait()
        if not self.serving.is_ready:
            return
        with contextlib.suppress(ValueError, EngineDeadError):
            await engine.compile_grammar(to_grammar(StructuredOutputs(json_object=True)))

    async def _start_renderer(self, tokenizer: "asyncio.Future[Tokenizer]") -> Renderer:
        """The process that renders chat templates, warm by the time that the engine is up."""
        chat_format = (await tokenizer).chat_format(self.options.parse_special_tokens)
        self.renderer = Renderer(chat_format, max_waiting=self.serving.max_sequences)
        self.renderer.start()
        return self.renderer

    def _on_signal(self, number: signal.Signals) -> None:
        self.signals += 1
        if self.signals == 1 and self.serving.is_loaded and self.serving.alive:
            self._keep(asyncio.create_task(self._drain()))
        elif self.signals == 1:
            self._exit(0)
        else:
            self.http.force_exit = True
            self._exit(128 + number)

    async def _drain(self) -> None:
        self.serving.drain()
        if self.renderer is not None:
            self.renderer.close()  # of what it renders from now on nothing would be admitted
        log.info("draining: %d sequences are open", self.serving.active_sequences)
        try:
            await asyncio.wait_for(self.serving.idle.wait(), self.options.shutdown_timeout)
        except TimeoutError:
            log.warning(
                "%d sequences cut off after %g s",
                self.serving.active_sequences,
                self.options.shutdown_timeout,
            )
            self.http.should_exit = True  # before the engine goes: its end is no accident
            await self.serving.engine.shutdown()
        self._exit(self.exit_code)

    def _exit(self, code: int) -> None:
        self.exit_code = code
        self.http.should_exit = True

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """The loop holds tasks weakly: one that runs beside the others must be held, and its failure be heard, here."""
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # of any kind: a panic in Rust is no Exception
            log.critical("the server failed", exc_info=error)
            self.failure = error
            self._exit(1)


def _http_server(app: Any, table: Connections) -> Any:
    """uvicorn on h11 (it bounds the request head; httptools does not), its signal handling left to Lifecycle."""
    import uvicorn

    from .protocol import Protocol, check_uvicorn

    check_uvicorn()

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(
        uvicorn.Config(
            app,
            http=partial(Protocol, table=table),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
            # To asyncio this is how many to accept at once (Listener knows the backlog), to uvloop it is the backlog.
            backlog=BACKLOG if _has_uvloop() else ACCEPTED_AT_ONCE,
        )
    )


def _on_signals(told: Callable[[signal.Signals], object] | None) -> None:
    """From now on `told` hears of the signals that ask a server to stop; None: they end the process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        if told is None:
            loop.remove_signal_handler(number)
        else:
            loop.add_signal_handler(number, told, number)


def _bind(options: ServeOptions) -> Listener:
    """The listening socket, so that an address in use is found before a model is loaded. Clients that come before that
    are kept waiting."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sock = Listener(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((options.host, options.port))
        sock.listen()  # of two servers that start at once both may bind
    except OSError as error:
        sock.close()
        raise UserError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror or error} "
            "(choose another --host or --port)"
        ) from None
    return sock


def _ledger(ready: Ready, options: ServeOptions, sock: socket.socket) -> str:
    """What was loaded and where the memory went, as printed at start-up."""
    lines = [
        f"nibble {__version__}: {options.model_names[0]}, {ready.quantization}, {ready.dtype} on {ready.device}, "
        f"loaded in {ready.load_seconds:.1f} s"
    ]
    lines += [
        f"  {_LEDGER.get(part, part):<24}{size / 2**20:10.1f} MiB"
        for part, size in ready.ledger.items()
    ]
    if ready.num_blocks:
        lines.append(f"  {'KV blocks':<24}{ready.num_blocks:10} of {ready.block_size} tokens")
    if ready.embedding is not None:
        lines.append(f"  {'embeddings':<24}{ready.embedding.dimensions:10} dimensions")
    lines.append(f"  {'context':<24}{ready.max_model_len:10} tokens")
    lines += [
        f"  {'kernel':<24}{count:10} linears on {name}" for name, count in ready.kernels.items()
    ]
    host, port = sock.getsockname()[:2]
    lines.append(f"  http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    if not options.api_keys and not ipaddress.ip_address(host).is_loopback:
        lines.append(
            "  warning: no API key is set (--api-key-file), and other machines may reach this address"
        )
    return "\n".join(lines)
