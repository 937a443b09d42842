"""The request fields that chat and completions share, and how they become SamplingParams.

A field that is not here is refused by name.
"""

from typing import Annotated

from pydantic import Field, model_validator

from ...engine.grammar.structured_outputs import StructuredOutputs
from ...engine.request import (
    MAX_INT,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    ParameterError,
    SamplingParams,
)
from .. import errors, limits
from .fields import (
    INTEGRAL,
    INTEGRALS,
    Count,
    Ignored,
    Int64,
    LogitBias,
    OnlyFalse,
    OnlyZero,
    Penalty,
    Schema,
    StopString,
    TokenId,
    excludes,
)
from .structured import StructuredFields


class StreamOptions(Schema):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM: usage in every chunk
    include_obfuscation: OnlyFalse = None


STREAM_OPTIONS_NEED_STREAM = excludes("stream_options", unless={"stream": True}, type="null")


class SamplingFields(StructuredFields):
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
        structured_outputs: StructuredOutputs | None = None,
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
            structured_outputs=structured_outputs,
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
