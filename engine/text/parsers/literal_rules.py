"""Grammars for calls whose arguments are literals: what a tool's schema allows, in Python's or in Gemma's syntax."""

from collections.abc import Mapping, Sequence
from typing import Any

from .answer import Tool
from .formats import calls_of
from .grammar import (
    Lark,
    Parameter,
    arguments_schema,
    bare_strings,
    check_keywords,
    is_listed,
    listed,
    one_of,
    parameters_of,
    quoted,
    repeated,
)
from .typed import DEFINITIONS, is_text, resolve, types_of

_SCALARS = frozenset(("number", "integer", "boolean", "null"))


def pythonic_rules(
    lark: Lark,
    tools: Sequence[Tool],
    parallel: bool,
    opening: str,
    closing: str,
    by_line: bool = False,
) -> str:
    """Calls between marks: in a list, or each on a line of its own."""
    newline = "\n" if by_line else ""

    def rule(lark: Lark, tool: Tool) -> str:
        what = f"tool {tool.name!r}"
        items = [
            (f"{quoted(each.name + '=')} {_python_value(lark, each)}", each.required)
            for each in parameters_of(arguments_schema(tool), what)
        ]
        return f"{quoted(tool.name + '(')} {listed(lark, items, ', ')} {quoted(')' + newline)}"

    calls = repeated(calls_of(lark, tools, rule), "" if by_line else '", "', parallel)
    brackets = (newline, "") if by_line else ("[", "]")
    return f"{lark.text(opening + brackets[0])} {calls} {lark.text(brackets[1] + closing)}"


def _python_value(lark: Lark, parameter: Parameter) -> str:
    """JSON is read as Python too, but a truth value is what the model knows as Python's."""
    if types_of(parameter.schema) == {"boolean"} and "enum" not in parameter.schema:
        return '("True" | "False")'
    return lark.json(parameter.schema)


class GemmaValues:
    """Values in Gemma's syntax: JSON but for its strings, which have a quote of their own and no escapes."""

    def __init__(self, lark: Lark, quote: str, root: Mapping[str, Any], what: str):
        self._lark, self._quote, self._root, self._what = lark, quote, root, what
        self._definitions = {key: root[key] for key in DEFINITIONS if key in root}
        self._references: dict[str, str] = {}

    def value(self, schema: Mapping[str, Any]) -> str:
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]))
        if "anyOf" in schema or "oneOf" in schema:
            return self._alternatives(schema)
        if isinstance(schema.get("type"), list):
            return one_of(self.value({**schema, "type": each}) for each in schema["type"])
        if is_text(schema):
            return self._string(schema)
        kinds = types_of(schema)
        if kinds and kinds <= _SCALARS:
            return self._lark.json(schema)
        if kinds == {"array"}:
            return self._array(schema)
        if kinds == {"object"} and schema.get("properties"):
            return f'"{{" {self.arguments(schema)} "}}"'
        raise ValueError(
            f"{self._what}: this model's calls cannot hold a value to a schema without a type, properties or items; "
            "say what it is"
        )

    def _alternatives(self, schema: Mapping[str, Any]) -> str:
        """Of oneOf two could fit, unless their types differ; a whole number is a number too."""
        alternatives = schema.get("anyOf") or schema.get("oneOf") or ()
        kinds = [
            kind
            for each in alternatives
            for kind in types_of({**self._definitions, **each}) or {""}
        ]
        differ = len(set(kinds)) == len(kinds) and "" not in kinds
        is_exclusive = all(map(is_listed, alternatives)) or (
            differ and not {"integer", "number"} <= {*kinds}
        )
        check_keywords(schema, ("anyOf", "type", "oneOf" if is_exclusive else "anyOf"), self._what)
        return one_of(self.value(each) for each in alternatives)

    def arguments(self, schema: Mapping[str, Any]) -> str:
        items = [
            (f"{quoted(each.name + ':')} {self.value(each.schema)}", each.required)
            for each in parameters_of(schema, self._what)
        ]
        return listed(self._lark, items, ",")

    def _reference(self, reference: str) -> str:
        if reference not in self._references:
            name = self._references[reference] = self._lark.later()
            self._lark.define(name, self.value(resolve(reference, self._root)))
        return self._references[reference]

    def _string(self, schema: Mapping[str, Any]) -> str:
        terminals = bare_strings(schema, self._root, self._what)
        quote = self._lark.text(self._quote)
        return f"{quote} {one_of(self._lark.upto(self._quote, each) for each in terminals)}"

    def _array(self, schema: Mapping[str, Any]) -> str:
        check_keywords(schema, ("type", "items", "minItems", "maxItems"), self._what)
        item = self._lark.rule(self.value(schema.get("items", {})))
        low, high = schema.get("minItems", 0), schema.get("maxItems", "")
        if high == 0:
            return '"[" "]"'
        counts = f"{{{max(low - 1, 0)},{high - 1 if high else ''}}}"
        more = "" if high == 1 else f'("," {item}){counts}'
        return f'"[" {item} {more} "]"' if low else f'"[" ({item} {more})? "]"'


def gemma_rules(
    lark: Lark, tools: Sequence[Tool], parallel: bool, opening: str, closing: str, quote: str
) -> str:
    """Calls between marks, one after the other."""

    def rule(lark: Lark, tool: Tool) -> str:
        schema = arguments_schema(tool)
        values = GemmaValues(lark, quote, schema, f"tool {tool.name!r}")
        head = lark.text(f"{opening}call:{tool.name}{{")
        return f"{head} {values.arguments(schema)} {lark.text('}' + closing)}"

    return repeated(calls_of(lark, tools, rule), "", parallel)
