"""Structural tags: free text, in which a trigger begins a tag whose content is a JSON document of a schema.

Two spellings, both OpenAI-compatible servers' (vLLM, SGLang):

    {"type": "structural_tag", "triggers": ["<function="],
     "structures": [{"begin": "<function=f>", "schema": {...}, "end": "</function>"}]}

    {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<function="],
     "tags": [{"begin": "<function=f>", "end": "</function>",
               "content": {"type": "json_schema", "json_schema": {...}}}],
     "at_least_one": false, "stop_after_first": false}}

Text is whatever does not hold a trigger.
"""

import json
from typing import Any

import msgspec

from .structured_outputs import GrammarError, with_whitespace


class Tag(msgspec.Struct, frozen=True):
    """`content`: a JSON schema."""

    begin: str
    content: dict[str, Any] | bool
    end: str


class Tags(msgspec.Struct, frozen=True):
    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False


def tag_grammar(tag: Any) -> str:
    """The Lark grammar of a structural tag. GrammarError names what of it is wrong."""
    tags = _read(tag)
    lines = []
    for number, one in enumerate(tags.tags):
        trigger = next((t for t in tags.triggers if one.begin.startswith(t)), None)
        if trigger is None:
            raise _wrong(f"no trigger begins {one.begin!r}")
        content = json.dumps(with_whitespace(one.content))
        rest = [_quoted(one.begin[len(trigger) :]), f"%json {content}", _quoted(one.end)]
        lines += [
            f"head_{number}[lazy]: /(.|\\n)*/ {_quoted(trigger)}",
            f"tag_{number}: head_{number} {' '.join(filter(None, rest))}",
        ]
    any_tag = "(" + " | ".join(f"tag_{number}" for number in range(len(tags.tags))) + ")"
    count = {(False, False): "*", (True, False): "+", (False, True): "?", (True, True): ""}
    repeated = any_tag + count[tags.at_least_one, tags.stop_after_first]
    after = "" if tags.stop_after_first else " /(.|\\n)*/"
    before = "" if tags.at_least_one or not tags.stop_after_first else " | /(.|\\n)*/"
    start = f"start: {repeated}{after}{before}"
    return "\n".join([start, *lines])


def _read(tag: Any) -> Tags:
    if not isinstance(tag, dict):
        raise _wrong("an object is wanted")
    if "format" in tag:
        form = tag["format"]
        kind = form.get("type") if isinstance(form, dict) else None
        if kind != "triggered_tags":
            raise _wrong(f"format.type must be 'triggered_tags', got {kind!r}")
        tags = [{**one, "content": _schema(one)} for one in _objects(form.get("tags"))]
        return _converted({**form, "tags": tags})
    structures = [
        {**one, "content": one.get("schema", True)} for one in _objects(tag.get("structures"))
    ]
    return _converted({"triggers": tag.get("triggers"), "tags": structures})


def _converted(given: dict[str, Any]) -> Tags:
    try:
        tags = msgspec.convert(given, Tags)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from None
    if not tags.tags or not all(tags.triggers):
        raise _wrong("at least one tag is wanted, and no trigger may be empty")
    return tags


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _wrong("tags must be a list of objects")
    return value


def _schema(tag: dict[str, Any]) -> Any:
    content = tag.get("content")
    kind = content.get("type") if isinstance(content, dict) else None
    if kind != "json_schema":
        raise _wrong(f"a tag's content.type must be 'json_schema', got {kind!r}")
    return content.get("json_schema", True) if isinstance(content, dict) else True


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _wrong(why: str) -> GrammarError:
    return GrammarError(f"structural_tag: {why}", "structural_tag")
