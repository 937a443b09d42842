"""The kinds of fields that request schemas are made of.

A field whose type is one of the `Only...` aliases is one we do not support, accepted at the value that asks for
nothing, since clients send it.
"""

import re
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from ...engine.sampling_params import MAX_INT
from .. import limits


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
TOKEN_ID, PROMPT_TEXT, CONTENT_PART = "x-token-id", "x-prompt-text", "x-content-part"
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
OnlyEmptyList = Annotated[list[Any], Field(max_length=0)] | None
Ignored = (
    Annotated[str, Field(max_length=1024)] | None
)  # the sender's own label; changes nothing in the answer


class Schema(BaseModel):
    """Strict: no unknown field, no "3" for 3, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
