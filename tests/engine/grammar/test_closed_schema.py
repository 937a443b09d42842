"""Closed schemas: what they close, what they leave, and that nothing becomes valid by it."""

from typing import Any

import jsonschema_rs
import pytest

from nibble.engine.grammar.closed_schema import closed

TEXT = {"type": "string"}
A = {"type": "object", "properties": {"a": TEXT}}
CLOSED_A = {**A, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, CLOSED_A),
        ({**A, "required": ["a"]}, {**CLOSED_A, "required": ["a"]}),
        ({"type": "array", "items": A}, {"type": "array", "items": CLOSED_A}),
        ({"prefixItems": [A, TEXT]}, {"prefixItems": [CLOSED_A, TEXT]}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED_A, {"type": "null"}]}),
        (
            {"properties": {"in": A}},
            {"properties": {"in": CLOSED_A}, "additionalProperties": False},
        ),
        (
            {"$defs": {"A": A}, "properties": {"x": {"$ref": "#/$defs/A"}}},
            {
                "$defs": {"A": CLOSED_A},
                "properties": {"x": {"$ref": "#/$defs/A"}},
                "additionalProperties": False,
            },
        ),
        ({"additionalProperties": A}, {"additionalProperties": CLOSED_A}),
    ],
)
def test_objects_with_properties_are_closed_wherever_they_are(schema: Any, expected: Any) -> None:
    assert closed(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "patternProperties": {"^b": TEXT}},
        {**A, "required": ["b"]},
        {**A, "minProperties": 2},
        {"allOf": [A, {"properties": {"b": TEXT}}]},
        {**A, "anyOf": [{"required": ["b"]}, {"required": ["a"]}]},
        {"$defs": {"A": A}, "$ref": "#/$defs/A", "properties": {"b": TEXT}},
        {"anyOf": [A], "oneOf": [A, TEXT]},
        {"const": A, "enum": [A], "default": A},
    ],
)
def test_what_says_more_or_is_made_of_several_stays(schema: Any) -> None:
    before = repr(schema)
    assert closed(schema) == schema and repr(schema) == before


def test_what_is_valid_by_the_closed_one_is_by_the_open_one() -> None:
    schema = {"properties": {"a": A, "b": {"type": "array", "items": A}}, "required": ["a"]}
    values = [{"a": {"a": "x"}}, {"a": {}, "b": [{"a": "y"}]}, {"a": {"z": 1}}, {"a": {}, "c": 2}]
    narrow = [jsonschema_rs.is_valid(closed(schema), value) for value in values]
    assert narrow == [True, True, False, False]
    assert all(jsonschema_rs.is_valid(schema, value) for value in values)
