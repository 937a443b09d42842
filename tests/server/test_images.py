"""Images over HTTP: by OpenAI's two APIs and Anthropic's, from real clients; and what is no image."""

import asyncio
import base64
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from PIL import Image

from nibble.server.errors import ApiError
from nibble.server.openai.images import _files
from nibble.server.serving import Serving

from ..engine.vision.checkpoints import SIZES, build, inputs, png
from ..engine.vision.test_logits import greedy
from .conftest import KEY, ServerProcess

FILE, OTHER = png(SIZES[1], seed=1), png(SIZES[1], seed=2)
SAID = "what is it?"
TEXT = f"<|im_start|>user:<image>{SAID}<|im_end|>\n<|im_start|>assistant:"


def as_format(name: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", size, color) for color in ("red", "blue")]
    more = {"save_all": True, "append_images": frames[1:]} if name == "GIF" else {}
    frames[0].save(file, name, **more)
    return file.getvalue()


def data_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeing")


@pytest.fixture(scope="module")
def want(folder: Path) -> tuple[list[int], list[int]]:
    """(the prompt's tokens, those of the answer) as transformers has them."""
    given = inputs(folder, TEXT, [FILE])
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return given["input_ids"][0].tolist(), greedy(model, given, 8)


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """HOST:PORT where FILE is, whatever the path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FILE)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def seeing(start_server: Callable[..., ServerProcess], folder: Path, host: str) -> ServerProcess:
    build("idefics3", folder)
    flags = ("--api-key", KEY, "--dtype", "float32", "--kv-cache-memory", "16MiB")
    flags += ("--served-model-name", "eye", "--allowed-media-domains", host)
    return start_server(folder, *flags).wait_ready()


@pytest.fixture(scope="module")
def client(seeing: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def part(file: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(file, kind), "detail": "auto"}}


def ask(client: openai.OpenAI, *parts: Any, **more: Any) -> Any:
    content = [*parts, {"type": "text", "text": SAID}]
    given = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}} | more
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="eye", messages=messages, **given)


def text_of(folder: Path, tokens: list[int]) -> str:
    from nibble.engine.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(folder).decode(tokens)


def test_chat_answers_as_transformers_does(client, folder: Path, want) -> None:
    prompt, tokens = want
    answer = ask(client, part(FILE))
    assert answer.choices[0].message.content == text_of(folder, tokens)
    assert answer.usage.prompt_tokens == len(prompt)
    streamed = ask(client, part(FILE), stream=True)
    assert "".join(e.choices[0].delta.content or "" for e in streamed) == text_of(folder, tokens)


def test_an_image_by_url_is_the_same_one(client, host: str, folder: Path, want) -> None:
    answer = ask(client, {"type": "image_url", "image_url": {"url": f"http://{host}/a.png"}})
    assert answer.choices[0].message.content == text_of(folder, want[1])


def test_only_the_same_image_is_found_in_the_prefix_cache(client) -> None:
    ask(client, part(FILE))
    again = ask(client, part(FILE)).usage
    assert again.prompt_tokens_details.cached_tokens == (again.prompt_tokens - 1) // 16 * 16
    assert ask(client, part(OTHER)).usage.prompt_tokens_details.cached_tokens == 0


def test_samples_of_one_prompt(client) -> None:
    answer = ask(client, part(FILE), n=3)
    assert len({choice.message.content for choice in answer.choices}) == 1


def test_responses(client, folder: Path, want) -> None:
    content = [
        {"type": "input_image", "image_url": data_url(FILE), "detail": "auto"},
        {"type": "input_text", "text": SAID},
    ]
    answer = client.responses.create(
        model="eye",
        input=[{"role": "user", "content": content}],
        max_output_tokens=8,
        temperature=0,
    )
    assert answer.usage.input_tokens == len(want[0])
    assert text_of(folder, want[1]).startswith(answer.output_text)


def test_anthropic(seeing: ServerProcess, folder: Path, want) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(FILE).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": SAID}]
    messages = [{"role": "user", "content": content}]
    with anthropic.Anthropic(base_url=seeing.url, api_key=KEY, max_retries=0) as client:
        answer = client.messages.create(
            model="eye", messages=messages, max_tokens=8, extra_body={"temperature": 0}
        )
        count = client.messages.count_tokens(model="eye", messages=messages)
    assert count.input_tokens == len(want[0])
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == len(want[0])
    assert text_of(folder, want[1]).startswith(answer.content[0].text)


def test_tokenize(seeing: ServerProcess, want) -> None:
    messages = [{"role": "user", "content": [part(FILE), {"type": "text", "text": SAID}]}]
    answer = httpx.post(
        f"{seeing.url}/tokenize",
        json={"messages": messages},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert answer.json()["tokens"] == want[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(client, kind: str) -> None:
    assert ask(client, part(as_format(kind), kind.lower())).usage.completion_tokens == 8


def test_text_alone_and_image_tokens_that_a_user_writes(client) -> None:
    written = [{"type": "text", "text": "an <image> that is none"}]
    assert ask(client, *written).usage.completion_tokens == 8
    assert ask(client, *written, part(FILE)).usage.completion_tokens == 8
    plain = [{"role": "user", "content": SAID}]
    answer = client.chat.completions.create(model="eye", messages=plain, max_tokens=4)
    assert answer.usage.prompt_tokens == len(TEXT.replace("<image>", "").encode()) - 31


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (data_url(bomb(30000, 30000)), "more than 33554432 pixels"),
        (data_url(bomb(6000, 6000)), "6000 x 6000 pixels, more than 33554432"),
        (data_url(bomb(100, 100)), "damaged"),
        (data_url(FILE[: len(FILE) // 2]), "damaged"),
        (data_url(b"GIF89a"), "no image"),
        (data_url(b"hello"), "no image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "no image"),
        (data_url(b""), "no image"),
        ("data:image/png;base64,$$$$", "base64"),
        ("data:image/png,abc", "data URL"),
        ("http://127.0.0.1:1/x.png", "none of the hosts"),
        ("file:///etc/passwd", "data URL"),
        ("", "data URL"),
    ],
)
def test_what_is_no_image(client, url: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, part(FILE), {"type": "image_url", "image_url": {"url": url}})
    assert caught.value.param == "messages[0].content[1].image_url"
    assert says in caught.value.message
    ask(client, part(FILE))


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "system", "content": [part(FILE)]}, "messages"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0.image_url"),
        (
            {"role": "user", "content": [part(FILE) | {"type": "text"}]},
            "messages.0.content.0.image_url",
        ),
        ({"role": "user", "content": [part(FILE)] * 33}, "messages"),
    ],
)
def test_images_where_none_may_be(client, message: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="eye", messages=[message])
    assert caught.value.param == param


def test_more_tokens_of_images_than_the_context_has(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, *[part(FILE)] * 32, *[{"type": "text", "text": "x" * 600}])
    assert caught.value.code == "context_length_exceeded"


def test_gemma_3(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    model = build("gemma3", tmp_path)
    flags = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--served-model-name", "eye")
    server = start_server(tmp_path, *flags).wait_ready()
    given = inputs(tmp_path, TEXT, [FILE])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = ask(client, part(FILE))
    assert answer.usage.prompt_tokens == len(given["input_ids"][0])
    assert answer.choices[0].message.content == text_of(tmp_path, greedy(model, given, 8))


def test_urls_where_no_host_is_listed() -> None:
    serving = Serving(("eye",))
    with pytest.raises(ApiError, match="--allowed-media-domains"):
        asyncio.run(_files(serving, [("messages[0].content[0].image_url", "http://x.org/a.png")]))


def test_a_model_that_does_not_see(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": [part(FILE)]}]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="does not see images") as caught,
    ):
        client.chat.completions.create(model="tiny", messages=messages)
    assert caught.value.param == "messages[0].content[0].image_url"
