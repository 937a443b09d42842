"""Answers as models write them, per format, and what they mean.

Their forms are those of these chat templates (most as llama.cpp's models/templates has them) and pages:

    hermes, qwen3           Qwen/Qwen3-0.6B, NousResearch/Hermes-3-Llama-3.1-8B
    qwen3_coder             Qwen/Qwen3-Coder-30B-A3B-Instruct, Qwen/Qwen3.5-4B
    llama3_json             meta-llama/Llama-3.2-3B-Instruct, Llama-3.1-8B-Instruct
    mistral                 mistralai/Mistral-Nemo-Instruct-2407, Mistral-Small-3.2-24B, Ministral-3-14B-Reasoning-2512
    openai                  openai/gpt-oss-120b
    glm45, glm47            zai-org/GLM-4.6, GLM-4.7-Flash
    deepseek_v3, v31, v32, v4    llama-cpp-deepseek-r1.jinja; deepseek-ai/DeepSeek-V3.1, V3.2, V4
    kimi_k2                 moonshotai/Kimi-K2-Instruct
    lfm2                    LiquidAI/LFM2.5-8B-A1B; vLLM's parser of that name
    pythonic, llama4_pythonic    vLLM's tests of the parsers of these names
    gemma4                  google/gemma-4-31B-it
    phi4_mini_json          llama-cpp-microsoft-Phi-4-mini-instruct.jinja; llguidance, docs/toolcalls.md
    granite                 ibm-granite/granite-3.3-2b-instruct; vLLM's parsers of that name
    muse_glimmer            muse-glimmer.jinja; llama.cpp, tests/test-chat.cpp
    seed_oss, minimax_m2, nemotron_json, apriel    Seed-OSS, MiniMax-M2, NVIDIA-Nemotron-Nano-v2, Apriel-1.5
    functiongemma, olmo3    public descriptions of these models' output

Everything else about an answer, such as what it calls, is made up here.
"""

from typing import Any, NamedTuple

from nibble.engine.text.parsers import Tool

TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "metric": {"type": "boolean"},
            },
            "required": ["city"],
        },
    ),
    Tool(
        "write_file",
        {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "content": {"type": "string"},
                "lines": {"type": "array", "items": {"type": "integer"}},
                "options": {
                    "type": "object",
                    "properties": {"mode": {"type": "string"}},
                    "required": ["mode"],
                },
            },
            "required": ["path", "content"],
        },
    ),
    Tool("get_time"),
]


class Case(NamedTuple):
    """One answer. `strict`: a grammar of its format allows it, as it is."""

    name: str
    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    content: str = ""
    thought: str = ""
    tool: str | None = None
    reasoning: str | None = None
    tail: str = ""
    strict: bool = False


PARIS = ("get_weather", {"city": "Paris"})
ROME = ("get_weather", {"city": "Rome", "days": 3, "metric": True})
TIME = ("get_time", {})
CODE = 'if a < b and "x" in s:\n    print("</tool_call>\\t", {})\n'
FILE = (
    "write_file",
    {"path": "a/b.py", "content": CODE, "lines": [1, 2], "options": {"mode": "w"}},
)
FILE_JSON = (
    r'{"path": "a/b.py", "content": "if a < b and \"x\" in s:\n    print(\"</tool_call>\\t\", {})\n", '
    r'"lines": [1, 2], "options": {"mode": "w"}}'
)
PARIS_JSON, ROME_JSON = '{"city": "Paris"}', '{"city": "Rome", "days": 3, "metric": true}'
THOUGHT = "The user wants the weather.\nI need a tool: <b>one</b>."
THINK = f"<think>\n{THOUGHT}\n</think>\n\n"


def _hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls
    )


JSON_CASES = [
    Case("one", _hermes(("get_weather", PARIS_JSON)), (PARIS,), tool="hermes", strict=True),
    Case(
        "parallel",
        _hermes(("get_weather", PARIS_JSON), ("get_weather", ROME_JSON), ("get_time", "{}")),
        (PARIS, ROME, TIME),
        tool="hermes",
        strict=True,
    ),
    Case(
        "marks in strings", _hermes(("write_file", FILE_JSON)), (FILE,), tool="hermes", strict=True
    ),
    Case(
        "text around",
        "Let me look.\n\n"
        + _hermes(("get_weather", PARIS_JSON))
        + "\nand\n"
        + _hermes(("get_time", "{}"))
        + "\nDone.",
        (PARIS, TIME),
        "Let me look.\n\nand\nDone.",
        tool="hermes",
    ),
    Case(
        "thinking",
        THINK + _hermes(("get_weather", PARIS_JSON)),
        (PARIS,),
        thought=THOUGHT,
        tool="hermes",
        reasoning="qwen3",
        strict=True,
    ),
    Case(
        "thinking opened by the prompt",
        THINK.removeprefix("<think>\n") + "Look:\n\n" + _hermes(("get_weather", PARIS_JSON)),
        (PARIS,),
        "Look:",
        THOUGHT,
        tool="hermes",
        reasoning="qwen3",
        tail="<|im_start|>assistant\n<think>\n",
    ),
    Case(
        "arguments first, in a string, without spaces",
        '<tool_call>{"arguments":"{\\"city\\":\\"Par\\u0069s\\"}","id":7,"name":"get_weather"}</tool_call>',
        (PARIS,),
        tool="hermes",
    ),
    Case(
        "a bracket too many, one too few",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}\n</tool_call>',
        (PARIS, TIME),
        tool="hermes",
    ),
    Case("no end", '<tool_call>\n{"name": "get_time", "arguments": {}}', (TIME,), tool="hermes"),
    Case("no arguments", '<tool_call>\n{"name": "get_time"}\n</tool_call>', (TIME,), tool="hermes"),
    Case(
        "a list",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time", "arguments": {}}]',
        (PARIS, TIME),
        tool="granite",
        strict=True,
    ),
    Case(
        "a list in tags",
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>',
        (PARIS,),
        tool="granite",
    ),
    Case(
        "thinking, then a response",
        f"<think>{THOUGHT}</think>\n<response>It is sunny.</response>",
        (),
        "It is sunny.",
        THOUGHT,
        tool="granite",
        reasoning="granite",
    ),
    Case(
        "thinking in words",
        f"Here is my thought process:\n{THOUGHT}\nHere is my response:\n\nSunny.",
        (),
        "Sunny.",
        THOUGHT,
        reasoning="granite",
    ),
    Case(
        "between marks",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time", "arguments": {}}]'
        "<|/tool_call|>",
        (PARIS, TIME),
        tool="phi4_mini_json",
        strict=True,
    ),
    Case(
        "functools",
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        (PARIS,),
        tool="phi4_mini_json",
    ),
    Case(
        "a list after thinking",
        f'<think>\n{THOUGHT}\n</think>\n\n<TOOLCALL>[{{"name": "get_weather", "arguments": {PARIS_JSON}}}]</TOOLCALL>',
        (PARIS,),
        thought=THOUGHT,
        tool="nemotron_json",
        reasoning="nemotron_v3",
        strict=True,
    ),
    Case(
        "after thoughts",
        'I shall.\n\n<tool_calls>[{"name": "get_time", "arguments": {}}]</tool_calls>',
        (TIME,),
        "I shall.",
        tool="apriel",
    ),
    Case(
        "one",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        (PARIS,),
        tool="llama3_json",
        strict=True,
    ),
    Case(
        "several",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_time", "parameters": {}}',
        (PARIS, TIME),
        tool="llama3_json",
        strict=True,
    ),
    Case(
        "after the mark for code",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        (PARIS,),
        tool="llama3_json",
    ),
    Case(
        "an answer in JSON",
        '{"city": {"name": "Paris"}}',
        (),
        '{"city": {"name": "Paris"}}',
        tool="llama3_json",
    ),
    Case(
        "a list",
        '\n[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time", "arguments": {}}]\n',
        (PARIS, TIME),
        tool="json",
    ),
    Case(
        "an object",
        f'{{"name": "write_file", "parameters": {FILE_JSON}}}',
        (FILE,),
        tool="json",
    ),
    Case("another list", '["Paris", {"name": "x"}]', (), '["Paris", {"name": "x"}]', tool="json"),
]

_QWEN_FILE = (
    "<tool_call>\n<function=write_file>\n<parameter=path>\na/b.py\n</parameter>\n"
    f"<parameter=content>\n{CODE}\n</parameter>\n<parameter=lines>\n[1, 2]\n</parameter>\n"
    '<parameter=options>\n{"mode": "w"}\n</parameter>\n</function>\n</tool_call>'
)
_QWEN_ROME = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=metric>\ntrue\n</parameter>\n</function>\n</tool_call>"
)
_GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n<arg_key>metric</arg_key>\n<arg_value>true</arg_value>\n</tool_call>"
)
_DSML = (
    '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="metric" string="false">true</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
_DSML_TIME = '<｜DSML｜invoke name="get_time">\n</｜DSML｜invoke>\n'

TAG_CASES = [
    Case("several", f"{_QWEN_ROME}\n{_QWEN_FILE}", (ROME, FILE), tool="qwen3_coder", strict=True),
    Case(
        "nothing to say",
        "<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
        (TIME,),
        tool="qwen3_coder",
        strict=True,
    ),
    Case(
        "text before",
        f"I'll look.\n\n{_QWEN_ROME}",
        (ROME,),
        "I'll look.",
        tool="qwen3_coder",
    ),
    Case(
        "thinking opened by the prompt",
        f"{THOUGHT}\n</think>\n\n{_QWEN_ROME}",
        (ROME,),
        thought=THOUGHT,
        tool="qwen3_coder",
        reasoning="qwen3",
        tail="<|im_start|>assistant\n<think>\n",
        strict=True,
    ),
    Case(
        "thinking that the call ends",
        f"{THOUGHT}\n\n{_QWEN_ROME}",
        (ROME,),
        thought=THOUGHT,
        tool="qwen3_coder",
        reasoning="qwen3",
        tail="<|im_start|>assistant\n<think>\n",
    ),
    Case(
        "the block's tag left out",
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        (PARIS,),
        tool="qwen3_coder",
    ),
    Case(
        "values on the line of their tags",
        "<tool_call><function=get_weather><parameter=city>Rome</parameter><parameter=days>3</parameter>"
        "<parameter=metric>True</parameter></function></tool_call>",
        (ROME,),
        tool="qwen3_coder",
    ),
    Case(
        "one",
        "<seed:think>\nHm.\n</seed:think>\n<seed:tool_call>\n<function=get_weather>\n"
        "<parameter=city>Paris</parameter>\n"
        "</function>\n</seed:tool_call>",
        (PARIS,),
        thought="Hm.",
        tool="seed_oss",
        reasoning="seed_oss",
        strict=True,
    ),
    Case(
        "a block of two",
        "<think>\nHm.\n</think>\n\n"
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n'
        '<invoke name="get_time">\n</invoke>\n</minimax:tool_call>',
        (PARIS, TIME),
        thought="Hm.",
        tool="minimax_m2",
        reasoning="minimax_m2",
        strict=True,
    ),
    Case(
        "thinking",
        f"\n<think>{THOUGHT}</think>\nLook:\n{_GLM}",
        (ROME,),
        "Look:",
        THOUGHT,
        tool="glm45",
        reasoning="glm45",
    ),
    Case(
        "two",
        f"{_GLM}\n<tool_call>get_time\n</tool_call>",
        (ROME, TIME),
        tool="glm45",
        reasoning="glm45",
        strict=True,
    ),
    Case(
        "on one line",
        f"{THOUGHT}</think>"
        + _GLM.replace("\n", "")
        + "<tool_call>get_time</tool_call><tool_call>get_weather<arg_key>city</arg_key>"
        "<arg_value>\nParis \n</arg_value></tool_call>",
        (ROME, TIME, ("get_weather", {"city": "\nParis \n"})),
        thought=THOUGHT,
        tool="glm47",
        reasoning="glm45",
        tail="<|assistant|><think>",
        strict=True,
    ),
    Case(
        "two",
        f"Look:\n\n<｜DSML｜function_calls>\n{_DSML}{_DSML_TIME}</｜DSML｜function_calls>",
        (ROME, TIME),
        "Look:",
        tool="deepseek_v32",
    ),
    Case(
        "after thinking",
        f"{THOUGHT}</think><｜DSML｜function_calls>\n{_DSML}{_DSML_TIME}</｜DSML｜function_calls>",
        (ROME, TIME),
        thought=THOUGHT,
        tool="deepseek_v32",
        reasoning="deepseek_v3",
        tail="<｜Assistant｜><think>",
        strict=True,
    ),
    Case(
        "one",
        f"\n\n<｜DSML｜tool_calls>\n{_DSML}</｜DSML｜tool_calls>",
        (ROME,),
        tool="deepseek_v4",
    ),
]

_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

SECTION_CASES = [
    Case(
        "two",
        _BEGIN + _V3.format("get_weather", PARIS_JSON) + "\n" + _V3.format("get_time", "{}") + _END,
        (PARIS, TIME),
        tool="deepseek_v3",
        strict=True,
    ),
    Case(
        "thinking that nothing opens",
        f"{THOUGHT}\n</think>\n\nLook.\n{_BEGIN}" + _V3.format("write_file", FILE_JSON) + _END,
        (FILE,),
        "Look.",
        THOUGHT,
        tool="deepseek_v3",
        reasoning="deepseek_r1",
    ),
    Case(
        "two",
        _BEGIN + _V31.format("get_weather", ROME_JSON) + _V31.format("get_time", "{}") + _END,
        (ROME, TIME),
        tool="deepseek_v31",
        strict=True,
    ),
    Case(
        "two",
        "Look:<|tool_calls_section_begin|>"
        + _KIMI.format("get_weather", 0, PARIS_JSON)
        + _KIMI.format("get_time", 1, "{}")
        + "<|tool_calls_section_end|>",
        (PARIS, TIME),
        "Look:",
        tool="kimi_k2",
    ),
    Case(
        "a list",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time", "arguments": {}, '
        '"id": "9Ae3bDc2F"}]',
        (PARIS, TIME),
        tool="mistral",
    ),
    Case(
        "names and arguments",
        "It may rain.[TOOL_CALLS]get_weather[ARGS]" + ROME_JSON + "[TOOL_CALLS]get_time[ARGS]{}",
        (ROME, TIME),
        "It may rain.",
        tool="mistral",
    ),
    Case(
        "with an id, after thinking",
        f"[THINK]{THOUGHT}[/THINK][TOOL_CALLS]write_file[CALL_ID]9Ae3bDc2F[ARGS]{FILE_JSON}",
        (FILE,),
        thought=THOUGHT,
        tool="mistral",
        reasoning="mistral",
    ),
    Case(
        "with thinking, as one token each",
        f"[THINK]{THOUGHT}[/THINK][TOOL_CALLS]get_weather[ARGS]{ROME_JSON}[TOOL_CALLS]get_time[ARGS]{{}}",
        (ROME, TIME),
        thought=THOUGHT,
        tool="mistral",
        reasoning="mistral",
        strict=True,
    ),
]

LITERAL_CASES = [
    Case(
        "two",
        '[get_weather(city="Rome", days=3, metric=True), get_time()]',
        (ROME, TIME),
        tool="pythonic",
        strict=True,
    ),
    Case(
        "all kinds of values",
        "[write_file(path='a/b.py', content='if a < b and \"x\" in s:\\n    print(\"</tool_call>\\\\t\", {})\\n', "
        "lines=[1, 2], options={'mode': 'w'})]",
        (FILE,),
        tool="pythonic",
    ),
    Case(
        "a link",
        "[Paris](https://example.org) is sunny.",
        (),
        "[Paris](https://example.org) is sunny.",
        tool="pythonic",
    ),
    Case(
        "between marks",
        '<|python_start|>[get_weather(city="Paris"), get_time()]<|python_end|>',
        (PARIS, TIME),
        tool="llama4_pythonic",
        strict=True,
    ),
    Case(
        "JSON between marks",
        '<|python_start|>{"name": "get_weather", "parameters": {"city": "Paris"}}<|python_end|>',
        (PARIS,),
        tool="llama4_pythonic",
    ),
    Case(
        "text after",
        '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>Checking the weather in Paris.',
        (PARIS,),
        "Checking the weather in Paris.",
        tool="lfm2",
    ),
    Case(
        "two",
        '<|tool_call_start|>[get_weather(city="Rome", days=3, metric=True), get_time()]<|tool_call_end|>',
        (ROME, TIME),
        tool="lfm2",
        strict=True,
    ),
    Case(
        "a call a line",
        '<function_calls>\nget_weather(city="Paris")\nget_time()\n</function_calls>',
        (PARIS, TIME),
        tool="olmo3",
        strict=True,
    ),
    Case(
        "two, after thinking",
        f"<|channel>thought\n{THOUGHT}\n<channel|>"
        '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3,metric:true}'
        "<tool_call|><|tool_call>call:get_time{}<tool_call|>",
        (ROME, TIME),
        thought=THOUGHT,
        tool="gemma4",
        reasoning="gemma4",
        strict=True,
    ),
    Case(
        "nested",
        f'<|tool_call>call:write_file{{path:<|"|>a/b.py<|"|>,content:<|"|>{CODE}<|"|>,lines:[1,2],'
        'options:{mode:<|"|>w<|"|>}}<tool_call|>',
        (FILE,),
        tool="gemma4",
        strict=True,
    ),
    Case(
        "one",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
        (PARIS,),
        tool="functiongemma",
        strict=True,
    ),
]

_ASSISTANT = "<|start|>assistant"
_ANALYSIS = f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
HARMONY = {"tool": "openai", "reasoning": "openai_gptoss", "tail": _ASSISTANT}
HARMONY_CASES = [
    Case(
        "final",
        f"{_ANALYSIS}{_ASSISTANT}<|channel|>final<|message|>It is sunny.\n<|return|>",
        (),
        "It is sunny.",
        THOUGHT,
        **HARMONY,
    ),
    Case(
        "a call",
        f"{_ANALYSIS}{_ASSISTANT}<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        + PARIS_JSON,
        (PARIS,),
        thought=THOUGHT,
        strict=True,
        **HARMONY,
    ),
    Case(
        "the recipient before the channel, and a preamble",
        f"{_ANALYSIS}{_ASSISTANT}<|channel|>commentary<|message|>Let me look.<|end|>{_ASSISTANT}"
        f" to=functions.write_file<|channel|>commentary json<|message|>{FILE_JSON}<|call|>",
        (FILE,),
        "Let me look.",
        THOUGHT,
        **HARMONY,
    ),
    Case(
        "a mark in a string, two thoughts",
        f"{_ANALYSIS}{_ASSISTANT}<|channel|>analysis<|message|>Go.<|end|>{_ASSISTANT}<|channel|>commentary"
        ' to=functions.get_weather<|message|>{"city": "<|end|>"}<|call|>',
        (("get_weather", {"city": "<|end|>"}),),
        thought=f"{THOUGHT}\nGo.",
        **HARMONY,
    ),
    Case(
        "the beginning of a message left out",
        "<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>Sunny.",
        (),
        "Sunny.",
        "Hm.",
        **HARMONY,
    ),
    Case(
        "begun by the prompt",
        "Sunny.<|return|>",
        (),
        "Sunny.",
        tool="openai",
        tail="<|start|>assistant<|channel|>final<|message|>",
    ),
    Case(
        "the header begun by the prompt",
        "final<|message|>Sunny.",
        (),
        "Sunny.",
        tool="openai",
        tail="<|start|>assistant<|channel|>",
    ),
    Case(
        "space between two thoughts",
        "<|channel|>analysis<|message|>A.\n\n<|end|><|start|>assistant<|channel|>analysis<|message|>B.",
        (),
        thought="A.\n\nB.",
        **HARMONY,
    ),
    Case("no channels at all", "It is sunny.\n", (), "It is sunny.\n", **HARMONY),
]

_ATEM = (
    '<atem:function_calls>\n<atem:invoke name="get_weather">\n<atem:parameter name="city">Rome</atem:parameter>\n'
    '<atem:parameter name="days">3</atem:parameter>\n<atem:parameter name="metric">true</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>"
)
_ATEM_TIME = (
    '<atem:function_calls>\n<atem:invoke name="get_time">\n</atem:invoke>\n</atem:function_calls>'
)
_TO_SELF = f" to=self<|message|>{THOUGHT}<|eom|>{_ASSISTANT}"
MUSE = {"tool": "muse_glimmer", "reasoning": "muse_glimmer", "tail": _ASSISTANT}
MUSE_CASES = [
    Case(
        "two calls after a thought",
        f"{_TO_SELF} to=get_weather<|message|>{_ATEM}<|eom|>{_ASSISTANT} to=get_time<|message|>{_ATEM_TIME}",
        (ROME, TIME),
        thought=THOUGHT,
        strict=True,
        **MUSE,
    ),
    Case(
        "a word for the user before a call",
        f" to=user<|message|>Let me look.\n<|eom|>{_ASSISTANT} to=get_weather<|message|>{_ATEM}<|eot|>",
        (ROME,),
        "Let me look.",
        **MUSE,
    ),
    Case(
        "tags that call nothing",
        f" to=self<|message|>I could {_ATEM}.<|eom|>{_ASSISTANT} to=user<|message|>Use:\n{_ATEM}<|eot|>",
        (),
        f"Use:\n{_ATEM}",
        f"I could {_ATEM}.",
        **MUSE,
    ),
    Case(
        "no recipient",
        f"<|message|>Sunny.{_ASSISTANT}<|message|>Warm.",
        (),
        "Sunny.\nWarm.",
        **MUSE,
    ),
    Case("no header", "It is sunny.\n", (), "It is sunny.\n", **MUSE),
    Case("tags for the user", f" to=user<|message|>{_ATEM}<|eot|>", (), _ATEM, **MUSE),
    Case("no header after all", " to=user it was", (), " to=user it was", **MUSE),
    Case(
        "no calls in a call", f"{_TO_SELF} to=f<|message|>f(1)<|eot|>", (), "f(1)", THOUGHT, **MUSE
    ),
    Case(
        "begun by the prompt",
        f"Hm.<|eom|>{_ASSISTANT} to=user<|message|>Sunny.",
        (),
        "Sunny.",
        "Hm.",
        tool="muse_glimmer",
        tail="<|start|>assistant to=self<|message|>",
    ),
]

TEXT_CASES = [
    Case("spaces stay", "  It is sunny.\n\n", (), "  It is sunny.\n\n", tool="hermes"),
    Case("nothing", "", tool="hermes", reasoning="qwen3"),
    Case("a part of a mark", "a <tool_cal", (), "a <tool_cal", tool="hermes"),
    Case(
        "the mark as text",
        "The tag <tool_call> opens a call.",
        (),
        "The tag <tool_call> opens a call.",
        tool="hermes",
    ),
    Case(
        "the marks of thought as text",
        "Between <think> and </think> it thinks.",
        (),
        "Between <think> and </think> it thinks.",
        tool="hermes",
        reasoning="qwen3",
    ),
    Case("thinking never ends", "<think>\nHm.", thought="Hm.", reasoning="qwen3"),
    Case("empty thought", "<think>\n\n</think>\n\nSunny.", (), "Sunny.", reasoning="qwen3"),
    Case(
        "the prompt has ended the thought, and the model does again",
        "</think>\n\nSunny.",
        (),
        "Sunny.",
        reasoning="qwen3",
        tail="<think>\n\n</think>\n\n",
    ),
    Case(
        "the prompt has begun the thought, and the model does again",
        "<think>\nHm.\n</think>\nSunny.",
        (),
        "Sunny.",
        "Hm.",
        reasoning="qwen3",
        tail="<think>\n",
    ),
    Case(
        "a thought the prompt has ended",
        "Sunny.",
        (),
        "Sunny.",
        reasoning="deepseek_r1",
        tail="<｜Assistant｜><think>\n\n</think>\n\n",
    ),
    Case(
        "a thought nothing opens",
        "Hm.\n</think>\n\nSunny.",
        (),
        "Sunny.",
        "Hm.",
        reasoning="deepseek_r1",
    ),
    Case("thought after content", "A.[THINK]Hm.[/THINK]B.", (), "A.B.", "Hm.", reasoning="mistral"),
    Case("only marks of thought", f"{THINK}Sunny.", (), "Sunny.", THOUGHT, reasoning="qwen3"),
    Case("no format", "<think>a</think><tool_call>", (), "<think>a</think><tool_call>"),
]

CASES = [
    *JSON_CASES,
    *TAG_CASES,
    *SECTION_CASES,
    *LITERAL_CASES,
    *HARMONY_CASES,
    *MUSE_CASES,
    *TEXT_CASES,
]
