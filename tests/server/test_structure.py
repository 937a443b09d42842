"""How much structure a body has: counted without parsing, compared with what a parser finds."""

import json
import random

import httpx
import pytest

from nibble.server import structure
from nibble.server.errors import ApiError

from .test_http import is_openai_error, post

STRINGS = ["", "a", ",:[{", '"', "\\", '\\"', "\\\\", '",[{"', "é🤗\n\t", "\\" * 7, '"' * 5]


def count(value: object) -> dict[str, int]:
    """Of a value as json.dumps writes it."""
    found = dict.fromkeys(("values", "members", "objects", "lists", "strings"), 0)

    def walk(value: object) -> None:
        if isinstance(value, str):
            found["strings"] += 1
        elif isinstance(value, list | dict):
            found["values"] += max(0, len(value) - 1)
            found["lists" if isinstance(value, list) else "objects"] += 1
            for item in value:
                walk(item)
            if isinstance(value, dict):
                found["members"] += len(value)
                for item in value.values():
                    walk(item)

    walk(value)
    return found


def some_value(choose: random.Random, depth: int = 0) -> object:
    kind = choose.randrange(4 if depth < 5 else 2)
    if kind == 0:
        return "".join(choose.choices(STRINGS, k=choose.randrange(4)))
    if kind == 1:
        return choose.choice([1, -2.5, None, True])
    items = [some_value(choose, depth + 1) for _ in range(choose.randrange(5))]
    if kind == 2:
        return items
    return {f"{i}{choose.choice(STRINGS)}": item for i, item in enumerate(items)}


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_it_counts_what_a_parser_finds(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(structure, "_PIECE", piece)
    choose = random.Random(0)
    for _ in range(150):
        value = some_value(choose)
        body = json.dumps(value, ensure_ascii=choose.random() < 0.5).encode()
        found = count(value)
        for sign, name in structure._NAMES.items():
            limits = dict.fromkeys(structure._LIMITS, 10**9)
            monkeypatch.setattr(structure, "MAX_STRINGS", 10**9)
            for limit, is_refused in ((found[name], False), (found[name] - 1, True)):
                if limit < 0:
                    continue
                if sign == b'"':
                    monkeypatch.setattr(structure, "MAX_STRINGS", limit)
                else:
                    limits[sign] = limit
                monkeypatch.setattr(structure, "_LIMITS", limits)
                if is_refused:
                    with pytest.raises(ApiError, match=f"too many {name}"):
                        structure.check_structure(body)
                else:
                    structure.check_structure(body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"model":"tiny","prompt":[' + "1," * 300_000 + "1]}", "too many values"),
        (
            '{"model":"tiny","messages":[{"role":"user","content":[' + "{}," * 9000 + "{}]}]}",
            "objects",
        ),
        ("{" + ",".join(f'"k{i}":1' for i in range(30_000)) + "}", "too many members"),
        ('{"model":"tiny","prompt":[' + '"",' * 99_999 + '""]}', "too many strings"),
    ],
)
def test_a_body_of_many_small_things_is_refused(http: httpx.Client, body: str, said: str) -> None:
    assert said in is_openai_error(post(http, body.encode()), 400)["message"]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([1, "a"], "prompt.1"),
        (["a", 1], "prompt.1"),
        ([[1], "a"], "prompt.1"),
        ([[1, None]], "prompt.0.1"),
        (5, "prompt"),
        ([None] * 1000, "prompt.0"),
    ],
)
def test_the_first_wrong_item_of_a_prompt_is_named(
    http: httpx.Client, prompt: object, param: str
) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    assert is_openai_error(http.post("/v1/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [97], [[97], [98, 99]]])
def test_prompts_of_every_kind(http: httpx.Client, prompt: object) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200
