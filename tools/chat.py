"""`nibble chat`: talk in the terminal, to a running server (--url) or to a model that is loaded for it (MODEL).

The answer goes to stdout as it comes, everything else to stderr, so that `nibble chat --prompt ... > file` holds the
answer alone. Ctrl-C stops an answer, Ctrl-D ends the conversation.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Protocol

import httpx
import msgspec
import typer

from ..engine.client import AsyncEngine, EngineDeadError
from ..engine.config import EngineConfig
from ..engine.request import FinishReason
from ..engine.sampling_params import SamplingParams
from ..engine.text.detokenizer import Detokenizer
from ..engine.text.tokenizer import Tokenizer
from ..errors import UserError

DEFAULT_URL = "http://127.0.0.1:8000"
Messages = list[dict[str, str]]


class Backend(Protocol):
    """Something that answers. `num_tokens` is the length of the last answer."""

    num_tokens: int
    model: str

    async def open(self) -> None: ...

    def reply(self, messages: Messages) -> AsyncGenerator[str, None]: ...

    async def close(self) -> None: ...


class ServerBackend:
    """A running server, spoken to in OpenAI's protocol."""

    def __init__(self, url: str, api_key: str | None, sampling: dict[str, Any]):
        url = url if "://" in url else f"http://{url}"
        self.url, self.sampling, self.num_tokens = url.rstrip("/").removesuffix("/v1"), sampling, 0
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(600, connect=5)
        )
        self.model = ""

    async def open(self) -> None:
        try:
            response = await self.client.get("/v1/models")
        except httpx.TransportError:
            raise UserError(
                f"no server answers at {self.url} (start one: nibble serve MODEL; or load a model here: "
                "nibble chat MODEL)"
            ) from None
        await _check(response)
        self.model = response.json()["data"][0]["id"]

    async def reply(self, messages: Messages) -> AsyncGenerator[str, None]:
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.sampling,
        }
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            await _check(response)
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data is line or data == "[DONE]":
                    continue
                event = msgspec.json.decode(data)
                if "error" in event:
                    raise UserError(f"the server: {event['error']['message']}")
                if event.get("usage"):
                    self.num_tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    async def close(self) -> None:
        await self.client.aclose()


class LocalBackend:
    """A model of our own, in an engine process that lives as long as the conversation."""

    def __init__(self, model: str, sampling: dict[str, Any]):
        self.model, self.sampling, self.num_tokens = model, sampling, 0
        self.names = map(str, itertools.count())

    async def open(self) -> None:
        print(f"loading {self.model} ...", file=sys.stderr)
        self.tokenizer = await asyncio.to_thread(Tokenizer.from_pretrained, self.model)
        try:
            self.engine = await AsyncEngine.start(EngineConfig(model=self.model, max_num_seqs=1))
        except EngineDeadError as error:
            raise UserError(str(error)) from None

    async def reply(self, messages: Messages) -> AsyncGenerator[str, None]:
        ready = self.engine.ready
        prompt = self.tokenizer.encode_chat(messages)
        room = ready.max_model_len - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation is longer than the context of {ready.max_model_len} tokens (/clear)"
            )
        params = SamplingParams(
            **{**self.sampling, "max_tokens": min(room, self.sampling.get("max_tokens", room))}
        )
        _check_params(params, ready.vocab_size)
        detokenizer = Detokenizer(self.tokenizer, params, prompt)
        self.num_tokens = 0
        async with aclosing(self.engine.generate(next(self.names), prompt, params)) as outputs:
            async for output in outputs:
                if output.finish_reason == FinishReason.ERROR:
                    raise UserError(output.error)
                self.num_tokens += len(output.token_ids)
                yield detokenizer.push(output.token_ids)
        yield detokenizer.finish()

    async def close(self) -> None:
        await self.engine.shutdown()


async def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    await response.aread()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    raise UserError(f"the server answered {response.status_code}: {message}")


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    try:
        params.verify(vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None


async def answer(backend: Backend, messages: Messages, tells_speed: bool = True) -> str:
    """Stream one answer to stdout; how fast it came to stderr."""
    start, first, pieces = time.perf_counter(), 0.0, []
    async with aclosing(backend.reply(messages)) as texts:
        async for text in texts:
            first = first or (time.perf_counter() if text else 0.0)
            pieces.append(text)
            print(text, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - start
    if not tells_speed:
        return "".join(pieces)
    print(
        f"[{backend.num_tokens} tokens, {backend.num_tokens / seconds:.1f} tokens/s, first after "
        f"{((first or start) - start) * 1000:.0f} ms]",
        file=sys.stderr,
    )
    return "".join(pieces)


def chat_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model to load; without it, the server at --url"),
    ] = None,
    url: Annotated[str, typer.Option(metavar="URL", help="A running server")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="NIBBLE_API_KEY", help="The server's key")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="One question; answer it and end")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="0: always the likeliest token")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="X", help="Sample from the likeliest tokens of this total"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Longest answer", show_default="the rest of the context"),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same answer again")] = None,
) -> None:
    """Talk to a running server or to a model in the terminal; /help there says what else can be typed.

    Examples: nibble chat; nibble chat ./SmolLM2-AWQ --prompt "Name three cheeses."
    """
    from .conversation import Conversation

    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    backend: Backend = (
        LocalBackend(model, sampling) if model else ServerBackend(url, api_key, sampling)
    )
    with asyncio.Runner() as runner:
        runner.run(backend.open())
        try:
            if prompt is None:
                Conversation(runner, backend, system).run()
            else:
                opening = [{"role": "system", "content": system}] if system else []
                runner.run(answer(backend, [*opening, {"role": "user", "content": prompt}]))
        except httpx.TransportError as error:
            raise UserError(f"lost the connection to {url}: {error!r}") from None
        finally:
            runner.run(backend.close())
