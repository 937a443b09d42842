"""schemathesis, all modes, against the OpenAPI document that the server itself hands out: what the document says and
what the server does are the same.

Two runs. The document as it is: nearly every generated request names a model that is not there. And with the model's
name filled in, and few tokens asked for, so that what is generated reaches the engine.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import SERVE, Record
from .harness import AUTHORIZED, NAME, Server, serving
from .results import Result

OPTIONS = (
    *("--mode", "all", "--phases", "examples,coverage,fuzzing", "--checks", "all"),
    *("--seed", "1", "--request-timeout", "30", "--continue-on-failure", "--no-color"),
)
# Failures by what they are of; whatever is of none of these counts as a violation of the schema.
KINDS = {"ServerError": "5xx", "RejectedPositiveData": "valid but refused"} | dict.fromkeys(
    ("UndefinedStatusCode", "UndefinedContentType", "MissingHeaders"), "undocumented"
)


# What a narrowed document forbids is no error; what it allows may still have token ids beyond the vocabulary.
NARROWED = ("--exclude-checks", "negative_data_rejection,positive_data_acceptance")


def conformance(
    server: Server, document: dict, folder: Path, name: str, options: tuple[str, ...]
) -> Result:
    """One run of `schemathesis run`; its output and report are left in `folder`."""
    file, report = folder / "openapi.json", folder / "report.json"
    file.write_text(json.dumps(document))
    [(header, key)] = AUTHORIZED.items()
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", server.url]
    command += [*OPTIONS, *options, "-H", f"{header}: {key}"]
    done = subprocess.run(
        [*command, "--report-json-path", str(report)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    print(done.stdout, done.stderr)
    if not report.exists():
        raise RuntimeError(f"schemathesis: {(done.stderr or done.stdout).strip()[-200:]}")
    found = json.loads(report.read_text())
    counts = {"5xx": 0, "undocumented": 0, "schema violations": 0, "valid but refused": 0}
    for failure in found["failures"]:
        counts[KINDS.get(failure["type"], "schema violations")] += failure["count"]
    cases, errors = found["test_cases"]["generated"], len(found["errors"])
    works = server.get("/health").status_code == 200
    return Result(
        f"schemathesis, all modes, {name}",
        f"{cases} cases: {', '.join(f'{n} {kind}' for kind, n in counts.items())}"
        f"{f', {errors} errors of its own' if errors else ''}",
        "0 of each",
        cases > 0 and not any(counts.values()) and not errors and works,
    )


def _narrowed(document: dict) -> dict:
    """The document for a client who knows the model's name and asks for little."""
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        for name, narrow in (
            ("model", {"const": NAME}),
            ("max_tokens", {"type": "integer", "minimum": 1, "maximum": 8}),
            ("max_completion_tokens", {"type": "integer", "minimum": 1, "maximum": 8}),
            ("n", {"type": "integer", "minimum": 1, "maximum": 2}),
        ):
            if name in properties:
                properties[name] = narrow
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    parameter["schema"] = {"const": NAME}
    return document


@pytest.fixture(scope="module")
def short(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose answers are short where a request does not say how long they may be."""
    folder = tmp_path_factory.mktemp("short")
    with serving(tiny, folder, *SERVE, "--max-model-len", "256") as started:
        yield started


def test_the_document_is_true(record: Record, short: Server, tmp_path: Path, quick: bool) -> None:
    document = short.get("/openapi.json").json()
    examples = ("--max-examples", "5" if quick else "50")
    record(conformance(short, document, tmp_path, "the document as it is", examples))


def test_with_the_models_name(record: Record, short: Server, tmp_path: Path, quick: bool) -> None:
    document = _narrowed(short.get("/openapi.json").json())
    options = (*NARROWED, "--max-examples", "5" if quick else "50")
    record(conformance(short, document, tmp_path, "the model's name filled in", options))
