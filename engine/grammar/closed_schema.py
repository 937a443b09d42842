"""JSON schemas whose objects have the properties that are named, and no others.

A schema that says nothing of `additionalProperties` allows any. Small models use that to make up properties until they
run out of tokens, and nobody who wrote down properties means it; peers take it the same way (llama.cpp, xgrammar).
What is valid by a closed schema is valid by the open one.
"""

from typing import Any

Schema = dict[str, Any]

# what says of properties beside "properties": such an object is left as it is
_MORE_PROPERTIES = frozenset(
    [
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "propertyNames",
        "minProperties",
        "dependentSchemas",
        "dependentRequired",
        "dependencies",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "if",
        "$ref",
        "$dynamicRef",
    ]
)
# what makes one schema of several: a member that is closed would forbid what another one asks for
_INTERSECTIONS = frozenset(
    ["allOf", "not", "if", "$dynamicRef", "dependentSchemas", "dependencies"]
)
_BY_NAME = ("properties", "$defs", "definitions", "patternProperties")
_LISTS = ("prefixItems", "anyOf", "oneOf")
_ONE = ("items", "additionalProperties")


def closed(schema: Schema) -> Schema:
    """The same, its objects closed; as it is where it makes one schema of several."""
    return schema if _intersects(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in _BY_NAME:
        if isinstance(members := schema.get(name), dict):
            found[name] = {key: _closed(member) for key, member in members.items()}
    for name in _LISTS:
        if isinstance(members := schema.get(name), list):
            found[name] = [_closed(member) for member in members]
    for name in _ONE:
        if name in schema:
            found[name] = _closed(schema[name])
    properties = schema.get("properties")
    if not isinstance(properties, dict) or schema.keys() & _MORE_PROPERTIES:
        return found
    if set(schema.get("required") or ()) <= properties.keys():
        found["additionalProperties"] = False
    return found


def _intersects(schema: Any) -> bool:
    """Whether an object within it is held to several schemas at once."""
    if isinstance(schema, list):
        return any(map(_intersects, schema))
    if not isinstance(schema, dict):
        return False
    beside = {"properties", "required", "additionalProperties"} & schema.keys()
    chosen = {"anyOf", "oneOf", "$ref"} & schema.keys()
    if schema.keys() & _INTERSECTIONS or (beside and chosen) or len(chosen) > 1:
        return True
    return any(map(_intersects, schema.values()))
