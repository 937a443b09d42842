"""Sampling fields beyond OpenAI's, by the openai client against real server processes. The model's tokens are bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .conftest import KEY, ServerProcess
from .test_openai_client import HELLO

ABC = {str(byte): 60 for byte in b"abcdefgh"}


def connected(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with connected(server) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    own = {"model", "prompt", "max_tokens", "temperature", "logit_bias", "n", "best_of", "echo"}
    own |= {"logprobs", "stream", "seed"}
    given = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "logit_bias": ABC} | fields
    extra = {name: given.pop(name) for name in [*given] if name not in own}
    return client.completions.create(**given, extra_body=extra)


def text(client: openai.OpenAI, **fields: Any) -> str:
    return complete(client, **fields).choices[0].text


def refused(client: openai.OpenAI, **fields: Any) -> tuple[str, str]:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    return caught.value.param, caught.value.message


def test_only_allowed_tokens(client: openai.OpenAI) -> None:
    assert set(text(client, allowed_token_ids=[*b"xyz"], max_tokens=40)) == set("xyz")
    assert refused(client, allowed_token_ids=[])[0] == "allowed_token_ids"
    assert refused(client, allowed_token_ids=[264])[0] == "allowed_token_ids"


def test_what_leaves_no_token_is_the_requests_own_fault(client: openai.OpenAI) -> None:
    param, message = refused(client, allowed_token_ids=[*b"x"], bad_words=["xxx"])
    assert param == "allowed_token_ids" and "leave no token" in message


def test_bad_words_are_not_said(client: openai.OpenAI) -> None:
    plain = text(client, temperature=0, max_tokens=30)
    bad = plain[4:7]
    assert bad not in text(client, temperature=0, max_tokens=30, bad_words=[bad])
    assert text(client, temperature=0, max_tokens=6, bad_words=[bad]) == plain[:6]
    assert refused(client, bad_words=[""])[0] == "bad_words.0"


def test_a_repetition_is_broken_off(client: openai.OpenAI) -> None:
    pushed = {str(ord("a")): 30, str(ord("d")): 29}
    loop = {"prompt": "abcabcabc", "temperature": 0, "max_tokens": 1, "logit_bias": pushed}
    assert text(client, **loop) == "a"
    loop["dry_multiplier"] = 50
    assert text(client, **loop) == "d"
    assert text(client, **loop, dry_sequence_breakers=["c"]) == "a"
    assert text(client, **loop, dry_penalty_last_n=3) == "a"
    assert text(client, **loop, dry_allowed_length=7) == "a"


def test_filters_reach_the_sampler(client: openai.OpenAI) -> None:
    two = {str(ord("a")): 60.0, str(ord("b")): 59.0}  # of the rest nothing is ever drawn
    many = {"logit_bias": two, "max_tokens": 200, "seed": 3, "ignore_eos": True}
    assert set(text(client, **many)) == {"a", "b"}
    assert set(text(client, **many, xtc_probability=1, xtc_threshold=0.01)) == {"b"}
    assert len(set(text(client, **many, typical_p=0.01))) == 1
    assert set(text(client, **many, top_n_sigma=0.001)) == {"a"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("typical_p", 0),
        ("top_n_sigma", 101),
        ("xtc_probability", 1.5),
        ("xtc_threshold", -0.1),
        ("dry_multiplier", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_penalty_last_n", -2),
        ("truncate_prompt_tokens", -2),
        ("prompt_logprobs", 21),
        ("request_id", "a b"),
        ("best_of", 0),
    ],
)
def test_what_is_out_of_range_is_named(client: openai.OpenAI, field: str, value: float) -> None:
    assert refused(client, **{field: value})[0] == field


def test_best_of_gives_the_most_probable(client: openai.OpenAI) -> None:
    drawn = {"seed": 5, "logit_bias": {}, "logprobs": 0, "ignore_eos": True}
    every = complete(client, **drawn, prompt=["Hello", "Bye"], n=6).choices

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens)

    best = complete(client, **drawn, prompt=["Hello", "Bye"], n=2, best_of=6)
    want = [sorted(some, key=mean, reverse=True)[:2] for some in (every[:6], every[6:])]
    assert [c.text for c in best.choices] == [c.text for some in want for c in some]
    assert [c.index for c in best.choices] == [0, 1, 2, 3]
    assert best.usage.completion_tokens == 12 * 12
    plain = complete(client, **drawn | {"logprobs": None}, n=1, best_of=6)
    assert plain.choices[0].text == want[0][0].text and plain.choices[0].logprobs is None
    echoed = complete(client, **drawn | {"logprobs": None}, best_of=6, echo=True)
    assert echoed.choices[0].text == "Hello" + want[0][0].text
    assert "at least 'n'" in refused(client, n=3, best_of=2)[1]
    assert "stream" in refused(client, best_of=2, stream=True)[1]


def test_prompt_logprobs_of_both_kinds_of_answers(client: openai.OpenAI) -> None:
    ids = [*b"The first"]
    scored = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias={})
    want = scored.choices[0].logprobs.token_logprobs[1 : len(ids)]
    choice = complete(client, prompt=ids, prompt_logprobs=2, max_tokens=1).choices[0]
    assert choice.logprobs is None and choice.prompt_logprobs[0] is None
    entries = choice.prompt_logprobs[1:]
    assert [e[str(i)]["logprob"] for e, i in zip(entries, ids[1:], strict=True)] == pytest.approx(
        want, abs=1e-4
    )
    for entry, i in zip(entries, ids[1:], strict=True):
        assert entry[str(i)]["decoded_token"] == chr(i)
        by_rank = sorted(entry.values(), key=lambda e: e["rank"])
        assert [e["rank"] for e in by_rank][:2] == [1, 2] and len(entry) in (2, 3)
        assert by_rank == sorted(by_rank, key=lambda e: -e["logprob"])
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    assert all(len(entry) == 1 for entry in answer.prompt_logprobs[1:])
    assert refused(client, prompt_logprobs=1, stream=True)[0] == "prompt_logprobs"


def test_a_prompt_is_cut_at_its_beginning(client: openai.OpenAI) -> None:
    cut = {"temperature": 0, "logit_bias": {}, "max_tokens": 6, "ignore_eos": True}
    want = text(client, prompt="fghij", **cut)
    answer = complete(client, prompt="abcdefghij", truncate_prompt_tokens=5, **cut)
    assert answer.choices[0].text == want and answer.usage.prompt_tokens == 5
    assert (
        complete(client, prompt=[*b"abcdefghij"], truncate_prompt_tokens=5, **cut).choices[0].text
        == want
    )
    limit = client.models.list().data[0].max_model_len
    long = complete(client, prompt="x" * (limit + 50), truncate_prompt_tokens=-1, **cut)
    assert long.usage.prompt_tokens == limit - 6
    assert refused(client, truncate_prompt_tokens=0)[0] == "truncate_prompt_tokens"
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "y" * (limit + 50)}],
        max_tokens=6,
        extra_body={"truncate_prompt_tokens": 20},
    )
    assert chat.usage.prompt_tokens == 20


def test_a_suffix_needs_a_model_that_fills_in_the_middle(client: openai.OpenAI) -> None:
    param, message = refused(client, suffix="end")
    assert param == "suffix" and "no tokens to fill in the middle" in message
    assert "echo" in refused(client, suffix="end", echo=True)[1]
    assert text(client, temperature=0, suffix="") == text(client, temperature=0)


def test_what_no_model_here_does_is_refused_in_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="hears, speaks or paints"):
        client.audio.speech.create(model="tiny", voice="alloy", input="Hello")
    with pytest.raises(openai.NotFoundError, match="hears, speaks or paints"):
        client.images.generate(model="tiny", prompt="a cat")


def test_the_id_that_was_asked_for(client: openai.OpenAI) -> None:
    assert complete(client, request_id="mine-7").id == "cmpl-mine-7"
    ids = {
        chunk.id
        for chunk in client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=3, stream=True, extra_body={"request_id": "x"}
        )
    }
    assert ids == {"chatcmpl-x"}
    assert complete(client, request_id="mine-7").id == "cmpl-mine-7"  # it need not be new


def test_priorities_where_the_server_keeps_to_arrival(client: openai.OpenAI) -> None:
    param, message = refused(client, priority=1)
    assert param == "priority" and "--scheduling-policy priority" in message
    assert complete(client, priority=0).choices


def test_priorities_where_it_does_not(
    start_server: Callable[..., ServerProcess], tiny_llama: Path
) -> None:
    flags = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--served-model-name", "tiny")
    policy = ("--scheduling-policy", "priority")
    with connected(start_server(tiny_llama, *flags, *policy).wait_ready()) as client:
        assert complete(client, priority=-3).choices and complete(client, priority=7).choices
