"""The page's files over HTTP: who may have them, what holds them to this server, and the accuracy card."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from nibble.server.ui.files import FOLDER

from .conftest import KEY, ServerProcess

HEADERS = {"Authorization": f"Bearer {KEY}"}
FLAGS = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--served-model-name", "tiny")
CARD = {"base_model": "org/tiny", "scheme": "AWQ", "bits_per_weight": 4.25, "evaluation": []}


def test_the_page_needs_no_key_and_everything_else_does(server: ServerProcess) -> None:
    for path in ("/", "/ui", "/ui/app.js", "/ui/style.css", "/ui/icon.svg"):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 200 and answer.content, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert (
        httpx.get(f"{server.url}/ui/app.js").headers["content-type"].startswith("text/javascript")
    )
    assert httpx.post(f"{server.url}/", json={"inputs": "a"}).status_code == 401
    for path in ("/metrics", "/v1/models", "/v1/models/tiny/card", "/uix", "/info"):
        assert httpx.get(f"{server.url}{path}").status_code == 401, path


@pytest.mark.parametrize(
    "path", ["/ui/files.py", "/ui/none.js", "/ui/../auth.py", "/ui/%2e%2e%2fapp.py"]
)
def test_nothing_but_the_pages_files_is_there(server: ServerProcess, path: str) -> None:
    assert httpx.get(f"{server.url}{path}", headers=HEADERS).status_code == 404


def test_what_the_browser_has_is_not_sent_again(server: ServerProcess) -> None:
    etag = httpx.get(f"{server.url}/ui/chat.js").headers["etag"]
    again = httpx.get(f"{server.url}/ui/chat.js", headers={"If-None-Match": etag})
    assert again.status_code == 304 and not again.content
    other = httpx.get(f"{server.url}/ui/chat.js", headers={"If-None-Match": '"x"'})
    assert other.status_code == 200


def test_the_page_goes_nowhere_else_and_writes_no_html() -> None:
    for file in FOLDER.iterdir():
        if file.suffix not in (".html", ".css", ".js"):
            continue
        text = file.read_text()
        found = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not found, file.name
        for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert unsafe not in text, file.name


def test_other_origins_are_let_in_by_flag_alone(
    server: ServerProcess, start_server: Callable[..., ServerProcess], tiny_llama: Path
) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asks |= {"Access-Control-Request-Headers": "authorization,content-type"}
    path = "/v1/chat/completions"
    closed = httpx.options(f"{server.url}{path}", headers=asks)
    assert "access-control-allow-origin" not in closed.headers
    flags = ("--api-key", KEY, "--allowed-origins", "https://a.example", "--no-ui")
    opened = start_server(tiny_llama, *FLAGS, *flags).wait_ready()
    answer = httpx.options(f"{opened.url}{path}", headers=asks)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(f"{opened.url}{path}", headers=asks | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    models = httpx.get(f"{opened.url}/v1/models", headers=HEADERS | {"Origin": "https://a.example"})
    assert models.headers["access-control-allow-origin"] == "https://a.example"
    assert httpx.get(f"{opened.url}/", headers=HEADERS).status_code == 405  # POST alone is there
    assert httpx.get(f"{opened.url}/ui", headers=HEADERS).status_code == 404


def test_the_card_that_lies_beside_the_weights(
    server: ServerProcess,
    start_server: Callable[..., ServerProcess],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    none = httpx.get(f"{server.url}/v1/models/tiny/card", headers=HEADERS)
    assert none.status_code == 404 and "nibble convert" in none.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/models/x/card", headers=HEADERS).status_code == 404
    folder = tmp_path / "with-card"
    shutil.copytree(tiny_llama, folder)
    (folder / "nibble_quality.json").write_text(json.dumps(CARD))
    carded = start_server(folder, *FLAGS).wait_ready()
    assert httpx.get(f"{carded.url}/v1/models/tiny/card").json() == CARD
