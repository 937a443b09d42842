"""Requests with a grammar through the whole engine: batches, chunks, preemption, steps that overlap.

A token of the model is a byte, so a text has one tokenization: whether forced tokens are taken without a step or
sampled under the mask, the answer must be the same.
"""

import json
from pathlib import Path

import jsonschema_rs
import pytest
import torch

from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.grammar.structured_outputs import StructuredOutputs
from nibble.engine.messages import AddRequest
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams

from ..backends.test_triton_decoder import triton_runner

EOS = 257
PROMPTS = [list(text.encode()) for text in ("Hello", "Tell me more", "x", "What is it, then?")]
CITY = {
    "type": "object",
    "properties": {
        "latitude": {"type": "integer", "minimum": -90, "maximum": 90},
        "continent": {"enum": ["Africa", "America", "Antarctica", "Asia", "Australia", "Europe"]},
        "is_a_capital": {"type": "boolean"},
    },
    "required": ["latitude", "continent", "is_a_capital"],
    "additionalProperties": False,
}
WORDS = ("yes, by all means", "yes, perhaps", "no", "not now", "not now, later")
CITY_JSON = StructuredOutputs(json=CITY)
TOWN = {"type": "object", "properties": {"n": {"enum": ["Rome", "Rimini", "Ravenna"]}}, "required": ["n"],
        "additionalProperties": False}  # fmt: skip
TOWN_JSON = StructuredOutputs(json=TOWN, disable_any_whitespace=True)


def runner(folder: Path, **options) -> Runner:
    return Runner(
        EngineConfig(
            model=str(folder),
            **{"dtype": "float32", "kv_cache_memory": 1 << 20, "prepared_cache": None, **options},
        )
    )


@pytest.fixture(scope="module", params=["auto", "none"], ids=["cpp", "torch"])
def loaded(request, tiny_llama: Path) -> Runner:
    return runner(tiny_llama, cpu_isa=request.param)


Asked = list[tuple[list[int], dict]]


def generate(loaded: Runner, asked: Asked, **options) -> list[tuple[bytes, str]]:
    """The bytes of each answer and why it ended."""
    config = EngineConfig(
        **{name: getattr(loaded.config, name) for name in loaded.config.__struct_fields__} | options
    )
    core = EngineCore(config, loaded)
    answers: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for index, (prompt, params) in enumerate(asked):
        answers[str(index)] = []
        given = {"max_tokens": 120, "temperature": 0.9, "seed": index, **params}
        core.add(AddRequest(str(index), prompt, SamplingParams(**given)))
    while core.has_work:
        for output in core.step():
            assert not output.error
            answers[output.request_id] += output.token_ids
            if output.logprobs is not None:
                assert [p.token_id for p in output.logprobs] == output.token_ids
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    core.check_idle()
    return [(bytes(t for t in answers[i] if t < 256), reasons[i]) for i in answers]


def test_answers_are_what_was_asked_for(loaded: Runner) -> None:
    validator = jsonschema_rs.validator_for(TOWN)
    asked: Asked = [(prompt, {"structured_outputs": TOWN_JSON}) for prompt in PROMPTS[:2]]
    asked += [(PROMPTS[2], {"structured_outputs": StructuredOutputs(choice=WORDS)})]
    *towns, (word, reason) = generate(loaded, asked)
    for text, why in towns:
        assert why == "stop"
        validator.validate(json.loads(text))
    assert (word.decode() in WORDS, reason) == (True, "stop")


def test_forced_tokens_change_nothing_but_the_steps(loaded: Runner) -> None:
    """A request that wants log-probabilities samples every token under the mask, others jump."""
    asked: Asked = [(p, {"structured_outputs": TOWN_JSON}) for p in PROMPTS[:2]]
    slow: Asked = [(p, {**params, "logprobs": 0}) for p, params in asked]
    assert generate(loaded, asked) == generate(loaded, slow)


def test_neighbours_do_not_feel_it(loaded: Runner) -> None:
    free: Asked = [(p, {"max_tokens": 6, "seed": 5 + i}) for i, p in enumerate(PROMPTS[:2])]
    town = (PROMPTS[2], {"structured_outputs": TOWN_JSON, "seed": 3})
    mixed = generate(loaded, [free[0], town, free[1]])
    assert [mixed[0], mixed[2]] == generate(loaded, free)
    assert [mixed[1]] == generate(loaded, [town])


def test_greedy_takes_the_likeliest_byte_that_can_go_on(tiny_llama: Path) -> None:
    """Against the model's own logits and the list of words."""
    loaded = runner(tiny_llama)
    for prompt in PROMPTS:
        text = b""
        while True:
            logits = loaded.logits([*prompt, *text])[-1]
            words = [word.encode() for word in WORDS if word.encode().startswith(text)]
            allowed = sorted({w[len(text)] for w in words if len(w) > len(text)})
            allowed += [EOS] if text in words else []
            token = allowed[int(logits[torch.tensor(allowed)].argmax())]
            if token == EOS:
                break
            text += bytes([token])
            if [text] == words:
                break
        choice = StructuredOutputs(choice=WORDS)
        asked = {"structured_outputs": choice, "temperature": 0.0}
        assert generate(loaded, [(prompt, asked)]) == [(text, "stop")]


def test_steps_that_are_launched_before_the_last_ones_tokens_are_known(tiny_llama: Path) -> None:
    """Of few tokens: a step takes Triton's interpreter a second."""
    loaded = triton_runner(tiny_llama, graphs=False)
    assert loaded.model.overlaps
    free: Asked = [(PROMPTS[2], {"max_tokens": 3})]
    town = {"structured_outputs": TOWN_JSON}
    both = generate(loaded, [*free, (PROMPTS[0], town)])
    assert both[:1] == generate(loaded, free)
    text, reason = both[1]
    assert (json.loads(text)["n"] in TOWN["properties"]["n"]["enum"], reason) == (True, "stop")


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Runner:
    return runner(tiny_llama)


def test_a_whole_object(plain: Runner) -> None:
    asked: Asked = [(p, {"structured_outputs": CITY_JSON}) for p in PROMPTS]
    slow: Asked = [(p, {**params, "logprobs": 0}) for p, params in asked]
    answers = generate(plain, asked)
    assert answers == generate(plain, slow)
    for text, _ in answers:
        jsonschema_rs.validator_for(CITY).validate(json.loads(text))


def test_few_blocks_and_small_steps_change_nothing(tiny_llama: Path, plain: Runner) -> None:
    asked: Asked = [(p, {"structured_outputs": CITY_JSON}) for p in PROMPTS]
    small = runner(tiny_llama, kv_cache_memory=12 * 16 * 2 * 2 * 2 * 16 * 4, max_model_len=160)
    assert small.num_blocks < 16
    assert generate(small, asked, max_num_batched_tokens=7) == generate(plain, asked)


def test_forced_tokens_end_at_max_tokens(plain: Runner) -> None:
    sure = StructuredOutputs(regex="exactly this long a text")
    for most in (1, 5, 24, 25):
        text, reason = generate(
            plain, [(PROMPTS[0], {"structured_outputs": sure, "max_tokens": most})]
        )[0]
        assert text == b"exactly this long a text"[:most]
        assert reason == ("length" if most < 24 else "stop")


def test_forced_tokens_take_one_step(plain: Runner) -> None:
    core = EngineCore(plain.config, plain)
    sure = StructuredOutputs(regex="exactly this [ab]")
    core.add(AddRequest("a", PROMPTS[0], SamplingParams(max_tokens=50, structured_outputs=sure)))
    steps = []
    while core.has_work:
        steps += [bytes(output.token_ids) for output in core.step()]
    assert steps[0] == b"exactly this "
    assert [len(step) for step in steps] == [13, 1]


def test_the_grammars_end_is_the_answers(plain: Runner) -> None:
    """Whatever is said of the end-of-sequence token and of the fewest tokens: nothing could follow."""
    three = StructuredOutputs(regex="[a-c]{3}")
    asked: Asked = [
        (PROMPTS[0], {"structured_outputs": three, "ignore_eos": True}),
        (PROMPTS[1], {"structured_outputs": three, "min_tokens": 50}),
        (
            PROMPTS[2],
            {"structured_outputs": StructuredOutputs(regex="[a-c]{1,3}"), "min_tokens": 9},
        ),
    ]
    for text, reason in generate(plain, asked):
        assert reason == "stop"
        assert 1 <= len(text) <= 3 and set(text) <= set(b"abc")


def test_stops_bias_and_penalties_hold_within_a_grammar(plain: Runner) -> None:
    letters = StructuredOutputs(regex="[a-d]{20}")
    asked: Asked = [
        (PROMPTS[0], {"structured_outputs": letters, "logit_bias": {97: 100.0, 101: 100.0}}),
        (PROMPTS[0], {"structured_outputs": letters, "stop_token_ids": (97, 98, 99, 100)}),
        (PROMPTS[0], {"structured_outputs": letters, "presence_penalty": 2.0, "temperature": 0.0}),
    ]
    (biased, _), (stopped, why), (penalized, _) = generate(plain, asked)
    assert biased == b"a" * 20
    assert (len(stopped), why) == (1, "stop")
    assert len(penalized) == 20


def test_a_grammar_that_runs_into_its_limits_fails_its_own_request(plain: Runner) -> None:
    core = EngineCore(plain.config, plain)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    core.add(AddRequest("good", PROMPTS[0], params))
    sick = SamplingParams(max_tokens=5, structured_outputs=StructuredOutputs(regex="[ab]+"))
    core.add(AddRequest("bad", PROMPTS[1], sick))
    state = core.scheduler.waiting[1].grammar
    state.matcher.consume_token(ord("z"))  # an error that it never leaves
    ends = {}
    while core.has_work:
        for output in core.step():
            if output.finish_reason:
                ends[output.request_id] = (output.finish_reason, output.error)
    core.check_idle()
    assert ends["good"] == ("length", "")
    assert ends["bad"][0] == "error" and ends["bad"][1].startswith("the grammar is too complex")


def test_a_wrong_grammar_is_refused_at_the_door(plain: Runner) -> None:
    core = EngineCore(plain.config, plain)
    wrong = SamplingParams(structured_outputs=StructuredOutputs(json={"not": {}}))
    with pytest.raises(ValueError, match="not"):
        core.add(AddRequest("a", PROMPTS[0], wrong))
    assert not core.has_work
