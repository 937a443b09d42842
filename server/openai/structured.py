"""What the text of an answer must be: the spellings of OpenAI, vLLM and llama.cpp, all one StructuredOutputs.

response_format                        OpenAI: json_object, json_schema; vLLM: structural_tag
structured_outputs, guided_*           vLLM, newer and older
grammar, json_schema                   llama.cpp
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from ...engine.client import EngineDeadError
from ...engine.grammar.structured_outputs import (
    MAX_GRAMMAR_CHARS,
    GrammarError,
    StructuredOutputs,
    to_grammar,
)
from .. import errors, limits
from ..serving import Serving
from .fields import Ignored, OnlyFalse, Schema

JsonSchema = dict[str, Any] | bool
Text = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=limits.MAX_CHOICES, fail_fast=True)]


class TextFormat(Schema):
    type: Literal["text"]


class JsonObjectFormat(Schema):
    type: Literal["json_object"]
    # llama.cpp's and TGI's name of what else is wanted of it
    json_schema: Annotated[JsonSchema | None, Field(alias="schema")] = None
    value: JsonSchema | None = None

    def asked(self) -> StructuredOutputs:
        schema = self.value if self.json_schema is None else self.json_schema
        if schema is None:
            return StructuredOutputs(json_object=True)
        return StructuredOutputs(json=schema)


class NamedSchema(Schema):
    name: Annotated[str, Field(max_length=64)]
    description: Ignored = None
    json_schema: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: bool | None = None  # either way it is kept to


class JsonSchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuralTagFormat(Schema):
    """vLLM's older and newer form: engine/grammar/structural_tag.py."""

    type: Literal["structural_tag"]
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat,
    Field(discriminator="type"),
]


class StructuredOutputsFields(Schema):
    """vLLM's `structured_outputs`."""

    json_: Annotated[JsonSchema | Text | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | Text | None = None
    whitespace_pattern: Text | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None  # there is one engine, and nothing to fall back to
    disable_additional_properties: OnlyFalse = None

    def asked(self) -> StructuredOutputs:
        return StructuredOutputs(
            json=self.json_,
            regex=self.regex,
            choice=None if self.choice is None else tuple(self.choice),
            grammar=self.grammar,
            json_object=bool(self.json_object),
            structural_tag=self.structural_tag,
            whitespace_pattern=self.whitespace_pattern,
            disable_any_whitespace=bool(self.disable_any_whitespace),
        )


class StructuredFields(Schema):
    """The request fields, of which at most one is given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsFields | None = None
    guided_json: JsonSchema | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    guided_whitespace_pattern: Text | None = None
    grammar: Text | None = None
    json_schema: JsonSchema | None = None

    def structured(self) -> tuple[StructuredOutputs, str] | None:
        """What is asked for, and the name of the field that asks. ApiError 400 if there are several."""
        whitespace = self.guided_whitespace_pattern
        choice = None if self.guided_choice is None else tuple(self.guided_choice)
        asked = {
            "response_format": _of_format(self.response_format),
            "structured_outputs": self.structured_outputs.asked()
            if self.structured_outputs
            else None,
            "guided_json": _given(json=self.guided_json, whitespace_pattern=whitespace),
            "guided_regex": _given(regex=self.guided_regex),
            "guided_choice": _given(choice=choice),
            "guided_grammar": _given(grammar=self.guided_grammar),
            "grammar": _given(grammar=self.grammar),
            "json_schema": _given(json=self.json_schema),
        }
        given = [(outputs, name) for name, outputs in asked.items() if outputs is not None]
        if len(given) > 1:
            names = " and ".join(f"'{name}'" for _, name in given)
            raise errors.bad_request(f"{names} exclude each other.", given[1][1])
        return given[0] if given else None


def _given(**fields: Any) -> StructuredOutputs | None:
    """None where the first field is."""
    return None if next(iter(fields.values())) is None else StructuredOutputs(**fields)


def _of_format(given: Any) -> StructuredOutputs | None:
    if isinstance(given, JsonObjectFormat):
        return given.asked()
    if isinstance(given, JsonSchemaFormat):
        schema = given.json_schema.json_schema
        return StructuredOutputs(json={} if schema is None else schema)
    if isinstance(given, StructuralTagFormat):
        return StructuredOutputs(structural_tag=given.model_dump(exclude_none=True))
    return None


async def compiled(serving: Serving, asked: StructuredOutputs, param: str) -> StructuredOutputs:
    """The same as llguidance's own form, once the engine has it ready. ApiError 400 says, of `param`, what cannot be
    kept to; 503: too many wait for theirs."""
    if serving.engine.num_compiling >= limits.MAX_COMPILING:
        serving.metrics.rejected("queue_full")
        raise errors.unavailable("Too many grammars are being compiled.", retry_after=1)
    try:
        grammar = to_grammar(asked)
        await serving.engine.compile_grammar(grammar)
    except GrammarError as error:
        raise errors.bad_request(f"Invalid value for '{param}': {error}", param) from None
    except ValueError as error:
        raise errors.bad_request(
            f"'{param}' asks for what cannot be kept to: {error}", param, "unsupported_grammar"
        ) from None
    except EngineDeadError:
        raise errors.engine_dead() from None
    return StructuredOutputs(grammar=grammar)


async def wanted(body: StructuredFields, serving: Serving) -> StructuredOutputs | None:
    """What the answer's text must be, once the engine has it ready. ApiError 400 names the field at fault."""
    given = body.structured()
    return None if given is None else await compiled(serving, *given)
