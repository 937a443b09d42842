"""Grammars: they take every recorded answer in its format's own form, refuse wrong arguments, and whatever they let a
model write, the parser reads as calls whose arguments fit the schemas."""

import json
import random
from functools import cache

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nibble.engine.text.parsers import REASONING_PARSERS, TOOL_PARSERS, Tool

from .corpus import CASES, FILE, ROME, TOOLS, Case
from .said import output_format, said, values

END = "<|endoftext|>"
STRICT = [case for case in CASES if case.strict]
FORMATS = sorted({tool_format.name for tool_format in TOOL_PARSERS.values()})
WALKS = 10  # with the marks as tokens, and as many without
_CLOSERS = ('"', "<", "]", "}", ")", ">", "\n", "|", "`")


@cache
def tokenizer(special: bool) -> Tokenizer:
    """Bytes and some merges, in whose vocabulary the formats' marks are special tokens or none."""
    kept = {
        token
        for each in (*TOOL_PARSERS.values(), *REASONING_PARSERS.values())
        for token in each.kept_tokens
    }
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([case.text for case in CASES] * 2, trainer)
    if special:
        made.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in sorted(kept)]
        )
    return made


@cache
def guide(special: bool) -> LLTokenizer:
    made = tokenizer(special)
    return LLTokenizer(made.to_str(), eos_token=made.token_to_id(END))


def special_tokens(special: bool) -> dict[str, int]:
    added = tokenizer(special).get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.content != END}


def matcher(case: Case, special: bool, tools: list[Tool], **options: object) -> LLMatcher:
    grammar = output_format(case.tool, case.reasoning).grammar(
        tools, special_tokens=special_tokens(special), prompt_tail=case.tail, **options
    )
    made = LLMatcher(guide(special), LLMatcher.grammar_from_lark(grammar))
    assert not made.is_error(), f"{made.get_error()}\n{grammar}"
    return made


def takes(made: LLMatcher, text: str, special: bool) -> bool:
    ids = tokenizer(special).encode(text, add_special_tokens=False).ids
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def _name(case: Case) -> str:
    return f"{case.tool}-{case.name}".replace(" ", "_")


# A mark in a string is text, not the token; and without tokens Mistral's syntax is the older one.
WITH_TOKENS = [case for case in STRICT if FILE not in case.calls]
WITHOUT_TOKENS = [case for case in STRICT if case.tool != "mistral"]


@pytest.mark.parametrize("case", WITH_TOKENS, ids=_name)
def test_recorded_answers_are_allowed_with_tokens(case: Case) -> None:
    assert takes(matcher(case, True, TOOLS), case.text, True), case.text


@pytest.mark.parametrize("case", WITHOUT_TOKENS, ids=_name)
def test_recorded_answers_are_allowed_without_tokens(case: Case) -> None:
    assert takes(matcher(case, False, TOOLS), case.text, False), case.text


def test_every_format_has_a_recorded_answer_that_is_allowed() -> None:
    without = {"json", "granite4", "apriel", "kimi_k2", "deepseek_v4"}
    assert {case.tool for case in STRICT} | without >= set(FORMATS)


@pytest.mark.parametrize("case", [case for case in STRICT if ROME in case.calls], ids=_name)
def test_wrong_arguments_are_refused(case: Case) -> None:
    wrong = case.text.replace("3", "three", 1)
    assert not takes(matcher(case, False, TOOLS), wrong, False)
    assert not takes(
        matcher(case, False, TOOLS), case.text.replace("get_weather", "get_whether"), False
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once(name: str) -> None:
    case = next(case for case in CASES if case.tool == name and case.calls)
    made = matcher(case._replace(reasoning=None), False, WALK_TOOLS, named="book_ping")
    text = walk(made, case, False, random.Random(0))
    assert values(said(output_format(name).parser(TOOLS, case.tail), [text])) == [("book_ping", {})]


def test_parallel_calls_can_be_ruled_out() -> None:
    case = next(case for case in STRICT if case.tool == "hermes" and case.name == "parallel")
    assert takes(matcher(case, False, TOOLS), case.text, False)
    assert not takes(matcher(case, False, TOOLS, parallel=False), case.text, False)


@pytest.mark.parametrize(
    ("name", "parameter", "said_of_it"),
    [
        ("qwen3_coder", {"type": "string", "allOf": [{}]}, "parameter 'a'.*'allOf'"),
        ("qwen3_coder", {"type": "string", "not": {"const": "x"}}, "'not'"),
        ("qwen3_coder", {"type": "string", "pattern": "^a|b$"}, "alternatives"),
        ("qwen3_coder", {"anyOf": [{"type": "string"}], "maxLength": 3}, "'maxLength'"),
        (
            "qwen3_coder",
            {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]},
            "'oneOf'",
        ),
        ("qwen3_coder", {"enum": ["a"], "maxLength": 0}, "'maxLength'"),
        ("gemma4", {}, "a type"),
        (
            "gemma4",
            {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            "'uniqueItems'",
        ),
        ("gemma4", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ("gemma4", {"anyOf": [{"type": "integer"}], "minimum": 3}, "'minimum'"),
    ],
)
def test_what_cannot_be_promised_is_said(
    name: str, parameter: dict[str, object], said_of_it: str
) -> None:
    with pytest.raises(ValueError, match=said_of_it):
        output_format(name).grammar([Tool("f", {"properties": {"a": parameter}})])


@pytest.mark.parametrize(
    "parameter",
    [
        {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]},
        {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
        {"anyOf": [{"type": "string", "enum": ["a"]}, {"$ref": "#/$defs/b"}], "description": "x"},
        {"type": ["string", "null"]},
    ],
)
@pytest.mark.parametrize("name", ["gemma4", "glm47"])
def test_alternatives_that_can_be_promised(name: str, parameter: dict[str, object]) -> None:
    schema = {"properties": {"a": parameter}, "required": ["a"], "$defs": {"b": {"const": "b"}}}
    case = next(case for case in STRICT if case.tool == name)._replace(reasoning=None, tail="")
    for seed in range(5):
        text = walk(
            matcher(case, False, [Tool("f", schema)], named="f"), case, False, random.Random(seed)
        )
        ((_, arguments),) = values(said(output_format(name).parser([Tool("f", schema)]), [text]))
        jsonschema_rs.validate(schema, arguments)


def test_tools_that_there_are_not() -> None:
    coder = output_format("qwen3_coder")
    with pytest.raises(ValueError, match="'if'"):
        coder.grammar([Tool("f", {"type": "object", "if": {}})])
    with pytest.raises(ValueError, match="no tool 'g'"):
        coder.grammar([Tool("f")], named="g")
    with pytest.raises(ValueError, match="no format"):
        output_format(None, "qwen3").grammar([Tool("f")])


@pytest.mark.parametrize(
    ("reasoning", "tail", "before"),
    [
        ("qwen3", "<think>\n", "Hm.\n</think>\n\n"),
        ("qwen3", "", "<think>\nHm.\n</think>\n\n"),
        (
            "openai_gptoss",
            "",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("openai_gptoss", "", "<|channel|>final <|constrain|>json<|message|>"),
        ("muse_glimmer", "", " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>"),
    ],
)
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
def test_what_comes_before_an_answer_in_json(
    reasoning: str, tail: str, before: str, special: bool
) -> None:
    answer_format = output_format(None, reasoning)
    lark = answer_format.reasoning_grammar(special_tokens(special), tail)
    assert lark is not None
    grammars = [
        {"lark_grammar": "start: @before @answer"},
        {"name": "before", "lark_grammar": lark},
        {"name": "answer", "json_schema": {"type": "object"}},
    ]
    made = LLMatcher(guide(special), json.dumps({"grammars": grammars}))
    assert not made.is_error(), made.get_error()
    assert takes(made.deep_copy(), before + '{"a": 1}', special)
    assert not takes(made.deep_copy(), before + "a", special)
    assert said(answer_format.parser([], tail), [before + "{}"]).content == "{}"


def test_no_reasoning_has_no_grammar() -> None:
    assert output_format("hermes").reasoning_grammar({}, "") is None
    assert output_format("hermes", "qwen3").reasoning_grammar({}, "<think>\n\n</think>\n\n") is None


WALK_TOOLS = [
    Tool(
        "book",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 12},
                "code": {"type": "string", "pattern": r"^[A-Z]{2}\d{1,3}$"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "note": {"$ref": "#/$defs/note"},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "price": {"type": "number", "minimum": -5, "maximum": 1000},
                "metric": {"type": "boolean"},
                "names": {
                    "type": "array",
                    "items": {"type": "string", "maxLength": 5},
                    "minItems": 1,
                    "maxItems": 3,
                },
                "guest": {
                    "type": "object",
                    "properties": {
                        "age": {"type": ["integer", "null"]},
                        "tags": {"type": "array", "items": {"enum": ["a", "b"], "type": "string"}},
                    },
                    "required": ["age"],
                    "additionalProperties": False,
                },
            },
            "required": ["city", "code", "days", "guest"],
            "additionalProperties": False,
            "$defs": {"note": {"type": "string", "maxLength": 8}},
        },
    ),
    Tool("book_ping", {"type": "object", "properties": {}, "additionalProperties": False}),
]
SCHEMAS = {tool.name: tool.parameters for tool in WALK_TOOLS}


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_may_be_written_is_valid(name: str, special: bool) -> None:
    case = next(case for case in CASES if case.tool == name and case.calls)
    first = matcher(case, special, WALK_TOOLS)
    for seed in range(WALKS):
        text = walk(first.deep_copy(), case, special, random.Random(seed))
        found = said(output_format(name, case.reasoning).parser(WALK_TOOLS, case.tail), [text])
        assert found.calls and not found.content, text
        for tool, arguments in values(found):
            jsonschema_rs.validate(SCHEMAS[tool], arguments)


def walk(made: LLMatcher, case: Case, special: bool, rng: random.Random) -> str:
    """What a model writes that draws from the allowed tokens at random, and soon only likes to end things."""
    ids: list[int] = []
    backend = tokenizer(special)
    end = backend.token_to_id(END)
    weights = _weights(special)
    closing = [backend.encode(text, add_special_tokens=False).ids for text in _endings(case)]
    while not made.is_stopped() and len(ids) < 3000:
        if len(ids) > 25 and made.is_accepting():
            break
        closers = [c for c in closing if len(ids) > 25 and made.validate_tokens(c) == len(c)]
        if closers:
            chosen = rng.choice(closers)
        else:
            bits = made.compute_bitmask()
            allowed = [i for i in range(len(weights)) if bits[i // 8] >> (i % 8) & 1 and i != end]
            chosen = rng.choices(allowed, [weights[i] for i in allowed])[:1]
        assert made.consume_tokens(chosen), made.get_error()
        ids += chosen
    text = backend.decode(ids, skip_special_tokens=False)
    assert made.is_accepting() or made.is_stopped(), text
    return text


@cache
def _weights(special: bool) -> list[float]:
    """How likely tokens are: those that end things more, halves of characters less."""
    backend = tokenizer(special)
    texts = [
        backend.decode([i], skip_special_tokens=False) for i in range(backend.get_vocab_size())
    ]
    return [20.0 if text[:1] in _CLOSERS else 0.05 if "\ufffd" in text else 1.0 for text in texts]


def _endings(case: Case) -> list[str]:
    values_end = [
        "\n</parameter>",
        "</parameter>",
        "</arg_value>",
        "</｜DSML｜parameter>",
        '"',
        "]",
        "}",
        ")",
        '"}',
        "}}",
    ]
    return [*values_end, *sorted(output_format(case.tool, case.reasoning).kept_tokens)]


def test_reasoning_may_come_before_and_must_end() -> None:
    case = next(case for case in STRICT if case.tool == "hermes" and case.name == "thinking")
    call = case.text.partition("</think>\n\n")[2]
    opened = case._replace(tail="<|im_start|>assistant\n<think>\n")
    closed = case._replace(tail="<think>\n\n</think>\n\n")
    for special in (True, False):
        assert takes(matcher(case, special, TOOLS), call, special)
        assert not takes(matcher(opened, special, TOOLS), call, special)
        assert takes(matcher(opened, special, TOOLS), f"Hm <b>.\n</think>\n\n{call}", special)
        assert not takes(matcher(closed, special, TOOLS), case.text, special)
        assert takes(matcher(closed, special, TOOLS), call, special)


def test_reasoning_holds_no_mark_that_begins_calls() -> None:
    """The parser would take what follows it for a call, if it looks like one."""
    case = next(case for case in STRICT if case.tool == "hermes" and case.name == "thinking")
    assert not takes(
        matcher(case, False, TOOLS), case.text.replace("tool:", "tool: <tool_call>"), False
    )


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [({}, {0, 1, 2, 3}), ({"minItems": 1}, {1, 2, 3}), ({"minItems": 2, "maxItems": 2}, {2}), ({"maxItems": 1}, {0, 1}),
     ({"maxItems": 0}, {0})],
)  # fmt: skip
def test_lengths_of_gemmas_lists(limits: dict[str, int], lengths: set[int]) -> None:
    case = next(case for case in STRICT if case.tool == "gemma4" and case.name == "nested")
    tools = [
        Tool("f", {"properties": {"x": {"type": "array", "items": {"type": "integer"}, **limits}}})
    ]
    texts = [f"<|tool_call>call:f{{x:[{','.join('7' * n)}]}}<tool_call|>" for n in range(4)]
    allowed = {n for n, text in enumerate(texts) if takes(matcher(case, False, tools), text, False)}
    assert allowed == lengths


def test_a_grammar_names_special_tokens_by_their_ids() -> None:
    grammar = output_format("hermes").grammar([Tool("f")], special_tokens={"<tool_call>": 7})
    assert "<[7]>" in grammar and '"<tool_call>' not in grammar
    assert '</tool_call>"' in grammar
    assert json.dumps({"type": "object"})[1:-1] in grammar


def test_a_file_is_written_as_it_is() -> None:
    """A string without quotes may hold anything but the tag that ends it."""
    case = next(case for case in STRICT if case.tool == "qwen3_coder" and FILE in case.calls)
    made = matcher(case, False, TOOLS)
    assert takes(made, case.text, False)
    assert not takes(
        matcher(case, False, TOOLS), case.text.replace("print(", "</parameter>("), False
    )


@pytest.mark.parametrize(
    ("says", "others"),
    [
        ({}, False),
        ({"additionalProperties": True}, True),
        ({"additionalProperties": {"type": "integer"}}, True),
        ({"allOf": [{"properties": {"b": {"type": "integer"}}}]}, True),
    ],
)
def test_a_call_has_no_arguments_that_the_tool_does_not_name(says: dict, others: bool) -> None:
    case = next(case for case in STRICT if case.tool == "hermes" and case.calls and not case.tail)
    tool = Tool("f", {"type": "object", "properties": {"a": {"type": "string"}}, **says})
    call = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    for special in (True, False):
        for arguments, wanted in (('{"a": "x"}', True), ('{"a": "x", "b": 1}', others)):
            assert takes(matcher(case, special, [tool]), call.format(arguments), special) == wanted
