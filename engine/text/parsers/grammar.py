"""Grammars in llguidance's Lark syntax: with them a model can only write calls that are valid, in its own syntax.

    start: <[151657]> "\\n{\\"name\\": \\"get_weather\\", \\"arguments\\": " r0 "}\\n" <[151658]>
    r0: %json {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

Invariant: what a grammar allows, the parser of the same format reads as calls whose arguments fit the tools' schemas.
A mark that is a special token of the tokenizer is matched as that token, any other one as a text. What a schema asks
for and a syntax cannot promise is a ValueError that names it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...grammar.closed_schema import closed
from .answer import Tool
from .typed import DEFINITIONS, resolve

ANY_TEXT = "/(?s:.*)/"
_MAX_REFERENCES = 8  # one after the other, to where the parameters are
# how tojson writes it, or without spaces, or on lines of its own; bounded, for a model may not end otherwise
_WHITE_SPACE = {"x-guidance": {"whitespace_pattern": "[ \\n]{0,12}"}}
# what a list of parameters, each with a schema of its own, keeps; the rest are notes
_PARAMETER_KEYWORDS = frozenset(
    ("type", "properties", "required", "additionalProperties", *DEFINITIONS)
)
_NOTES = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "$schema",
        "$id",
        "$comment",
        "deprecated",
        "strict",
    ]
)
_SHORTHANDS = {r"\d": "[0-9]", r"\w": "[A-Za-z0-9_]"}  # which are Unicode's in Rust


class Lark:
    """A grammar that is being written: rules with names, and expressions that use them."""

    def __init__(self, special_tokens: Mapping[str, int]):
        self._special = special_tokens
        self._split = re.compile(
            "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)"
        )
        self._rules: list[str] = []

    def has_token(self, text: str) -> bool:
        """Whether the tokenizer has that special token."""
        return text in self._special

    def text(self, text: str) -> str:
        """A fixed text, in which special tokens are those."""
        parts, at = [], 0
        for found in self._split.finditer(text):
            parts += [quoted(text[at : found.start()]), f"<[{self._special[found.group()]}]>"]
            at = found.end()
        parts.append(quoted(text[at:]))
        return " ".join(part for part in parts if part != '""')

    def rule(self, body: str, option: str = "") -> str:
        """A rule of that body; its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{option}: {body}")
        return name

    def later(self) -> str:
        """The name of a rule whose body is not known yet, for what refers to itself."""
        self._rules.append("")
        return f"r{len(self._rules) - 1}"

    def define(self, name: str, body: str) -> None:
        self._rules[int(name[1:])] = f"{name}: {body}"

    def json(self, schema: Mapping[str, Any]) -> str:
        """A value of that schema."""
        return self.rule(f"%json {json.dumps({**schema, **_WHITE_SPACE})}")

    def upto(self, mark: str, terminal: str = ANY_TEXT, padding: str = "") -> str:
        """A text that fits the terminal, then the mark, which is not in the text; padding stands between the two."""
        held = without(mark) if terminal == ANY_TEXT else f"{terminal} & {without(mark)}"
        token = self._split.search(mark)
        if token:
            before = f"{padding}{mark[: token.start()]}"
            text = self._terminal(f"({held}) {quoted(before)}" if before else held)
            return f"{text} {self.text(mark[token.start() :])}"
        return self.rule(self._terminal(f"({held}) {quoted(padding + mark)}"), "[lazy]")

    def _terminal(self, body: str) -> str:
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def written(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules, ""])


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    return "/" + re.sub(r"(?<!\\)/", r"\\/", pattern).replace("\n", "\\n") + "/"


def without(*marks: str) -> str:
    """Texts that none of the marks is in. `~` alone would take what is not UTF-8."""
    any_of = "|".join(re.escape(mark) for mark in marks)
    return f"{ANY_TEXT} & ~{regex(f'(?s:.*)({any_of})(?s:.*)')}"


def one_of(expressions: Iterable[str]) -> str:
    found = list(expressions)
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def repeated(call: str, between: str, parallel: bool) -> str:
    """One call, or several in a row."""
    return f"{call} ({between} {call})*" if parallel else call


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Of a call's arguments: those that the tool names, and no others where it does not say so."""
    return closed({"type": "object", **tool.parameters})


def json_call(lark: Lark, tool: Tool, key: str = "arguments") -> str:
    """A call as a JSON object."""
    head = f'{{"name": {quoted(tool.name)}, "{key}": '
    return f'{lark.text(head)} {lark.json(arguments_schema(tool))} "}}"'


class Parameter:
    """One parameter of a tool: its name, its schema with what that may refer to, and whether it must be there."""

    def __init__(self, name: str, schema: Mapping[str, Any], required: bool):
        self.name, self.schema, self.required = name, schema, required


def check_keywords(schema: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """ValueError for a keyword that is not among the known ones and says something of values."""
    unknown = sorted(set(schema) - {*known, *DEFINITIONS} - _NOTES)
    if unknown:
        raise ValueError(
            f"{what}: this model's calls cannot be held to {unknown[0]!r}; leave it out of the schema"
        )


def parameters_of(schema: Mapping[str, Any], what: str) -> list[Parameter]:
    """An object's parameters one by one, for syntaxes that have no JSON object around them."""
    definitions = {key: schema[key] for key in DEFINITIONS if key in schema}
    for _ in range(_MAX_REFERENCES):
        if "$ref" in schema:
            schema = resolve(schema["$ref"], {**definitions, **schema})
    check_keywords(schema, _PARAMETER_KEYWORDS, what)
    properties = schema.get("properties") or {}
    required = list(schema.get("required") or ())
    names = [*properties, *(name for name in required if name not in properties)]
    return [
        Parameter(name, {**definitions, **_as_schema(properties.get(name))}, name in required)
        for name in names
    ]


def _as_schema(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def listed(lark: Lark, items: Sequence[tuple[str, bool]], between: str) -> str:
    """Items in their order, those that are required and any of the others, with a text between each two."""
    first = more = lark.rule('""')
    for item, required in reversed(items):
        none_before, some_before = f"{item} {more}", f"{quoted(between)} {item} {more}"
        if not required:
            none_before, some_before = f"{none_before} | {first}", f"{some_before} | {more}"
        first, more = lark.rule(none_before), lark.rule(some_before)
    return first


def bare_strings(schema: Mapping[str, Any], root: Mapping[str, Any], what: str) -> list[str]:
    """Terminals for the strings of a schema as bare text, without quotes."""
    return _bare_strings(schema, root, what, set())


def _bare_strings(
    schema: Mapping[str, Any], root: Mapping[str, Any], what: str, followed: set[str]
) -> list[str]:
    """`followed`: the references whose strings are among them already."""
    if "$ref" in schema:
        check_keywords(schema, ("$ref", "type"), what)
        reference = str(schema["$ref"])
        if reference in followed:
            return []
        followed.add(reference)
        return _bare_strings(resolve(reference, root), root, what, followed)
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives:
        # of oneOf two could fit, unless each lists its values
        known = ("anyOf", "type", "oneOf" if all(map(is_listed, alternatives)) else "anyOf")
        check_keywords(schema, known, what)
        return [
            found for each in alternatives for found in _bare_strings(each, root, what, followed)
        ]
    if is_listed(schema):
        check_keywords(schema, ("type", "const", "enum", "format"), what)
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return [quoted(value) for value in values]
    check_keywords(schema, ("type", "pattern", "minLength", "maxLength", "format"), what)
    terminals = []
    if "pattern" in schema:
        terminals.append(_pattern(schema["pattern"], what))
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if low or high != "":
        terminals.append(f"/(?s:.){{{low},{high}}}/")
    return [" & ".join(terminals) or ANY_TEXT]


def is_listed(schema: Mapping[str, Any]) -> bool:
    """Whether a schema says which values there are."""
    return "const" in schema or "enum" in schema


def _pattern(pattern: str, what: str) -> str:
    """A pattern that may be found anywhere in the text, unless it says otherwise."""
    anchored = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", pattern))
    inner = pattern[anchored[0] : len(pattern) - anchored[1]]
    if any(anchored) and "|" in re.sub(r"\\.|\[[^\]]*\]|\([^()]*\)", "", inner):
        raise ValueError(
            f"{what}: the pattern {pattern!r} has alternatives outside of brackets; put them in brackets"
        )
    inner = re.sub(r"\\.", lambda found: _SHORTHANDS.get(found[0], found[0]), inner)
    before, after = ("" if each else "(?s:.*)" for each in anchored)
    return regex(f"{before}(?:{inner}){after}")
