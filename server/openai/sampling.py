"""The request fields that chat and completions share, and how they become SamplingParams.

A field that is not here is refused by name. A field whose type is one of the `Only...` aliases is one we do not
support, accepted at the value that asks for nothing, since clients send it.
"""

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ...engine.request import (
    MAX_INT,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    ParameterError,
    SamplingParams,
)
from .. import errors, limits


def _integral(value: Any) -> Any:
    """JSON does not tell 3.0 from 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integrals(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """The same for a long list, in which they are rare."""
    try:
        return check(value)
    except ValidationError:
        if not (isinstance(value, list) and any(isinstance(item, float) for item in value)):
            raise
        return check([_integral(item) for item in value])


def _decimal(key: Any) -> Any:
    """ "07" and "7" would be one key of two."""
    if not isinstance(key, str):
        return key
    if not re.fullmatch("0|[1-9][0-9]{0,9}", key):
        raise ValueError("a token id in decimal is wanted")
    return int(key)


def _no(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


def excludes(field: str, *, unless: dict[str, Any], **allowed: Any) -> dict[str, Any]:
    """JSON schema: `field` is absent or `allowed`, unless these other fields have these values."""
    others = {name: {"const": value} for name, value in unless.items()}
    return {
        "anyOf": [
            {"properties": {field: allowed}},
            {"properties": others, "required": list(others)},
        ]
    }


NOT_BOTH_ENDS: dict[str, Any] = {
    "anyOf": [
        {"properties": {field: {"enum": [False, None]}}}
        for field in ("continue_final_message", "add_generation_prompt")
    ]
}
INTEGRAL = BeforeValidator(_integral)
Count = Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), INTEGRAL]
# What depends on the model is checked where that is known, and openapi.describe finds it by these marks.
TOKEN_ID, PROMPT_TEXT = "x-token-id", "x-prompt-text"
TokenId = Annotated[int, Field(ge=0, le=MAX_INT, json_schema_extra={TOKEN_ID: True})]
INTEGRALS = WrapValidator(_integrals)
TokenIds = Annotated[list[TokenId], INTEGRALS]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARS)]
LogitBias = Annotated[
    dict[
        Annotated[TokenId, BeforeValidator(_decimal)],
        Annotated[float, Field(ge=-100.0, le=100.0)],
    ],
    Field(
        max_length=limits.MAX_LOGIT_BIAS,
        json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$", TOKEN_ID: True}},
    ),
]
OnlyNone: TypeAlias = None
# Not Literal[False], which 0 passes for.
OnlyFalse = Annotated[bool, AfterValidator(_no), Field(json_schema_extra={"const": False})] | None
OnlyZero = Annotated[int, Field(ge=0, le=0), INTEGRAL] | None
OnlyEmptyList = Annotated[list[Any], Field(max_length=0)] | None
Ignored = (
    Annotated[str, Field(max_length=1024)] | None
)  # the sender's own label; changes nothing in the answer


class Schema(BaseModel):
    """Strict: no unknown field, no "3" for 3, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Schema):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM: usage in every chunk
    include_obfuscation: OnlyFalse = None


class TextFormat(Schema):
    type: Literal["text"]


STREAM_OPTIONS_NEED_STREAM = excludes("stream_options", unless={"stream": True}, type="null")


class SamplingFields(Schema):
    model: Annotated[str, Field(max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_N), INTEGRAL] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Int64 | None = None
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=limits.MAX_STOP_STRINGS)] | None
    ) = None
    user: Ignored = None
    # vLLM's extras
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT), INTEGRAL] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=10.0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_TOKEN_IDS), INTEGRALS] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=limits.MAX_CACHE_SALT_CHARS)] | None = None
    # Not supported
    response_format: TextFormat | None = None
    priority: OnlyZero = None
    use_beam_search: OnlyFalse = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise errors.bad_request(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                "stream_options",
            )
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def sampling_params(
        self,
        vocab_size: int,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's form of these fields. ApiError 400 names the first that is out of range."""
        given = {
            name: getattr(self, name) for name in _SAME_NAME if getattr(self, name) is not None
        }
        if given.get("temperature", 1.0) < MIN_TEMPERATURE:  # clients that may not say 0 send such
            given["temperature"] = 0.0
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        params = SamplingParams(
            **given,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        try:
            params.verify(vocab_size)
        except ParameterError as error:
            raise errors.bad_request(str(error), param=error.field) from None
        return params


_SAME_NAME = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


def completion_room(
    limit: int, prompt_tokens: int, max_tokens: int | None, default: int | None, param: str
) -> int:
    """How many tokens to generate: `max_tokens`, or `default`, or all that the context has room for.

    ApiError 400 context_length_exceeded if prompt and max_tokens together are longer than `limit`, the context.
    """
    room = limit - prompt_tokens
    if room < (max_tokens or 1):
        raise errors.context_length_exceeded(limit, prompt_tokens, max_tokens or 1, param)
    if max_tokens is not None:
        return max_tokens
    return min(room, default) if default is not None else room


def check_size(sequences: int, max_tokens: int, param: str = "n") -> None:
    """Bound what one request may cost in all."""
    if sequences > limits.MAX_SEQUENCES:
        raise errors.bad_request(
            f"prompts x n must be at most {limits.MAX_SEQUENCES}, got {sequences}", param
        )
    if sequences * max_tokens > limits.MAX_REQUEST_TOKENS and sequences > 1:
        raise errors.bad_request(
            f"prompts x n x max_tokens must be at most {limits.MAX_REQUEST_TOKENS}, got {sequences * max_tokens}; "
            "give a smaller max_tokens",
            "max_tokens",
        )
