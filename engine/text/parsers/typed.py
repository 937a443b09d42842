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
    "True": "true",
    "False": "false",
    "None": "null",
}  # of templates that do not use tojson
_TYPES: dict[type, tuple[str, ...]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number",),
    dict: ("object",), list: ("array",), type(None): ("null",),
}  # fmt: skip
DEFINITIONS = ("$defs", "definitions")
_MAX_DEPTH = 32  # of alternatives within alternatives


def property_schema(schema: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """The schema of one argument, with the definitions that it may refer to; {}, which any value fits, if unknown."""
    if not isinstance(schema, Mapping):
        return {}
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {**{key: schema[key] for key in DEFINITIONS if key in schema}, **found}


def types_of(schema: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that values of a schema may have; none if it does not say."""
    return _types(schema, schema, {}, 0) or frozenset()


def _types(
    schema: Mapping[str, Any],
    root: Mapping[str, Any],
    known: dict[str, frozenset[str] | None],
    depth: int,
) -> frozenset[str] | None:
    """None for any type. `known`: of the references that were followed, so that each is followed once."""
    if depth > _MAX_DEPTH:
        return None
    if "$ref" in schema:
        reference = str(schema["$ref"])
        if reference not in known:
            known[reference] = frozenset()  # one that refers to itself adds nothing
            known[reference] = _types(resolve(reference, root), root, known, depth + 1)
        return known[reference]
    kinds = schema.get("type")
    if kinds is not None:
        return frozenset(kind for kind in _list(kinds) if isinstance(kind, str))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else _list(schema["enum"])
        return frozenset(_TYPES[type(value)][0] for value in values)
    key = next(
        (key for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)), None
    )
    if key is None:
        return None
    found = [
        _types(each, root, known, depth + 1) for each in schema[key] if isinstance(each, Mapping)
    ]
    said = [types for types in found if types is not None]
    return (
        frozenset().union(*said) if said and (key == "allOf" or len(said) == len(found)) else None
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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


def value_json(text: str, schema: Mapping[str, Any]) -> str | None:
    """The JSON of the value that a text stands for, as it is written; None if it stands for none of the schema's."""
    bare = text.strip()
    bare = _PYTHON_WORDS.get(bare, bare)
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    types = types_of(schema)
    fits = not types or types.intersection(_TYPES[type(value)]) or _is_whole(value, types)
    return bare if fits else None


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
