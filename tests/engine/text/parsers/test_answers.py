"""What an answer means where models, or those who cut it off, do not keep to its format; and what it may cost."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.engine.text.parsers import Tool

from .corpus import CASES, TOOLS
from .said import output_format, parse, said, values

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = [("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize(
    ("tool", "text", "said_so_far"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"city": "Par', '{"city": "Par'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": "{\\"city\\": \\"Par', '{"city": "Par'),
        ("llama3_json", '{"name": "f", "parameters": {"a": [1, ', '{"a": [1, '),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"city": "Par', '{"city": "Par'),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar",
            '{"city": "Par',
        ),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=ci", '{"ci'),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=days>\n1", '{"days": '),
        (
            "glm45",
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par",
            '{"city": "Par',
        ),
        ("pythonic", '[f(city="Par', '{"city": "Par'),
        ("pythonic", "[f(days=[1, 2", '{"days": [1, '),
        ("gemma4", '<|tool_call>call:f{city:<|"|>Par', '{"city": "Par'),
        ("openai", '<|channel|>commentary to=functions.f<|message|>{"city": "Par', '{"city": "Par'),
        (
            "deepseek_v31",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "Par',
            '{"city": "Par',
        ),
    ],
)
def test_arguments_come_as_soon_as_they_are_certain(tool: str, text: str, said_so_far: str) -> None:
    parser = output_format(tool).parser(TOOLS, "")
    news = parser.push(text)
    assert parser.has_tool_calls
    assert [delta.arguments for delta in news.tool_calls] == [said_so_far]
    assert news.content == ""


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = output_format("hermes", "qwen3").parser(TOOLS, "")
    pushed = [
        parser.push(text).content for text in ("Hello", " wor", "ld <tool", "s> ", "and", " more\n")
    ]
    assert pushed == ["Hello", " wor", "ld", " <tools>", " and", " more"]
    assert parser.finish().content == "\n"


def test_ids_differ_and_are_mistrals_own() -> None:
    text = "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}"
    ids = [delta.id for delta in output_format("mistral").parser().push(text).tool_calls]
    assert len(set(ids)) == 2
    assert all(call_id and len(call_id) == 9 and call_id.isalnum() for call_id in ids)
    other = output_format("hermes").parser().push(CALL).tool_calls[0].id
    assert other and other.startswith("call_") and len(other) == 29


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("hermes", '<tool_call>\n{"name": get_weather, "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "get_weather"'),
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments":'),
        ("hermes", '<tool_call>\n{"arguments": {"city": "Paris"}, "na'),
        ("hermes", '<tool_call>\n{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>\nget_weather(1)\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n"),
        ("qwen3_coder", "<tool_call>\n<function=get_weather\n"),
        ("qwen3_coder", "<tool_call>\n<function=>\n</function>\n</tool_call>"),
        ("qwen3_coder", '<tool_call>\n{"name": "get_weather"}\n</tool_call>'),
        ("llama3_json", '{"name": "Paris", "country": "France", "parameters": {}}'),
        ("llama3_json", '<|python_tag|>print("x")'),
        ("json", '{"name": "Paris"}'),
        ("json", '[{"name": "Paris"}]'),
        ("json", 'Here: {"name": "f", "arguments": {}}'),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", "[TOOL_CALLS][]"),
        ("mistral", "[TOOL_CALLS]get_weather[ARGS]"),
        ("mistral", "[TOOL_CALLS]get_weather"),
        ("glm45", "<tool_call>get_weather\n"),
        ("glm45", "<tool_call>is a tag</tool_call>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>get_weather<｜tool▁calls▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"),
        ("deepseek_v32", '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">'),
        ("pythonic", "[get_weather"),
        ("pythonic", '[get_weather("Paris")]'),
        ("pythonic", "[1, 2]"),
        ("gemma4", "<|tool_call>call:get_weather"),
        ("gemma4", '<|tool_call>call:get_weather{<|"|>Paris<|"|>}<tool_call|>'),
        ("openai", " to=functions.get_weather<|channel|>comm"),
    ],
)
def test_what_begins_no_call_is_text(tool: str, text: str) -> None:
    assert parse(text, tool) == (text, "", ())


def test_a_call_that_fails_does_not_hide_the_next() -> None:
    bad = '<tool_call>\n{"name": get_weather}\n</tool_call>'
    found = parse(f"{bad}\n{CALL}", "hermes")
    assert values(found) == PARIS
    assert found.content == bad


@pytest.mark.parametrize(
    ("tool", "text", "arguments", "content"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', '{"a": "b', ""),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
            '{"a": tru}',
            "",
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=days>\n1",
            '{"days": 1',
            "",
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</par",
            '{"city": "Paris\\n</par',
            "",
        ),
        ("pythonic", "[f(a=Tru", '{"a": Tru', ""),
        (
            "glm47",
            "<tool_call>get_weather<arg_key>metric</arg_key><arg_value>tru",
            '{"metric": tru',
            "",
        ),
        (
            "hermes",
            r'<tool_call>{"name": "f", "arguments": {"a": "\"}"}}</tool_call>',
            r'{"a": "\"}"}',
            "",
        ),
        ("pythonic", "[f(a=1 b=2)]", '{"a": 1', "b=2)]"),
        ("pythonic", "[f(a=[1, {'b': ", '{"a": [1, {"b": ', ""),
        ("gemma4", '<|tool_call>call:f{a:<|"|>b', '{"a": "b', ""),
        (
            "openai",
            "<|channel|>commentary to=python code<|message|>print(1)<|call|>",
            "print(1)",
            "",
        ),
    ],
)
def test_a_call_that_has_begun_says_what_there_is(
    tool: str, text: str, arguments: str, content: str
) -> None:
    found = parse(text, tool)
    assert [said_arguments for _, said_arguments in found.calls] == [arguments]
    assert found.content == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"\n\n{CALL}\n", ""),
        (f"  A. \n{CALL}", "  A."),
        (f"{CALL}\n\nB.\n", "B.\n"),
        (f"A.\n\n{CALL}\n{CALL}\n\nB.", "A.\n\nB."),
        (f"A.{CALL}\nB.", "A.\nB."),
        (f"A.{CALL}B.", "A.B."),
        ("\n A.\n ", "\n A.\n "),
    ],
)
def test_white_space_next_to_calls_is_no_content(text: str, content: str) -> None:
    assert parse(text, "hermes").content == content


def test_white_space_and_text_after_a_list_of_calls() -> None:
    text = 'A.<|tool_call|>[{"name": "f", "arguments": {}}]\n, and B.'
    assert parse(text, "granite").content == "A.\n, and B."


def test_marks_of_thought_are_text_after_content() -> None:
    found = parse(f"A.\n{CALL}\n<think>B.</think>", "hermes", "qwen3")
    assert (found.content, found.reasoning) == ("A.\n<think>B.</think>", "")


def test_a_call_within_a_thought_ends_it() -> None:
    found = parse(f"Hm.\n{CALL}\nB.", "hermes", "qwen3", tail="<think>\n")
    assert (found.content, found.reasoning, values(found)) == ("B.", "Hm.", PARIS)
    text = "Hm: a <tool_call> is needed.\n</think>\nB."
    assert parse(text, "hermes", "qwen3", tail="<think>\n") == (
        "B.",
        "Hm: a <tool_call> is needed.",
        (),
    )


def test_names_that_are_no_tools_are_calls() -> None:
    assert values(
        parse('<tool_call>{"name": "no_tool", "arguments": {}}</tool_call>', "hermes")
    ) == [("no_tool", {})]


def test_without_tools_nothing_is_a_call() -> None:
    assert parse(f"<think>\nHm.\n</think>\n\n{CALL}", None, "qwen3") == (CALL, "Hm.", ())


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("null", "{}"),
        ('""', "{}"),
        ('"{\\"a\\": \\"\\\\n\\ud83d\\ude00\\"}"', '{"a": "\\n😀"}'),
        ('"Paris"', '"Paris"'),
    ],
)
def test_arguments_that_are_no_object(arguments: str, meant: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert parse(text, "hermes").calls == (("f", meant),)


TYPED = Tool(
    "f",
    {
        "properties": {
            "text": {"type": "string"},
            "number": {"type": "number"},
            "whole": {"type": "integer"},
            "flag": {"type": "boolean"},
            "maybe": {"type": ["string", "null"]},
            "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "named": {"$ref": "#/$defs/name"},
            "word": {"enum": ["1", "2"]},
            "list": {"type": "array"},
            "any": {},
            "open": {"anyOf": [{"type": "string"}, {}]},
            "loop": {"$ref": "#/$defs/loop"},
        },
        "$defs": {
            "name": {"type": "string"},
            "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "string"}]},
        },
    },
)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", " true ", " true "),
        ("text", '"quoted" \\ and\nlines', '"quoted" \\ and\nlines'),
        ("named", "null", "null"),
        ("word", "1", "1"),
        ("loop", "1", "1"),
        ("number", "1.50", 1.5),
        ("number", "one", "one"),
        ("number", "NaN", "NaN"),
        ("whole", " 7 ", 7),
        ("whole", "7.0", 7.0),
        ("whole", "7.5", "7.5"),
        ("whole", "007", "007"),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", " True\t", True),
        ("flag", "1", "1"),
        ("maybe", "None", None),
        ("maybe", "null", None),
        ("maybe", "5", "5"),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("list", '[1, {"a": "b"}]', [1, {"a": "b"}]),
        ("list", "1, 2", "1, 2"),
        ("list", "[1, 2", "[1, 2"),
        ("list", '["</parameter>", "\\"\\n</parameter>"]', ["</parameter>", '"\n</parameter>']),
        ("maybe", '"a</parameter>"', "a</parameter>"),
        ("whole", "", ""),
        ("list", "[True, {'a': None}]", [True, {"a": None}]),
        ("list", "[True] and", "[True] and"),
        ("any", "5", 5),
        ("open", "5", 5),
        ("any", "sunny", "sunny"),
        ("unknown", '{"a": 1}', {"a": 1}),
    ],
)
def test_bare_values_are_typed_by_the_schema(name: str, text: str, value: object) -> None:
    call = f"<tool_call>\n<function=f>\n<parameter={name}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    ((_, found),) = values(parse(call, "qwen3_coder", tools=[TYPED]))
    assert found == {name: value}
    assert type(found[name]) is type(value)


def test_a_value_that_says_it_is_no_string_is_none() -> None:
    parameter = '<｜DSML｜parameter name="city" string="false">3</｜DSML｜parameter>'
    call = f'<｜DSML｜invoke name="get_weather">\n{parameter}\n</｜DSML｜invoke>'
    text = f"<｜DSML｜function_calls>\n{call}\n</｜DSML｜function_calls>"
    assert values(parse(text, "deepseek_v32")) == [("get_weather", {"city": 3})]


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("'it\\'s'", "it's"),
        ('"a\\tb\\\\n\\x41\\u00e9\\U0001F600\\q"', "a\tb\\nAé😀\\q"),
        ('"\\ud83d\\ude00\\ud83d"', "😀\ufffd"),
        ('"""two\n"lines\\""""', 'two\n"lines"'),
        ('""', ""),
        ("-1.5e3", -1500.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("07", 7),
        (".5", 0.5),
        ("None", None),
        ("null", None),
        ("False", False),
        ("inf", "inf"),
        ("name", "name"),
        ("(1, 'a',)", [1, "a"]),
        ("[]", []),
        ("{}", {}),
        ("{'a': {\"b\": [True]}}", {"a": {"b": [True]}}),
    ],
)
def test_python_literals(literal: str, value: object) -> None:
    ((_, found),) = values(parse(f"[f(x={literal}, y=1)]", "pythonic"))
    assert found == {"x": value, "y": 1}


def test_literals_that_are_nested_too_deeply_end() -> None:
    found = parse(f"[f(x={'[' * 10_000}", "pythonic")
    assert found.calls[0][1].count("[") == 64


@pytest.mark.parametrize(
    ("text", "value"),
    [("Paris", "Paris"), ("5", 5), ("none so far", "none so far"), ('"Paris"', "Paris")],
)
def test_gemmas_bare_words(text: str, value: object) -> None:
    assert values(parse(f"<|tool_call>call:f{{x:{text},y:[a b,c]}}<tool_call|>", "gemma4")) == [
        ("f", {"x": value, "y": ["a b", "c"]})
    ]


@given(st.data())
def test_no_text_is_lost_whatever_it_is(data: st.DataObject) -> None:
    """Pieces of answers in any order: the same however they are cut, and without a call, all words are there."""
    case = data.draw(st.sampled_from([case for case in CASES if case.tool]))
    pieces = [case.text[at : at + 9] for at in range(0, len(case.text), 9)]
    text = "".join(
        data.draw(
            st.lists(st.sampled_from([*pieces, *'{}[]<>"\\\n ', "</think>", "né"]), max_size=30)
        )
    )
    answer_format = output_format(case.tool, case.reasoning)
    whole = said(answer_format.parser(TOOLS, case.tail), [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    cut = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert said(answer_format.parser(TOOLS, case.tail), cut) == whole
    assert said(answer_format.parser(TOOLS, case.tail), text) == whole
    if not whole.calls and case.tool != "openai":  # whose headers are no text
        assert (whole.content + whole.reasoning).count("né") == text.count("né")


_KEYWORDS = (
    "type", "properties", "required", "$ref", "$defs", "a", "city", "anyOf", "oneOf", "allOf", "enum", "const",
    "items", "minItems", "maxItems", "minLength", "pattern", "additionalProperties",
)  # fmt: skip
_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["string", "object", "#/$defs/a", "^a$"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYWORDS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["type", "properties", "required", "$ref", "$defs"]), _ANYTHING, max_size=4
    )
)
def test_a_schema_that_makes_no_sense_does_no_harm(schema: dict[str, object]) -> None:
    """Clients send what they like: a grammar is refused in words, and answers are read all the same."""
    tools = [Tool("get_weather", schema)]
    for name in ("qwen3_coder", "gemma4", "pythonic", "hermes"):
        try:
            output_format(name).grammar(tools)
        except ValueError as error:
            assert str(error)
    values_of_both = "<parameter=city>5</parameter><parameter=a>x</parameter>"
    text = f"<tool_call><function=get_weather>{values_of_both}</function></tool_call>"
    assert len(parse(text, "qwen3_coder", tools=tools).calls) == 1


LONG = 12_000


@pytest.mark.parametrize(
    ("tool", "start", "piece"),
    [
        ("hermes", "", "a < b <tool_ "),
        ("hermes", "", "\n"),
        ("hermes", "", "<tool_call>"),
        ("hermes", "", '<tool_call>{"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', 'x{\\"}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"', "\\\\u0041"),
        ("hermes", '<tool_call>{"arguments": ', "["),
        ("hermes", '<tool_call>{"name": "', "a"),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>\n", "\n</para"),
        ("qwen3_coder", "<tool_call><function=f><parameter=", "a"),
        ("qwen3_coder", "<tool_call><function=get_weather><parameter=days>", "["),
        ("llama3_json", '{"name": "f", "parameters": {}}', "; "),
        ("pythonic", "[f(a=", "[{'a': "),
        ("pythonic", "[f(a='", "\\\\x41"),
        ("gemma4", "<|tool_call>call:f{a:", "a"),
        ("openai", "<|channel|>", "a"),
        ("openai", "", "<|channel|>analysis<|message|>"),
        ("deepseek_v31", "", "<｜tool▁calls▁begin｜>"),
    ],
)
def test_time_grows_with_the_length_alone(tool: str, start: str, piece: str) -> None:
    """One character at a time: four times the text takes far less than sixteen times the time."""
    small, large = (
        _seconds(tool, start + piece * (size // len(piece))) for size in (LONG // 4, LONG)
    )
    assert large < max(10 * small, 0.5)


def test_time_grows_with_the_length_alone_of_what_comes_at_once() -> None:
    small, large = (
        _seconds("pythonic", "[f(a=[" + "1, " * size, at_once=True) for size in (2_500, 20_000)
    )
    assert large < max(20 * small, 0.5)


def _seconds(tool: str, text: str, at_once: bool = False) -> float:
    parser = output_format(tool).parser(TOOLS, "")
    begun = time.process_time()
    for piece in [text] if at_once else text:
        parser.push(piece)
    parser.finish()
    return time.process_time() - begun
