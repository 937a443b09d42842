"""/openapi.json against the server: schemathesis makes requests of it, good and bad ones, and compares the answers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from nibble.server import openapi

from .conftest import KEY, ServerProcess

GENERATING = ("/v1/chat/completions", "/v1/completions")
POOLING = ("/v1/embeddings", "/v1/rerank", "/v1/score")
KEYED = ("-H", f"Authorization: Bearer {KEY}")
CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.fixture(scope="module")
def url(start_server: Callable[..., ServerProcess], tiny_llama: Path) -> str:
    """Of a server whose answers are short."""
    flags = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--served-model-name", "tiny")
    return (
        start_server(tiny_llama, *flags, "--api-key", KEY, "--max-model-len", "64").wait_ready().url
    )


@pytest.fixture
def document(url: str) -> dict:
    return httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()


def schemathesis(folder: Path, schema: str, *args: str) -> None:
    """Fails with its report if it finds anything."""
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(CONFIG),
        "run",
        schema,
    ]
    done = subprocess.run(
        [*command, "--mode", "all", "--seed", "1", "--request-timeout", "30", *args],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("phases", "examples"),
    [("fuzzing", "6"), pytest.param("coverage,fuzzing", "50", marks=pytest.mark.slow)],
)
def test_every_answer_is_one_that_the_document_has(
    url: str, tmp_path: Path, phases: str, examples: str
) -> None:
    """Valid requests are accepted and others refused, as far as a document can tell that knows no model."""
    options = ("--phases", phases, "-n", examples, "--checks", "all", *KEYED)
    schemathesis(tmp_path, f"{url}/openapi.json", *options)


@pytest.mark.parametrize(
    ("phases", "examples"),
    [("fuzzing", "12"), pytest.param("coverage,fuzzing", "100", marks=pytest.mark.slow)],
)
def test_the_same_of_the_model_that_is_served(
    url: str, document: dict, tmp_path: Path, phases: str, examples: str
) -> None:
    """Here answers are generated. What is beyond the vocabulary or the context is refused, which no document says."""
    for body in ("Chat", "Completion", "Embedding", "Rerank", "Score"):
        schema = document["components"]["schemas"][f"{body}Request"]
        schema["properties"]["model"]["enum"] = ["tiny"]
    document["paths"] = {path: document["paths"][path] for path in (*GENERATING, *POOLING)}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,negative_data_rejection,ignored_auth"
    )
    options = ("--url", url, "--phases", phases, "-n", examples, "--checks", checks, *KEYED)
    schemathesis(tmp_path, "openapi.json", *options)


@pytest.mark.parametrize("number", [0, 1, 9, 10, 99, 100, 263, 1009, 2110])
def test_a_pattern_of_token_ids_is_of_these_alone(number: int) -> None:
    pattern = re.compile(openapi._up_to(number))
    found = [i for i in range(12_000) if pattern.search(str(i))]
    assert found == list(range(number + 1))
    assert not any(map(pattern.search, ("", "00", "-1", "1.0", "a", "1a", "01")))


def test_the_document_names_keys_streams_and_text(document: dict) -> None:
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        probe = path in ("/livez", "/readyz", "/health")
        for operation in operations.values():
            assert operation.get("security") == (None if probe else [{"bearer": []}]), path
            assert "503" in operation["responses"] and ("401" in operation["responses"]) != probe
    schemas = document["components"]["schemas"]
    assert schemas["DetokenizeRequest"]["properties"]["tokens"]["items"]["maximum"] == 263
    assert schemas["ChatRequest"]["properties"]["stop_token_ids"]["anyOf"][0]["items"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 263,
    }
    for path in GENERATING:
        responses = document["paths"][path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "401", "404", "408", "413", "415", "500", "503"} < set(responses)
        error = {"$ref": "#/components/schemas/Error"}
        assert responses["400"]["content"]["application/json"]["schema"] == error
    (metrics,) = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert metrics.startswith("text/plain")
