"""What a model's raw text means: content, reasoning and calls of tools, as it comes, for every family.

    answer_format = formats_of(chat_template)                     # or OutputFormat(TOOL_PARSERS[...], ...)
    parser = answer_format.parser(tools, prompt_tail)             # one an answer
    parser.push(text) -> Parsed(content, reasoning, tool_calls)   # news, as early as they are certain
    parser.finish() -> Parsed                                     # the rest
    answer_format.kept_tokens                                     # control tokens that the text must keep
    answer_format.grammar(tools, ...)                             # holds the model to calls that are valid

Neither torch nor a tokenizer is needed.
"""

from .answer import OutputParser, Parsed, Tool, ToolCallDelta
from .formats import OutputFormat, ReasoningFormat, ToolFormat
from .registry import REASONING_PARSERS, TOOL_PARSERS, formats_of

__all__ = [
    "REASONING_PARSERS", "TOOL_PARSERS", "OutputFormat", "OutputParser", "Parsed", "ReasoningFormat", "Tool",
    "ToolCallDelta", "ToolFormat", "formats_of",
]  # fmt: skip
