"""What a model's raw text means: content, reasoning and calls of tools, as it comes, for every family. No torch."""

from .answer import OutputParser, Parsed, Tool, ToolCallDelta
from .formats import OutputFormat, ReasoningFormat, ToolFormat
from .registry import REASONING_PARSERS, TOOL_PARSERS, formats_of

__all__ = [
    "REASONING_PARSERS", "TOOL_PARSERS", "OutputFormat", "OutputParser", "Parsed", "ReasoningFormat", "Tool",
    "ToolCallDelta", "ToolFormat", "formats_of",
]  # fmt: skip
