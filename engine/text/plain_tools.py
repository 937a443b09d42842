"""Tools for a model whose chat template knows of none: they are told of in words, in the form that Hermes made common.

system      ... # Tools ... <tools>{"type": "function", ...}</tools> ... <tool_call>{"name": ..., "arguments": ...}
assistant   tool_calls become <tool_call> in its text
tool        becomes a user's <tool_response>
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Message = dict[str, Any]

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a JSON object with the function's name and arguments within <tool_call></tool_call> XML \
tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def takes_tools(template: str) -> bool:
    """Whether a chat template tells the model of tools."""
    return "tools" in template


def told_in_words(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], takes_system: bool
) -> list[Message]:
    """A conversation without `tools`, calls and results, and with what they say."""
    told = _in_words(messages)
    if tools:
        text = _INTRODUCTION.format(
            tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        )
        role = "system" if takes_system else "user"
        if told and told[0]["role"] == role:
            told[0] = {**told[0], "content": _introduced(told[0]["content"], text, takes_system)}
        else:
            told.insert(0, {"role": role, "content": text})
    return told


def _introduced(content: Any, text: str, behind: bool) -> Any:
    """Content with the introduction before or behind it."""
    if isinstance(content, list):
        part = {"type": "text", "text": text}
        return [*content, part] if behind else [part, *content]
    return f"{content}\n\n{text}" if behind else f"{text}\n\n{content}"


def _in_words(messages: Sequence[Message]) -> list[Message]:
    """Results that follow each other are one message: many templates want roles to alternate."""
    told: list[Message] = []
    for are_results, group in groupby(messages, lambda message: message["role"] == "tool"):
        if are_results:
            told.append({"role": "user", "content": "\n".join(map(_result, group))})
        else:
            told += map(_with_calls, group)
    return told


def _result(message: Message) -> str:
    return f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"


def _with_calls(message: Message) -> Message:
    content = message.get("content") or ""
    if isinstance(content, list):  # images, which the user alone sends
        return dict(message)
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    return {**kept, "content": "\n".join(filter(None, [content, *calls]))}
