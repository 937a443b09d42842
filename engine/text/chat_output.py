"""ChatOutput: what the answers of one model may hold besides text, by what its chat template says.

template ---> formats of calls and of reasoning, which parse answers and hold them to calls
         `--> whether it tells of tools itself; if not, plain_tools.py does, in words
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from .content import ContentForm
from .parsers import REASONING_PARSERS, TOOL_PARSERS, OutputFormat, Tool, formats_of
from .plain_tools import takes_tools, told_in_words
from .tokenizer import Tokenizer

_TOLD_IN_WORDS = "hermes"  # the form that plain_tools.py asks for
_TAIL_TOKENS = 64


class ChatOutput:
    """Of one checkpoint's tokenizer and chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ):
        """The parsers by name, where the template should not decide. UserError for a name that there is not."""
        template = tokenizer.chat_template
        self._tokenizer = tokenizer
        self._takes_tools = takes_tools(template)
        self._takes_system = "system" in template
        self._form = ContentForm(template)
        found = formats_of(template)
        tool = found.tool if self._takes_tools else TOOL_PARSERS[_TOLD_IN_WORDS]
        if tool_parser is not None:
            tool = _named(TOOL_PARSERS, tool_parser, "--tool-call-parser")
        reasoning = found.reasoning
        if reasoning_parser is not None:
            reasoning = _named(REASONING_PARSERS, reasoning_parser, "--reasoning-parser")
        self._with_tools = OutputFormat(tool, reasoning)
        self._without = OutputFormat(None, reasoning)

    @property
    def thinks(self) -> bool:
        """Whether its answers may hold reasoning."""
        return self._without.reasoning is not None

    def format_of(self, with_tools: bool) -> OutputFormat | None:
        """What an answer is parsed with; None where all of it is content."""
        if with_tools:
            return self._with_tools
        return self._without if self.thinks else None

    def kept_ids(self, form: OutputFormat) -> frozenset[int]:
        """The control tokens that must stay in the text for a format's parser to see them."""
        ids = self._tokenizer.special_token_ids
        return frozenset(ids[token] for token in form.kept_tokens if token in ids)

    def conversation(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the template takes them. ValueError, fit for the client to read, for images that it has
        no place for."""
        if self._takes_tools:
            return self._form.of(messages), list(tools) or None
        return self._form.of(told_in_words(messages, tools, self._takes_system)), None

    def tail(self, prompt_token_ids: Sequence[int]) -> str:
        """The end of a prompt, which says whether its answer begins within reasoning."""
        return self._tokenizer.decode(prompt_token_ids[-_TAIL_TOKENS:], skip_special_tokens=False)

    def calls_grammar(
        self, tools: Sequence[Mapping[str, Any]], named: str | None, parallel: bool, tail: str
    ) -> str:
        """Lark, of answers that call: at least one of the tools, or the named one once. ValueError, fit for the client
        to read, for a schema that the model's way of writing calls cannot keep to."""
        return self._with_tools.grammar(
            [Tool.of(tool) for tool in tools],
            named=named,
            parallel=parallel,
            special_tokens=self._tokenizer.special_token_ids,
            prompt_tail=tail,
        )

    def reasoning_grammar(self, tail: str) -> str | None:
        """Lark, of what comes before the answer proper; None where nothing does."""
        return self._without.reasoning_grammar(self._tokenizer.special_token_ids, tail)


def _named(parsers: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in parsers:
        raise UserError(f"{option} {name!r} is unknown; use one of {', '.join(sorted(parsers))}")
    return parsers[name]
