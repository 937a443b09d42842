"""The request fields that chat and completions share, and how they become SamplingParams.

A field that is not here is refused by name.
"""

import asyncio
from typing import Annotated, Any

from pydantic import Field, model_validator

from ...engine.grammar.structured_outputs import StructuredOutputs
from ...engine.sampling_params import (
    MAX_INT,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    ParameterError,
    SamplingParams,
)
from ...engine.text.token_sequences import with_token_ids
from .. import errors, limits
from ..serving import Serving
from .fields import (
    INTEGRAL,
    INTEGRALS,
    Count,
    Ignored,
    Int64,
    LogitBias,
    OnlyFalse,
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


Share = Annotated[float, Field(ge=0.0, le=1.0)]
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
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=10.0)] | None = None
    min_tokens: Count | None = None
    allowed_token_ids: (
        Annotated[
            list[TokenId],
            Field(min_length=1, max_length=limits.MAX_ALLOWED_TOKEN_IDS, fail_fast=True),
            INTEGRALS,
        ]
        | None
    ) = None
    bad_words: Annotated[list[StopString], Field(max_length=limits.MAX_BAD_WORDS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_TOKEN_IDS), INTEGRALS] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=limits.MAX_CACHE_SALT_CHARS)] | None = None
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT), INTEGRAL] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS), INTEGRAL] | None = None
    # Keep the prompt's last tokens only: so many, or with -1 as many as there is room for
    truncate_prompt_tokens: (
        Annotated[int, Field(ge=-1, le=MAX_INT, json_schema_extra={"not": {"const": 0}}), INTEGRAL]
        | None
    ) = None
    # What the answer's id ends with
    request_id: (
        Annotated[str, Field(pattern=r"^[!-~]+$", max_length=limits.MAX_REQUEST_ID_CHARS)] | None
    ) = None
    # llama.cpp's
    typical_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_n_sigma: Annotated[float, Field(ge=-1.0, le=100.0)] | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    dry_multiplier: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    dry_base: Annotated[float, Field(ge=1.0, le=100.0)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=-1, le=MAX_INT), INTEGRAL] | None = None
    dry_sequence_breakers: (
        Annotated[list[StopString], Field(max_length=limits.MAX_SEQUENCE_BREAKERS)] | None
    ) = None
    # Not supported
    use_beam_search: OnlyFalse = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise errors.bad_request(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                "stream_options",
            )
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_not_streamed(self) -> "SamplingFields":
        if self.prompt_logprobs is not None and self.stream:
            raise errors.bad_request(
                "'prompt_logprobs' are not available when 'stream' is enabled.", "prompt_logprobs"
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
        structured_outputs: StructuredOutputs | None = None,
    ) -> SamplingParams:
        """The engine's form of these fields. ApiError 400 names the first that is out of range."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name in _SAME_NAME
            if (value := getattr(self, name)) is not None
        }
        if given.get("temperature", 1.0) < MIN_TEMPERATURE:  # clients that may not say 0 send such
            given["temperature"] = 0.0
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        params = SamplingParams(
            **given,
            stop=stop,
            max_tokens=max_tokens,
            logprobs=logprobs,
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
    "prompt_logprobs",
    "priority",
    "typical_p",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
)


async def for_engine(params: SamplingParams, serving: Serving) -> SamplingParams:
    """The same, with what is given as text as tokens; not on the event loop: the first time a vocabulary is read
    through. ApiError 400 for a priority where the server keeps to the order of arrival."""
    if params.priority and not serving.takes_priorities:
        raise errors.bad_request(
            "'priority' needs a server that was started with --scheduling-policy priority.",
            "priority",
            "unsupported_parameter",
        )
    if not (params.bad_words or params.dry_multiplier):
        return params
    return await asyncio.to_thread(with_token_ids, params, serving.tokenizer)


def longest_prompt(limit: int, kept: int | None) -> int:
    """Tokens that a prompt may have before it is cut to `kept`, truncate_prompt_tokens. limit: the context."""
    return limit if kept is None else max(limit, limits.MAX_TOKENIZE_TOKENS)


def shortened(token_ids: list[int], kept: int | None, limit: int, max_tokens: int) -> list[int]:
    """The last of a prompt's tokens that truncate_prompt_tokens keeps; -1: all that leave room for max_tokens in
    `limit`, the context."""
    if kept is None:
        return token_ids
    if kept == 0:
        raise errors.bad_request(
            "truncate_prompt_tokens must be at least 1, or -1 for what there is room for",
            "truncate_prompt_tokens",
        )
    return token_ids[-(kept if kept > 0 else max(1, limit - max_tokens)) :]


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
