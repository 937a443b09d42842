"""Values that a model writes as bare text, typed by the tool's schema.

    <parameter=days>      "days": {"type": "integer"}     3 -> 3
    3                     "days": {"type": "string"}      3 -> "3"
    </parameter>          "days": {}                      3 -> 3, and sunny -> "sunny"

A text that is no value of its type stays a string, for the client to see what the model wrote.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_PYTHON_WORDS = {
    "True": True,
    "False": False,
    "None": None,
}  # as templates write them that do not use tojson
_TYPES: dict[type, tuple[str, ...]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number",),
    dict: ("object",), list: ("array",), type(None): ("null",),
}  # fmt: skip
_MAX_DEPTH = 16  # of references and alternatives


def property_schema(schema: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """The schema of one argument, with the definitions that it may refer to; {}, which any value fits, if unknown."""
    properties = schema.get("properties") if schema else None
    found = properties.get(name) if isinstance(properties, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in (schema or ())}  # type: ignore[index]
    return {**definitions, **found}


def types_of(
    schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0
) -> frozenset[str]:
    """The JSON types that values of a schema may have; none if it does not say."""
    root = schema if root is None else root
    if depth > _MAX_DEPTH:
        return frozenset()
    if "$ref" in schema:
        return types_of(resolve(schema["$ref"], root), root, depth + 1)
    kind = schema.get("type")
    if kind is not None:
        return frozenset([kind] if isinstance(kind, str) else kind)
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(_TYPES.get(type(value), ("",))[0] for value in values)
    found = [
        types_of(each, root, depth + 1)
        for key in ("anyOf", "oneOf", "allOf")
        for each in schema.get(key, ())
        if isinstance(each, Mapping)
    ]
    if not all(found) and "allOf" not in schema:
        return frozenset()  # one of the alternatives may be anything
    return frozenset().union(*found)


def resolve(reference: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference within the schema refers to; {} if there is no such thing."""
    found: Any = root
    for part in str(reference).removeprefix("#").strip("/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether every value is a string, so that the text is the value, whatever it looks like."""
    return types_of(schema) == {"string"}


def value_of(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that a text stands for."""
    if is_text(schema):
        return text
    bare = text.strip()
    try:
        value = (
            _PYTHON_WORDS[bare]
            if bare in _PYTHON_WORDS
            else json.loads(bare, parse_constant=_refuse)
        )
    except (ValueError, RecursionError):
        return text
    types = types_of(schema)
    return (
        value
        if not types or types.intersection(_TYPES[type(value)]) or _is_whole(value, types)
        else text
    )


def _is_whole(value: Any, types: frozenset[str]) -> bool:
    """3.0 is an integer in JSON Schema."""
    return isinstance(value, float) and value.is_integer() and "integer" in types


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


@lru_cache(maxsize=1)
def _encoder() -> json.JSONEncoder:
    return json.JSONEncoder(ensure_ascii=False)


def to_json(value: Any) -> str:
    return _encoder().encode(value)


def escaped(text: str) -> str:
    """A piece of a string's JSON text, without the quotes: pieces joined are the whole's."""
    return to_json(text)[1:-1]
