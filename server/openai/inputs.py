"""What several endpoints take alike: a text, token ids, or several of either."""

from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field

from .fields import INTEGRALS, PROMPT_TEXT, TokenId


def _kind(given: Any) -> str | None:
    """Which of the four it is, by its first item: trying each in turn would take as many times as long."""
    if isinstance(given, str):
        return "str"
    if not isinstance(given, list):
        return None
    first = given[0] if given else ""
    if isinstance(first, str):
        return "list[str]"
    return "list[list[int]]" if isinstance(first, list) else "list[int]"


# Of many items one wrong one is told: a million would take seconds.
SOME = Field(min_length=1, fail_fast=True)
Text = Annotated[str, Field(json_schema_extra={PROMPT_TEXT: True})]
Ids = Annotated[list[TokenId], SOME, INTEGRALS]
BY_KIND = Discriminator(  # between members tagged "str", "list[str]", "list[int]" and "list[list[int]]"
    _kind,
    custom_error_type="prompt_type",
    custom_error_message="Input should be a text, a list of texts, token ids, or a list of lists of token ids",
)
Listed: TypeAlias = list[str] | list[list[int]]


def listed(given: str | list[str] | list[int] | list[list[int]]) -> Listed:
    """As a list of texts or of token id lists, never empty."""
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else given
