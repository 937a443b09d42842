"""What a hostile or a broken client may send, over plain HTTP and raw sockets, to a real server process."""

import json
import select
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from .conftest import KEY, ServerProcess

OPEN = {"/livez", "/readyz", "/health"}
CHAT = "/v1/chat/completions"
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def is_openai_error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    return error


def post(
    http: httpx.Client, body: bytes, path: str = CHAT, content_type: str = "application/json"
) -> httpx.Response:
    return http.post(path, content=body, headers={"content-type": content_type})


def raw(server: ServerProcess, request: bytes) -> bytes:
    """What comes back until the server closes or is silent for five seconds."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        answer = b""
        try:
            sock.sendall(request)
            while data := sock.recv(65536):
                answer += data
        except (ConnectionError, TimeoutError):
            pass
        return answer


# Keys


def test_every_route_needs_the_key(server: ServerProcess, http: httpx.Client) -> None:
    routes = http.get("/openapi.json").json()["paths"]
    assert {CHAT, "/v1/completions", "/v1/models", "/metrics", "/tokenize"} <= set(routes)
    paths = [
        *routes,
        "/openapi.json",
        "/no/such/path",
        "/livez/",
        "//livez",
        "/v1/models/tiny",
        "/health/../v1/models",
    ]
    wrong = ("", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x")
    asked = [("POST", key) for key in wrong]
    asked += [(method, "") for method in ("GET", "OPTIONS", "HEAD", "DELETE")]
    with httpx.Client(base_url=server.url) as stranger:
        for path in set(paths) - OPEN:
            for method, key in asked:
                headers = {"Authorization": key} if key else {}
                response = stranger.request(method, path, headers=headers)
                if method in ("GET", "HEAD") and path in ("/", "//livez"):
                    assert b"<title>Nibble</title>" in response.content or method == "HEAD"
                    continue  # the page; the second is a host's name and no path
                assert response.status_code == 401, (method, path, headers)
        for path in OPEN:
            assert stranger.get(path).status_code == 200


def test_two_authorization_headers_are_no_key(server: ServerProcess) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong")]
    assert httpx.get(f"{server.url}/version", headers=headers).status_code == 401


@pytest.mark.parametrize("host", [b"a/livez?", b"a/livez", b"localhost/health#", b"x"])
def test_the_host_header_opens_nothing(server: ServerProcess, host: bytes) -> None:
    answer = raw(
        server, b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    )
    assert answer.split(b" ", 2)[1] in (b"401", b"400")


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"1",
        b'"x"',
        b"null",
        b"{",
        b'{"model":}',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "messages": ' + b"[" * 100_000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": '
        + b"9" * 5000
        + b"}",
    ],
)
def test_bodies_that_are_no_request(http: httpx.Client, body: bytes) -> None:
    is_openai_error(post(http, body), 400)


def test_missing_fields_are_named(http: httpx.Client) -> None:
    assert (
        is_openai_error(post(http, b'{"messages": [{"role": "user", "content": "x"}]}'), 400)[
            "param"
        ]
        == "model"
    )
    assert (
        is_openai_error(post(http, b'{"model": "tiny"}', "/v1/completions"), 400)["param"]
        == "prompt"
    )


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(http: httpx.Client, content_type: str) -> None:
    is_openai_error(post(http, json.dumps(GOOD).encode(), content_type=content_type), 415)


def test_body_too_large(http: httpx.Client) -> None:
    assert is_openai_error(post(http, b" " * (11 * 2**20)), 413)["code"] == "request_too_large"


def test_chunked_body_too_large(server: ServerProcess) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    answer = raw(server, head + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 11)
    assert answer.startswith(b"HTTP/1.1 413") or answer == b""  # reset while we were still sending


def test_huge_header(server: ServerProcess) -> None:
    answer = raw(
        server, b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (20 * 2**20) + b"\r\n\r\n"
    )
    assert not answer.startswith(b"HTTP/1.1 200")


def test_it_lives_on(http: httpx.Client, server: ServerProcess) -> None:
    raw(server, b"\x00\x01\x02 nonsense\r\n\r\n")
    assert http.get("/health").status_code == 200
    assert post(http, json.dumps(GOOD).encode()).status_code == 200


def test_slow_headers_do_not_stop_the_others(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    socks = [socket.create_connection((host, int(port))) for _ in range(50)]
    for sock in socks:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: ")
    assert httpx.get(f"{server.url}/livez").status_code == 200
    assert not select.select(socks, [], [], 0)[0]  # not because these had been given up
    for sock in socks:
        sock.close()


# Errors that FastAPI would answer in its own way


def test_unknown_url(http: httpx.Client) -> None:
    assert is_openai_error(http.get("/v1/nothing"), 404)["code"] == "unknown_url"


def test_wrong_method(http: httpx.Client) -> None:
    assert is_openai_error(http.get(CHAT), 405)["code"] == "method_not_supported"


def test_log_injection_is_not_echoed(http: httpx.Client) -> None:
    response = http.post(CHAT, json=GOOD | {"model": "a\r\nb"}, headers={"x-request-id": "a b"})
    is_openai_error(response, 404)
    assert response.headers["x-request-id"] != "a b"


# The small endpoints


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json().keys() == {"version"}


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post(
        "/tokenize", json={"model": "tiny", "prompt": "a🙂", "return_token_strs": True}
    ).json()
    assert (
        answer["tokens"] == list("a🙂".encode())
        and answer["count"] == 5
        and answer["max_model_len"] == 8192
    )
    assert answer["token_strs"][:2] == ["a", "bytes:\\xf0"]
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "a🙂"}


def test_tokenizer_info(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").raise_for_status().json()
    assert info["eos_token"] == "<|im_end|>" and info["bos_token"] is None
    assert "<|im_start|>" in info["chat_template"]
    assert info["additional_special_tokens"] == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    assert info["vocab_size"] == 259


def test_tools_are_part_of_a_conversations_tokens(http: httpx.Client) -> None:
    function = {"name": "get_weather", "parameters": {"type": "object"}}
    body = {"messages": [{"role": "user", "content": "x"}]}
    told = {**body, "tools": [{"type": "function", "function": function}]}
    plain, more = (http.post("/tokenize", json=given).json()["count"] for given in (body, told))
    assert more > plain + len("get_weather")


def test_tokenize_messages(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"messages": GOOD["messages"]}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": GOOD["messages"]}),
        ("/tokenize", {"prompt": 1}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [264]}),
        ("/detokenize", {"tokens": "x"}),
    ],
)
def test_bad_token_requests(http: httpx.Client, path: str, body: dict) -> None:
    is_openai_error(http.post(path, json=body), 400)


def test_metrics(http: httpx.Client, server: ServerProcess) -> None:
    before = server.metric("nibble_generation_tokens_total")
    http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "x", "max_tokens": 7, "ignore_eos": True},
    )
    assert server.metric("nibble_generation_tokens_total") == before + 7
    text = http.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "gpu_cache_usage_perc",
        "time_to_first_token_seconds_bucket",
        "time_per_output_token_seconds_count",
        "prompt_tokens_total",
        "e2e_request_latency_seconds_sum",
        "request_success_total",
        "num_preemptions_total",
    ):
        assert f"\nvllm:{name}{{" in text, name
    assert "\nnibble_memory_bytes{" in text and "\nnibble_build_info{" in text


def test_vllm_bench_serve_reads_our_stream(http: httpx.Client) -> None:
    """The fields its client sends, and the ones it reads."""
    body = {
        "model": "tiny",
        "prompt": "Hello",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 9,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event for event in response.read().decode().split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all(isinstance(chunk["choices"][0]["text"], str) for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 9


def test_requests_with_different_salts_share_nothing(http: httpx.Client) -> None:
    def cached(salt: str) -> int:
        body = {
            "model": "tiny",
            "prompt": "salted prompt, salted prompt, salted prompt",
            "max_tokens": 1,
            "cache_salt": salt,
        }
        usage = http.post("/v1/completions", json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0 and cached("a") > 0 and cached("b") == 0


def cached_tokens(url: str, key: str, **fields: object) -> int:
    """The prompt tokens that a completion of a prompt of some length found in the cache."""
    body = {
        "model": "tiny",
        "prompt": "a prompt of more than three blocks of sixteen tokens, or so",
    }
    answer = httpx.post(
        f"{url}/v1/completions",
        json=body | {"max_tokens": 1} | fields,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_requests_with_different_keys_share_nothing(
    start_server: Callable[..., ServerProcess], tiny_llama: Path, tmp_path: Path
) -> None:
    """What another tenant has asked must not be told by how much of it is cached (CVE-2025-46570)."""
    small = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--served-model-name", "tiny")
    keys = tmp_path / "keys"
    keys.write_text("# who may ask\nbob:two\n")
    keys.chmod(0o600)
    flags = ("--api-key", "one", "--api-key-file", str(keys))
    server = start_server(tiny_llama, *small, *flags).wait_ready()
    assert cached_tokens(server.url, "one") == 0 and cached_tokens(server.url, "one") == 48
    assert cached_tokens(server.url, "two") == 0 and cached_tokens(server.url, "two") == 48
    # A salt sets apart within a key, and is no way around it.
    assert cached_tokens(server.url, "one", cache_salt="s") == 0
    assert cached_tokens(server.url, "two", cache_salt="s") == 0
    bearer = {"Authorization": "Bearer two"}
    text = httpx.get(f"{server.url}/metrics", headers=bearer).text
    assert 'nibble_api_key_requests_total{api_key="bob",model_name="tiny"} 3.0' in text
    assert 'api_key="key-1",model_name="tiny"} 3.0' in text and '"two"' not in text
    server.process.kill()


def test_cached_tokens_of_a_prompt_count_once_however_often_it_is_sampled(
    server: ServerProcess,
) -> None:
    prompts = [letter + ", sampled several times: " + letter * 48 for letter in "ab"]
    salted = {"cache_salt": "n", "max_tokens": 2}
    assert cached_tokens(server.url, KEY, prompt=prompts, **salted) == 0
    once = cached_tokens(server.url, KEY, prompt=prompts, n=1, **salted)
    assert once == 2 * 64  # blocks of 16 tokens, of prompts that share no beginning
    assert cached_tokens(server.url, KEY, prompt=prompts, n=3, **salted) == once
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": "tiny", "prompt": prompts, "n": 3} | salted | streamed
    headers = {"Authorization": f"Bearer {KEY}"}
    text = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).text
    last = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == once
    assert last["usage"]["prompt_tokens"] == sum(map(len, prompts))
