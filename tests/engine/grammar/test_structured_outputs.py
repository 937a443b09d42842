"""What clients ask for, as grammars: texts that llguidance takes or refuses, judged by json, jsonschema and re."""

import json
import random
import re

import jsonschema_rs
import numpy as np
import pytest

from nibble.engine.grammar.compiler import GrammarCompiler
from nibble.engine.grammar.state import GrammarState
from nibble.engine.grammar.structured_outputs import (
    MAX_GRAMMAR_CHARS,
    GrammarError,
    StructuredOutputs,
    to_grammar,
)
from nibble.engine.text.tokenizer import Tokenizer

from ..text.tiny_tokenizers import byte_level

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size + 13, tokenizer.eos_token_ids)


def takes(
    compiler: GrammarCompiler, tokenizer: Tokenizer, asked: StructuredOutputs, text: str
) -> bool:
    """Whether `text` is a whole answer of what is asked for."""
    matcher = compiler.state(to_grammar(asked)).matcher
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def walk(state: GrammarState, eos: int, rng: random.Random, jump: bool) -> list[int]:
    """An answer that a model without a mind of its own would give, up to its end."""
    output: list[int] = []
    while not state.is_over(len(output)):
        words = np.zeros(state.num_words, np.int32)
        state.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        if token == eos:
            return output
        position = len(output)
        output.append(token)
        output += state.accept(token, position, jump)
    return output


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize(
    "schema",
    [PERSON, json.dumps(PERSON), {"$defs": {"p": PERSON}, "$ref": "#/$defs/p"}],
    ids=["object", "text", "reference"],
)
def test_whatever_is_drawn_validates(compiler, tokenizer, schema, jump: bool) -> None:
    validator = jsonschema_rs.validator_for(PERSON)
    grammar = to_grammar(StructuredOutputs(json=schema))
    rng = random.Random(1)
    for _ in range(30):
        output = walk(compiler.state(grammar), tokenizer.eos_token_ids[0], rng, jump)
        validator.validate(json.loads(tokenizer.decode(output)))


def test_forced_tokens_are_the_tokenizers_own(compiler, tokenizer) -> None:
    """Where one text can follow, its tokens are those that the text has, and no step is spent on them."""
    state = compiler.state(to_grammar(StructuredOutputs(regex="a, stop the press b")))
    ids = tokenizer.encode("a, stop the press b", add_special_tokens=False)
    assert state.accept(ids[0], 0, jump=True) == ids[1:]
    assert state.num_tokens == len(ids)
    assert state.is_over(len(ids)) and not state.is_over(len(ids) - 1)
    assert state.accept(ids[0], len(ids), jump=True) == []


def test_a_token_of_another_position_is_nobodys_news(compiler, tokenizer) -> None:
    state = compiler.state(to_grammar(StructuredOutputs(regex="[ab]{3}")))
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    state.accept(a, 0, jump=True)
    state.accept(b, 0, jump=True)
    state.accept(b, 5, jump=True)
    assert state.num_tokens == 1 and state.is_asked(1) and not state.is_asked(0)


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        (StructuredOutputs(json_object=True), '{"a": [1, null]}', "[1]"),
        (StructuredOutputs(json=True), "[1, {}]", "[1"),
        (StructuredOutputs(json={}), '"x"', "x"),
        (StructuredOutputs(regex=r"\d{3}-[ab]+"), "123-ab", "123-"),
        (StructuredOutputs(choice=("yes", 'say "no"\n')), 'say "no"\n', "say"),
        (StructuredOutputs(grammar='start: "a" DIGIT+\nDIGIT: /[0-9]/'), "a12", "a"),
        (StructuredOutputs(grammar='root ::= "a" [0-9]+ item?\nitem ::= "," root'), "a1,a2", "a1,"),
        (StructuredOutputs(grammar='{"grammars": [{"json_schema": {"const": 7}}]}'), "7", "8"),
        (StructuredOutputs(json=PERSON, disable_any_whitespace=True),
         '{"name":"x","age":1}', '{"name": "x","age":1}'),
        (StructuredOutputs(json=PERSON, whitespace_pattern=r"\t"),
         '{"name":\t"x","age":1}', '{"name": "x","age":1}'),
        (StructuredOutputs(json=PERSON), '{\n  "name": "x",\n  "age": 1\n}', '{  "name": "x", "age": 1}'),
        (StructuredOutputs(json=PERSON), '{"name":"x","age":1}', '{\n\n"name":"x","age":1}'),
        (StructuredOutputs(choice=("a", "b"), before='start: /[a-z]+/ "</t>"'), "thoughts</t>b", "b"),
        (StructuredOutputs(json=PERSON, before='start: /[a-z ]*/ "</t>"'), 'hm</t>{"name":"x","age":1}', '{}'),
    ],
)  # fmt: skip
def test_every_spelling(compiler, tokenizer, asked: StructuredOutputs, good: str, bad: str) -> None:
    assert takes(compiler, tokenizer, asked, good)
    assert not takes(compiler, tokenizer, asked, bad)


STRUCTURES = {
    "type": "structural_tag",
    "triggers": ["<f="],
    "structures": [
        {"begin": "<f=x>", "schema": PERSON, "end": "</f>"},
        {"begin": "<f=y>", "schema": {"const": 1}, "end": "</f>"},
    ],
}


def tags(**options) -> dict:
    form = {
        "type": "triggered_tags",
        "triggers": ["<f="],
        "tags": [
            {
                "begin": one["begin"],
                "content": {"type": "json_schema", "json_schema": one["schema"]},
                "end": one["end"],
            }
            for one in STRUCTURES["structures"]
        ],
        **options,
    }
    return {"type": "structural_tag", "format": form}


ONE, TWO = "so <f=y>1</f>", 'so <f=y>1</f> and <f=x>{"name":"","age":3}</f>!'
BAD = "so <f=y>2</f>"


@pytest.mark.parametrize(
    ("tag", "taken", "refused"),
    [
        (STRUCTURES, ["no tag", ONE + " then", TWO], [BAD, "a <f=z>"]),
        (json.dumps(STRUCTURES), ["no tag"], [BAD]),
        (tags(), ["no tag", ONE, TWO], [BAD]),
        (tags(at_least_one=True), [ONE, TWO], ["no tag"]),
        (tags(stop_after_first=True), ["no tag", ONE], [TWO, ONE + " then"]),
        (tags(at_least_one=True, stop_after_first=True), [ONE], ["no tag", TWO]),
    ],
)  # fmt: skip
def test_structural_tags(compiler, tokenizer, tag, taken: list[str], refused: list[str]) -> None:
    asked = StructuredOutputs(structural_tag=tag)
    assert [takes(compiler, tokenizer, asked, text) for text in taken] == [True] * len(taken)
    assert [takes(compiler, tokenizer, asked, text) for text in refused] == [False] * len(refused)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (StructuredOutputs(), "exactly one of .*; got none"),
        (StructuredOutputs(regex="a", choice=("b",)), "exactly one .*; got regex, choice"),
        (StructuredOutputs(json="{"), "json is no JSON"),
        (StructuredOutputs(json="[1]"), "json must be a JSON schema"),
        (StructuredOutputs(choice=()), "at least one"),
        (StructuredOutputs(grammar="root ::= ("), "neither Lark nor GBNF"),
        (StructuredOutputs(grammar='{"grammars": 1}'), 'must be {"grammars"'),
        (StructuredOutputs(grammar='{"grammars": []}'), "no grammars"),
        (StructuredOutputs(regex="a" * MAX_GRAMMAR_CHARS), "more than"),
        (StructuredOutputs(structural_tag=[1]), "an object is wanted"),
        (StructuredOutputs(structural_tag={"triggers": ["<g"], "structures": STRUCTURES["structures"]}),
         "no trigger begins '<f=x>'"),
        (StructuredOutputs(structural_tag={"triggers": [], "structures": []}), "at least one tag"),
        (StructuredOutputs(structural_tag={"triggers": ["a"], "structures": 1}), "list of objects"),
        (StructuredOutputs(structural_tag={"format": {"type": "sequence"}}), "'triggered_tags', got 'sequence'"),
        (StructuredOutputs(structural_tag=tags(tags=[{"begin": "<f=", "content": {"type": "regex"}, "end": ""}])),
         "'json_schema', got 'regex'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_compiled(asked, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        to_grammar(asked)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {"type": "string"}}, r"Unimplemented keys: \[\"not\"\]"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"type": "strng"}, "strng"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        (False, "not"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_its_keyword(
    compiler, schema, message
) -> None:
    with pytest.raises(ValueError, match=message):
        compiler.state(to_grammar(StructuredOutputs(json=schema)))


def test_what_is_beyond_the_limits_is_refused(compiler) -> None:
    schema = {"allOf": [{"anyOf": [{"properties": {f"{k}{i}": {"type": k}}} for k in ("integer", "string")]}
                        for i in range(16)]}  # fmt: skip
    with pytest.raises(ValueError, match="too large"):
        compiler.state(to_grammar(StructuredOutputs(json=schema)))


def test_equal_grammars_are_compiled_once_and_states_are_apart(compiler, tokenizer) -> None:
    grammar = to_grammar(StructuredOutputs(regex="[ab]{2}"))
    assert compiler.compile(grammar) is compiler.compile(grammar)
    one, other = compiler.state(grammar), compiler.state(grammar)
    a = tokenizer.encode("a", add_special_tokens=False)[0]
    one.accept(a, 0, jump=False)
    assert (one.num_tokens, other.num_tokens) == (1, 0)


def test_kept_grammars_are_bounded(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nibble.engine.grammar.compiler._KEPT", 2)
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    grammars = [to_grammar(StructuredOutputs(regex=text)) for text in ("a", "b", "c")]
    first, _, third = [compiler.compile(grammar) for grammar in grammars]
    assert compiler.compile(grammars[2]) is third
    assert compiler.compile(grammars[0]) is not first


def test_messages_are_of_one_line(compiler) -> None:
    with pytest.raises(ValueError) as error:
        compiler.state(to_grammar(StructuredOutputs(regex="(")))
    assert re.fullmatch(r".{1,500}", str(error.value))
