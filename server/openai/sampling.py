"""The request fields that chat and completions share, and how they become SamplingParams.

A field that is not here is refused by name. A field whose type is one of the `Only...` aliases is one we do not
support, accepted at the value that asks for nothing, since clients send it.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...engine.request import ParameterError, SamplingParams
from .. import errors, limits

OnlyNone: TypeAlias = None
OnlyFalse = Literal[False] | None
OnlyZero = Annotated[int, Field(ge=0, le=0)] | None
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


class SamplingFields(Schema):
    model: Annotated[str, Field(max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_N)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=limits.MAX_LOGIT_BIAS)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    user: Ignored = None
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=limits.MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=limits.MAX_CACHE_SALT_CHARS)] | None = None
    # Not supported
    response_format: TextFormat | None = None
    priority: OnlyZero = None
    use_beam_search: OnlyFalse = None

    @field_validator("stop")
    @classmethod
    def _bounded_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > limits.MAX_STOP_STRINGS:
            raise ValueError(f"at most {limits.MAX_STOP_STRINGS} stop strings are allowed")
        if not all(0 < len(text) <= limits.MAX_STOP_CHARS for text in strings):
            raise ValueError(f"a stop string must have 1 to {limits.MAX_STOP_CHARS} characters")
        return stop

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
