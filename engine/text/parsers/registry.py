"""The formats by name, as vLLM spells the names where it has them, and which of them a chat template asks for."""

from functools import partial

from .formats import OutputFormat, ReasoningFormat, ToolFormat
from .harmony import KEPT, harmony_before_content, harmony_rules, read_harmony
from .json_formats import JSON_FORMATS
from .literal_rules import gemma_rules, pythonic_rules
from .literals import FUNCTION_GEMMA, GEMMA, Dialect, gemma_calls, pythonic_calls
from .muse import MUSE_KEPT, muse_before_content, muse_rules, read_muse
from .sections import (
    DEEPSEEK,
    KIMI,
    MISTRAL,
    MISTRAL_ARGUMENTS,
    MISTRAL_ID,
    Sections,
    mistral_call_id,
    mistral_calls,
    mistral_rules,
    section_calls,
    section_rules,
)
from .tags import (
    DEEPSEEK_V4,
    DEEPSEEK_V32,
    GLM45,
    GLM47,
    MINIMAX,
    QWEN,
    SEED,
    Tags,
    tag_calls,
    tag_rules,
)


def _tags(name: str, tags: Tags, *more_marks: str) -> ToolFormat:
    return ToolFormat(
        name,
        partial(tag_calls, tags=tags),
        partial(tag_rules, tags=tags),
        marks=(tags.block, *more_marks),
        inner_marks=(
            tags.block_end,
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "｜DSML｜",
        ),
    )


def _sections(name: str, sections: Sections, fenced: bool = False) -> ToolFormat:
    return ToolFormat(
        name,
        partial(section_calls, sections=sections),
        partial(section_rules, sections=sections, fenced=fenced),
        marks=(sections.block, sections.call),
        inner_marks=(sections.block_end, sections.arguments, sections.call_end),
    )


def _pythonic(
    name: str,
    opening: str = "",
    closing: str = "",
    starts: tuple[str, ...] = (),
    by_line: bool = False,
) -> ToolFormat:
    return ToolFormat(
        name,
        partial(pythonic_calls, end=closing),
        partial(pythonic_rules, opening=opening, closing=closing, by_line=by_line),
        marks=(opening,) if opening else (),
        starts=starts,
        inner_marks=(closing,) if closing else (),
    )


def _gemma(name: str, opening: str, closing: str, dialect: Dialect) -> ToolFormat:
    quote = dialect.quotes[0]
    return ToolFormat(
        name,
        partial(gemma_calls, dialect=dialect, end=closing),
        partial(gemma_rules, opening=opening, closing=closing, quote=quote),
        marks=(opening,),
        inner_marks=(closing, quote),
    )


def _think(name: str, word: str = "think", is_assumed: bool = False) -> ReasoningFormat:
    return ReasoningFormat(name, (f"<{word}>",), (f"</{word}>",), is_assumed=is_assumed)


_QWEN3_CODER = _tags("qwen3_coder", QWEN, QWEN.call)
TOOL_PARSERS = {
    each.name: each
    for each in (
        *JSON_FORMATS,
        _QWEN3_CODER,
        _tags("seed_oss", SEED, SEED.call),
        _tags("minimax_m2", MINIMAX),
        _tags("glm45", GLM45),
        _tags("glm47", GLM47),
        _tags("deepseek_v32", DEEPSEEK_V32),
        _tags("deepseek_v4", DEEPSEEK_V4),
        _sections("deepseek_v3", DEEPSEEK, fenced=True),
        _sections("deepseek_v31", DEEPSEEK),
        _sections("kimi_k2", KIMI),
        _pythonic("pythonic", starts=("[",)),
        _pythonic("llama4_pythonic", "<|python_start|>", "<|python_end|>", starts=("[",)),
        _pythonic("olmo3", "<function_calls>", "</function_calls>", by_line=True),
        _pythonic("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),
        _gemma("gemma4", "<|tool_call>", "<tool_call|>", GEMMA),
        _gemma("functiongemma", "<start_function_call>", "<end_function_call>", FUNCTION_GEMMA),
        ToolFormat("muse_glimmer", None, muse_rules, inner_marks=MUSE_KEPT, read_all=read_muse),
        ToolFormat(
            "mistral",
            mistral_calls,
            mistral_rules,
            marks=(MISTRAL,),
            inner_marks=(MISTRAL_ARGUMENTS, MISTRAL_ID),
            new_call_id=mistral_call_id,
        ),
        ToolFormat("openai", None, harmony_rules, inner_marks=KEPT, read_all=read_harmony),
    )
}
TOOL_PARSERS |= {
    "qwen3_xml": _QWEN3_CODER,
    "granite4": TOOL_PARSERS["hermes"],
    "llama4_json": TOOL_PARSERS["llama3_json"],
}

REASONING_PARSERS = {
    each.name: each
    for each in (
        *map(_think, ("qwen3", "glm45", "deepseek_v3", "nemotron_v3", "kimi_k2", "minimax_m2")),
        _think("deepseek_r1", is_assumed=True),
        _think("seed_oss", "seed:think"),
        ReasoningFormat("mistral", ("[THINK]",), ("[/THINK]",), is_anywhere=True),
        ReasoningFormat(
            "gemma4",
            ("<|channel>thought",),
            ("<channel|>",),
            tokens=("<|channel>",),
            is_anywhere=True,
        ),
        ReasoningFormat(
            "granite",
            ("<think>", "Here is my thought process:", "Here's my thought process:"),
            ("</think>", "Here is my response:", "Here's my response:"),
            ignored=("<response>", "</response>"),
        ),
        ReasoningFormat(
            "muse_glimmer",
            (),
            (),
            tokens=MUSE_KEPT,
            read_all=read_muse,
            before_content=muse_before_content,
        ),
        ReasoningFormat(
            "openai_gptoss",
            (),
            (),
            tokens=KEPT,
            read_all=read_harmony,
            before_content=harmony_before_content,
        ),
    )
}

_Signs = tuple[tuple[str | None, tuple[str, ...]], ...]
# The first that a template has all of says how it calls tools. Some marks are parts of others, so order matters.
_TOOL_SIGNS: _Signs = (
    ("muse_glimmer", ("<atem:function_calls>",)),
    (None, ("]<]minimax[>[",)),  # MiniMax M3's tags, which only begin like others
    ("openai", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("glm47", ("{function-name}<arg_key>",)),
    ("glm45", ("<arg_key>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("deepseek_v4", ("｜DSML｜", "tool_calls>")),
    ("deepseek_v32", ("｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("nemotron_json", ("<TOOLCALL>",)),
    ("apriel", ("<tool_calls>",)),
    ("olmo3", ("<function_calls>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("List of tools: ",)),
    ("phi4_mini_json", ("<|/tool_call|>",)),
    ("phi4_mini_json", ("functools[",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters": ')),
    ("json", ("tools", "tool_calls")),
)
_REASONING_SIGNS: _Signs = (
    ("muse_glimmer", ("<atem:function_calls>",)),
    ("openai_gptoss", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|channel>",)),
    ("mistral", ("[THINK]",)),
    ("seed_oss", ("<seed:think>",)),
    ("granite", ("<think>", "<response></response>")),
    ("glm45", ("<think>", "<arg_key>")),
    ("deepseek_v3", ("</think>", "<｜Assistant｜>", "thinking is")),
    ("deepseek_r1", ("</think>", "<｜Assistant｜>")),
    ("kimi_k2", ("<think>", "<|tool_calls_section_begin|>")),
    ("minimax_m2", ("<think>", "<minimax:tool_call>")),
    ("qwen3", ("<think>",)),
    ("qwen3", ("</think>",)),
)


def formats_of(template: str) -> OutputFormat:
    """How the models of a chat template call tools and think, as far as it says so."""
    tool = _first(_TOOL_SIGNS, template)
    reasoning = _first(_REASONING_SIGNS, template)
    return OutputFormat(
        TOOL_PARSERS[tool] if tool else None, REASONING_PARSERS[reasoning] if reasoning else None
    )


def _first(signs: _Signs, template: str) -> str | None:
    return next((name for name, wanted in signs if all(sign in template for sign in wanted)), None)
