"""POST /generate, /generate_stream and /: their bodies, and the completion request that each comes to.

    inputs, parameters {max_new_tokens, do_sample, temperature, ..., grammar}     ->  CompletionRequest

Where no field asks for sampling the answer is greedy, as TGI has it. Format: TGI's openapi.json, GenerateParameters.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from ...engine.sampling_params import MAX_INT
from .. import errors, limits
from ..openai.completions import CompletionRequest
from ..openai.fields import INTEGRAL, PROMPT_TEXT, OnlyFalse, OnlyNone, Schema, StopString

Text = Annotated[str, Field(min_length=1, json_schema_extra={PROMPT_TEXT: True})]
Whole = Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL]
DEFAULT_MAX_NEW_TOKENS = 100
_SAME = ("temperature", "top_p", "top_k", "typical_p", "repetition_penalty", "frequency_penalty")


class JsonGrammar(Schema):
    type: Literal["json"]
    value: dict[str, Any] | str


class RegexGrammar(Schema):
    type: Literal["regex"]
    value: str


class NamedSchema(Schema):
    name: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaGrammar(Schema):
    type: Literal["json_schema"]
    value: NamedSchema


Grammar = Annotated[JsonGrammar | RegexGrammar | JsonSchemaGrammar, Field(discriminator="type")]


class GenerateParameters(Schema):
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    top_k: Whole | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    typical_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1), INTEGRAL] | None = None
    stop: Annotated[list[StopString], Field(max_length=limits.MAX_STOP_STRINGS)] | None = None
    truncate: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    best_of: Annotated[int, Field(ge=1, le=limits.MAX_N), INTEGRAL] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS), INTEGRAL] | None = None
    grammar: Grammar | None = None
    watermark: OnlyFalse = None
    adapter_id: OnlyNone = None

    @property
    def samples(self) -> bool:
        """Whether one of the fields asks for it."""
        warm = self.temperature not in (None, 1.0)
        cuts = (self.top_p or 1.0) < 1.0 or (self.typical_p or 1.0) < 1.0
        return bool(self.do_sample or warm or self.top_k or cuts)

    def structured(self) -> dict[str, Any]:
        """The completion's fields that hold the answer to the grammar."""
        grammar = self.grammar
        if grammar is None:
            return {}
        if isinstance(grammar, RegexGrammar):
            return {"guided_regex": grammar.value}
        schema = grammar.value
        return {"guided_json": schema.json_schema if isinstance(schema, NamedSchema) else schema}


_ONE_SAMPLE: dict[str, Any] = {
    "properties": {"parameters": {"properties": {"best_of": {"enum": [None, 1]}}}}
}
_NOT_STREAMED: dict[str, Any] = {"properties": {"stream": {"enum": [False, None]}}}


class GenerateRequest(Schema):
    inputs: Text
    parameters: GenerateParameters = GenerateParameters()
    stream: bool | None = None  # of POST / alone

    def completion(self, model: str, stream: bool) -> CompletionRequest:
        """The completion request that it comes to. ApiError 400 if that is none."""
        asked = self.parameters
        wants_prompt = asked.decoder_input_details and not stream
        fields = {name: getattr(asked, name) for name in _SAME} | {
            "model": model,
            "prompt": self.inputs,
            "stream": stream,
            "max_tokens": asked.max_new_tokens,
            "seed": None if asked.seed is None else asked.seed & (2**63 - 1),
            "stop": asked.stop,
            "truncate_prompt_tokens": asked.truncate,
            "best_of": asked.best_of,
            "logprobs": asked.top_n_tokens or 0,
            "prompt_logprobs": 0 if wants_prompt else None,
        }
        if not asked.samples:
            fields["temperature"] = 0.0
        try:
            return CompletionRequest.model_validate(fields | asked.structured())
        except ValidationError as error:
            raise errors.from_validation(error) from None


class StreamedRequest(GenerateRequest):
    """Of POST /generate_stream."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_ONE_SAMPLE]})


class EitherRequest(GenerateRequest):
    """Of POST /."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_ONE_SAMPLE, _NOT_STREAMED]})
