"""StructuredOutputs: what the text of an answer must be, as clients spell it (vLLM's names) and llguidance reads it.

    json, json_object, regex, choice, grammar (Lark or GBNF), structural_tag     exactly one of them
                    |
                to_grammar
                    |
    {"grammars": [...]}     llguidance's own form, a text: what the engine compiles, and caches by

Objects have the properties that a schema names (closed_schema.py). JSON is written with at most one space or one line
break (and its indentation) between its parts, as llama.cpp has it: a model that likes whitespace cannot fill its
context with it.
"""

import json
from typing import Any

import msgspec

from .closed_schema import closed

# Of what a client sends; the limits of compiler.py are of what becomes of it.
MAX_GRAMMAR_CHARS = 2**18
_WHITESPACE = r" |\n[ \t]{0,20}"
Grammars = list[dict[str, Any]]  # llguidance's, the first of which is the answer's
_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class GrammarError(ValueError):
    """What was asked for cannot be kept to. The message is fit for the client to read; `kind` is the field it is in."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of the first six is given."""

    json: str | dict[str, Any] | bool | None = None  # a JSON schema, or its text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # of the whole text; Rust's syntax
    choice: tuple[str, ...] | None = None  # one of these texts
    # Lark, as llguidance has it, or llama.cpp's GBNF, or llguidance's own form
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None  # tags in free text; what they hold is JSON
    # a Lark grammar of what comes before it: a model that thinks, thinks first
    before: str | None = None
    whitespace_pattern: str | None = None  # between the parts of JSON, in place of the usual
    disable_any_whitespace: bool = False  # JSON has none


def to_grammar(asked: StructuredOutputs) -> str:
    """llguidance's grammar. GrammarError for what can be seen to be wrong without compiling it."""
    given = {kind: getattr(asked, kind) for kind in _KINDS} | {
        "json_object": asked.json_object or None
    }
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        got = ", ".join(kinds) or "none"
        raise GrammarError(
            f"give exactly one of {', '.join(_KINDS)}; got {got}", "structured_outputs"
        )
    kind = kinds[0]
    try:
        grammars = _MAKERS[kind](asked)
        if asked.before is not None:
            both = {"lark_grammar": "start: @before @answer"}
            before = {"name": "before", "lark_grammar": asked.before}
            grammars = [both, before, {**grammars[0], "name": "answer"}, *grammars[1:]]
        grammar = json.dumps({"grammars": grammars})
    except GrammarError:
        raise
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{kind}: {error}", kind) from None
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"{kind} has more than {MAX_GRAMMAR_CHARS} characters", kind)
    return grammar


def _json(asked: StructuredOutputs) -> Grammars:
    schema = asked.json
    if isinstance(schema, str):
        schema = _loaded(schema, "json")
    if not isinstance(schema, dict | bool):
        raise GrammarError("json must be a JSON schema: an object, true or false", "json")
    return _of_schema(schema, asked)


def _json_object(asked: StructuredOutputs) -> Grammars:
    return _of_schema({"type": "object"}, asked)


def _of_schema(schema: dict[str, Any] | bool, asked: StructuredOutputs) -> Grammars:
    if isinstance(schema, dict):
        schema = closed(schema)
    return [{"json_schema": with_whitespace(schema, asked)}]


def with_whitespace(
    schema: dict[str, Any] | bool, asked: StructuredOutputs | None = None
) -> dict[str, Any]:
    """The schema with the usual whitespace between the parts of what it describes, or the whitespace asked for."""
    asked = asked or StructuredOutputs()
    options: dict[str, Any] = {"whitespace_pattern": asked.whitespace_pattern or _WHITESPACE}
    if asked.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return {**schema, "x-guidance": options}


def _regex(asked: StructuredOutputs) -> Grammars:
    from llguidance import regex_to_lark

    return [{"lark_grammar": f"start: /{regex_to_lark(asked.regex or '')}/"}]


def _choice(asked: StructuredOutputs) -> Grammars:
    choices = " | ".join(json.dumps(text) for text in asked.choice or ())
    if not choices:
        raise GrammarError("choice must have at least one text", "choice")
    return [{"lark_grammar": f"start: {choices}"}]


def _grammar(asked: StructuredOutputs) -> Grammars:
    from llguidance.gbnf_to_lark import any_to_lark

    text = asked.grammar or ""
    if text.lstrip().startswith("{"):
        return _own_form(_loaded(text, "grammar"))
    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter raises whatever it stumbles over
        raise GrammarError(f"grammar is neither Lark nor GBNF: {error}", "grammar") from None
    return [{"lark_grammar": lark}]


def _own_form(given: Any) -> Grammars:
    grammars = given.get("grammars") if isinstance(given, dict) else None
    if not isinstance(grammars, list) or not all(isinstance(one, dict) for one in grammars):
        raise GrammarError('as JSON, grammar must be {"grammars": [{...}]}', "grammar")
    if not grammars:
        raise GrammarError("grammar has no grammars", "grammar")
    return grammars


def _structural_tag(asked: StructuredOutputs) -> Grammars:
    from .structural_tag import tag_grammar

    tag = asked.structural_tag
    lark = tag_grammar(_loaded(tag, "structural_tag") if isinstance(tag, str) else tag)
    return [{"lark_grammar": lark}]


def _loaded(text: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise GrammarError(f"{kind} is no JSON: {error}", kind) from None


_MAKERS = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
