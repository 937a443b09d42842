"""TGI's endpoints against a real server process, by raw HTTP; the model's tokens are bytes."""

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

from .conftest import KEY, ServerProcess

HEADERS = {"Authorization": f"Bearer {KEY}"}


def post(server: ServerProcess, path: str, inputs: str = "Hello", **parameters: Any) -> Any:
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 12} | parameters}
    return httpx.post(f"{server.url}{path}", json=body, headers=HEADERS, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data:") for line in lines)
    return [json.loads(line[5:]) for line in lines]


def completion(server: ServerProcess, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "temperature": 0} | fields
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=60)
    return answer.json()["choices"][0]


def test_it_is_greedy_unless_a_field_asks_for_sampling(server: ServerProcess) -> None:
    greedy = completion(server)["text"]
    for plain in ({}, {"do_sample": False}, {"temperature": 1.0}, {"top_p": 1.0}, {"seed": 5}):
        assert post(server, "/generate", **plain).json() == {"generated_text": greedy}
    drawn = completion(server, temperature=1, seed=5)["text"]
    assert post(server, "/generate", do_sample=True, seed=5).json()["generated_text"] == drawn
    warm = completion(server, temperature=0.7, seed=5)["text"]
    assert post(server, "/generate", temperature=0.7, seed=5).json()["generated_text"] == warm
    cut = completion(server, temperature=1, top_k=9, seed=5)["text"]
    assert post(server, "/generate", top_k=9, seed=5).json()["generated_text"] == cut


def test_the_path_without_a_name_gives_a_list_or_a_stream(server: ServerProcess) -> None:
    whole = post(server, "/generate").json()
    assert post(server, "/").json() == [whole]
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 12}, "stream": True}
    streamed = httpx.post(f"{server.url}/", json=body, headers=HEADERS, timeout=60)
    assert events(streamed)[-1]["generated_text"] == whole["generated_text"]


def test_details_and_prefill(server: ServerProcess) -> None:
    asked = {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "seed": 7}
    details = post(server, "/generate", **asked).json()["details"]
    same = completion(server, logprobs=2, prompt_logprobs=0)
    assert [t["text"] for t in details["tokens"]] == [*same["text"]] or "\ufffd" in same["text"]
    assert [t["logprob"] for t in details["tokens"]] == same["logprobs"]["token_logprobs"]
    assert [len(top) for top in details["top_tokens"]] == [2] * 12
    assert [top[0]["id"] for top in details["top_tokens"]] == [t["id"] for t in details["tokens"]]
    assert [t["text"] for t in details["prefill"]] == [*"Hello"]
    assert details["prefill"][0]["logprob"] is None
    scored = [next(iter(entry.values()))["logprob"] for entry in same["prompt_logprobs"][1:]]
    assert [t["logprob"] for t in details["prefill"][1:]] == scored
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == (
        "length",
        12,
        7,
    )


@pytest.mark.parametrize("parameters", [{}, {"stop": ["e", "t"]}, {"do_sample": True, "seed": 3}])
def test_a_stream_is_the_whole_token_by_token(server: ServerProcess, parameters: dict) -> None:
    whole = post(server, "/generate", details=True, max_new_tokens=40, **parameters).json()
    streamed = events(post(server, "/generate_stream", max_new_tokens=40, **parameters))
    assert [event["index"] for event in streamed] == list(range(1, len(streamed) + 1))
    tokens = [event["token"] for event in streamed]
    said = "".join(token["text"] for token in tokens if not token["special"])
    assert said == whole["generated_text"]
    assert [event["generated_text"] for event in streamed[:-1]] == [None] * (len(streamed) - 1)
    last = streamed[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert last["details"]["input_length"] == 5
    assert last["details"]["generated_tokens"] == len(streamed)
    for name in ("finish_reason", "generated_tokens", "seed"):
        assert last["details"][name] == whole["details"][name]
    ids = [event["token"]["id"] for event in streamed]
    assert ids == [token["id"] for token in whole["details"]["tokens"]]


def test_why_it_ended(server: ServerProcess) -> None:
    text = post(server, "/generate", max_new_tokens=30).json()["generated_text"]
    stopped = post(server, "/generate", max_new_tokens=30, stop=[text[6:8]], details=True).json()
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == text[: text.index(text[6:8])]
    chosen = {"type": "regex", "value": "ab"}  # ends by itself
    ended = post(server, "/generate", grammar=chosen, details=True).json()
    assert (ended["generated_text"], ended["details"]["finish_reason"]) == ("ab", "eos_token")


def test_the_most_probable_of_several(server: ServerProcess) -> None:
    asked = {"do_sample": True, "seed": 5, "details": True}
    answer = post(server, "/generate", best_of=4, **asked).json()
    others = answer["details"]["best_of_sequences"]

    def mean(tokens: list[dict]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    means = [mean(answer["details"]["tokens"]), *(mean(other["tokens"]) for other in others)]
    assert len(means) == 4 and means == sorted(means, reverse=True)
    best = completion(server, temperature=1, seed=5, best_of=4)["text"]
    assert answer["generated_text"] == best


def test_full_text_truncation_and_grammars(server: ServerProcess) -> None:
    plain = post(server, "/generate").json()["generated_text"]
    full = post(server, "/generate", return_full_text=True).json()["generated_text"]
    assert full == "Hello" + plain
    cut = post(server, "/generate", inputs="abcHello", truncate=5).json()["generated_text"]
    assert cut == plain
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}
    for grammar in (
        {"type": "json", "value": schema | {"additionalProperties": False}},
        {
            "type": "json_schema",
            "value": {"name": "x", "schema": schema | {"additionalProperties": False}},
        },
    ):
        said = post(server, "/generate", grammar=grammar, max_new_tokens=60).json()
        assert jsonschema_rs.is_valid(schema, json.loads(said["generated_text"]))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0}, "temperature"),
        ({"watermark": True}, "watermark"),
        ({"adapter_id": "x"}, "adapter_id"),
        ({"nonsense": 1}, "nonsense"),
        ({"max_new_tokens": 10**6}, "context length"),
        ({"grammar": {"type": "regex", "value": "("}}, "regex"),
    ],
)
def test_errors_are_in_tgis_shape(server: ServerProcess, parameters: dict, named: str) -> None:
    answer = post(server, "/generate", **parameters)
    assert answer.status_code == 400 and set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == "validation" and named in answer.json()["error"]
    assert httpx.post(f"{server.url}/generate", json={"inputs": "a"}).status_code == 401


def test_a_stream_takes_no_best_of(server: ServerProcess) -> None:
    answer = post(server, "/generate_stream", best_of=2, do_sample=True)
    assert answer.status_code == 400 and "best_of" in answer.json()["error"]


def test_info_and_chat_tokenize(server: ServerProcess) -> None:
    info = httpx.get(f"{server.url}/info", headers=HEADERS).json()
    assert info["model_id"] == "tiny" and info["max_total_tokens"] == info["max_input_tokens"] + 1
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi ü"}]}
    answer = httpx.post(f"{server.url}/chat_tokenize", json=body, headers=HEADERS).json()
    text, tokens = answer["templated_text"], answer["tokenize_response"]
    assert "Hi ü" in text and "".join(token["text"] for token in tokens) == text
    same = httpx.post(f"{server.url}/tokenize", json=body, headers=HEADERS).json()["tokens"]
    assert [token["id"] for token in tokens] == same
    assert all(text[t["start"] : t["stop"]] == t["text"] for t in tokens)
