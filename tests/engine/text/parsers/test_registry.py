"""Which format a chat template asks for; and what it makes of a call is what the parser makes a call of again."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nibble.engine.text.chat_template import render
from nibble.engine.text.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputFormat,
    Tool,
    formats_of,
)

from .corpus import FILE, ROME, THOUGHT, TIME, TOOLS
from .said import Said, output_format, said, values

DATA = Path(__file__).parent / "data"


class Family(NamedTuple):
    """What is known of a template: its formats, and what ends a turn."""

    tool: str
    reasoning: str | None
    end: str
    variables: dict[str, Any] = {}
    is_single: bool = False  # one call a message


FAMILIES = {
    "deepseek_v3": Family("deepseek_v3", "deepseek_r1", "<｜end▁of▁sentence｜>"),
    "deepseek_v31": Family("deepseek_v31", "deepseek_v3", "<｜end▁of▁sentence｜>"),
    "deepseek_v32": Family("deepseek_v32", "deepseek_v3", "<｜end▁of▁sentence｜>"),
    "gemma4": Family("gemma4", "gemma4", "<|tool_response>"),
    "glm45": Family("glm45", "glm45", "<|observation|>"),
    "glm47": Family("glm47", "glm45", "<|observation|>"),
    "gpt_oss": Family("openai", "openai_gptoss", "<|call|>", is_single=True),
    "granite4": Family("hermes", None, "<|end_of_text|>\n"),
    "kimi_k2": Family("kimi_k2", None, "<|im_end|>"),
    "lfm2": Family("lfm2", None, "<|im_end|>\n"),
    "llama3": Family("llama3_json", None, "<|eot_id|>", is_single=True),
    "minimax_m2": Family("minimax_m2", "minimax_m2", "[e~["),
    "ministral": Family("mistral", "mistral", "</s>", {"eos_token": "</s>"}),
    "mistral_nemo": Family("mistral", None, "</s>", {"eos_token": "</s>"}),
    "nemotron_nano": Family("nemotron_json", "qwen3", "\n<SPECIAL_12>\n"),
    "phi4_mini": Family("phi4_mini_json", None, "<|end|>"),
    "qwen3": Family("hermes", "qwen3", "<|im_end|>\n"),
    "qwen3_5": Family("qwen3_coder", "qwen3", "<|im_end|>\n"),
    "qwen3_coder": Family("qwen3_coder", None, "<|im_end|>\n"),
    "seed_oss": Family(
        "seed_oss", "seed_oss", "<seed:eos>", {"bos_token": "<seed:bos>", "eos_token": "<seed:eos>"}
    ),
}
# whose excerpts, or templates, write no content beside calls
WITHOUT_CONTENT = {
    "deepseek_v3", "deepseek_v32", "gemma4", "gpt_oss", "llama3", "mistral_nemo", "nemotron_nano", "seed_oss"
}  # fmt: skip
OPENAI_TOOLS = [
    {"type": "function", "function": {"name": t.name, "parameters": t.parameters}} for t in TOOLS
]


def test_every_template_is_known() -> None:
    assert {file.stem for file in DATA.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_says_how_its_model_calls(name: str) -> None:
    family = FAMILIES[name]
    found = formats_of(_template(name))
    assert found == output_format(family.tool, family.reasoning)


@pytest.mark.parametrize("content", ["", "Let me look: {}"])
@pytest.mark.parametrize("name", FAMILIES)
def test_calls_survive_the_way_through_a_template(name: str, content: str) -> None:
    family = FAMILIES[name]
    calls = [ROME] if family.is_single else [ROME, FILE, TIME]
    assistant = {
        "role": "assistant",
        "content": content,
        "reasoning_content": THOUGHT,
        "tool_calls": [
            {
                "type": "function",
                "id": f"9Ae3bDc2{i}",
                "function": {"name": tool, "arguments": arguments},
            }
            for i, (tool, arguments) in enumerate(calls)
        ],
    }
    found = _round_trip(name, assistant)
    assert values(found) == calls
    assert found.reasoning == (THOUGHT if family.reasoning and "deepseek" not in name else "")
    assert found.content.strip() == ("" if name in WITHOUT_CONTENT else content)


def _round_trip(name: str, assistant: dict[str, Any]) -> Said:
    family = FAMILIES[name]
    template = _template(name)
    asked = [{"role": "user", "content": "What is the weather?"}]
    prompt = render(template, asked, tools=OPENAI_TOOLS, variables=family.variables)
    whole = render(
        template,
        [*asked, assistant],
        tools=OPENAI_TOOLS,
        add_generation_prompt=False,
        variables=family.variables,
    )
    assert whole.startswith(prompt)
    written = whole[len(prompt) :].removesuffix(family.end)
    return said(formats_of(template).parser(TOOLS, prompt[-200:]), [written])


def _template(name: str) -> str:
    return (DATA / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("said_there", "tool", "reasoning"),
    [
        ("{{ messages }}", None, None),
        ("{{ tools }}{{ message.tool_calls }}", "json", None),
        ("{{ '<start_function_call>' }}", "functiongemma", None),
        ("{{ '<|tool_call|>' }}<think></think> <response></response>", "granite", "granite"),
        ("functools[{{ tools }}]", "phi4_mini_json", None),
        (
            "<｜DSML｜tool_calls>{{ '</think>' }}<｜Assistant｜>{% if not thinking is defined %}",
            "deepseek_v4",
            "deepseek_v3",
        ),
        ("<function_calls></function_calls>", "olmo3", None),
        ("<|python_start|>{{ '<|python_end|>' }}", "llama4_pythonic", None),
        ("<tool_calls>[]</tool_calls>", "apriel", None),
        ("<tool_call>{{ '</think>' }}", "hermes", "qwen3"),
        ("]<]minimax[>[<tool_call>", None, None),
    ],
)
def test_signs_of_formats(said_there: str, tool: str | None, reasoning: str | None) -> None:
    assert formats_of(said_there) == output_format(tool, reasoning)


def test_names_are_vllms() -> None:
    assert {
        "hermes",
        "qwen3_coder",
        "qwen3_xml",
        "llama3_json",
        "llama4_json",
        "granite4",
        "openai",
    } <= set(TOOL_PARSERS)
    assert {"qwen3", "deepseek_r1", "openai_gptoss", "mistral"} <= set(REASONING_PARSERS)
    aliases = {"qwen3_xml": "qwen3_coder", "granite4": "hermes", "llama4_json": "llama3_json"}
    for name, tool_format in TOOL_PARSERS.items():
        assert tool_format.name == aliases.get(name, name)
    for name, reasoning_format in REASONING_PARSERS.items():
        assert reasoning_format.name == name


def test_control_tokens_that_must_stay() -> None:
    kept = output_format("mistral", "mistral").kept_tokens
    assert kept == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"}
    assert output_format("openai", "openai_gptoss").kept_tokens == {
        "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
    }  # fmt: skip
    assert {"<|channel>", '<|"|>', "<|tool_call>"} <= output_format("gemma4", "gemma4").kept_tokens
    assert OutputFormat().kept_tokens == frozenset()


def test_tools_are_read_as_openai_writes_them() -> None:
    function = {"name": "f", "description": "x", "parameters": {"type": "object"}}
    assert Tool.of({"type": "function", "function": function}) == Tool("f", {"type": "object"})
    assert Tool.of({"name": "f"}) == Tool("f", {})
