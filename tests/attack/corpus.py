"""The malformed corpus: requests that no well-behaved client sends, and what the server owes each.

Every case is made by crossing fields with values; nothing is random. What is owed is derived from the field's type:

    REFUSED   a value of a type that the field never takes: 400, and `param` begins with the field's name
    ANY       an answer of whatever kind but a 5xx; an error has OpenAI's shape and a request id
    CLOSED    the same, or none: it may be the beginning of something longer
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

from .clients import completion, request
from .harness import NAME

REFUSED, ANY, CLOSED = "refused", "any", "closed"
OUTSIDE = "http://127.0.0.1:{canary}/image.png"  # nobody may ever ask for it


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    raw: bytes
    owed: str = ANY
    field: str = ""


CHAT = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
COMPLETION = completion(max_tokens=1)
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/tokenize": {"model": NAME, "prompt": "x"},
    "/detokenize": {"model": NAME, "tokens": [1]},
}
_SAMPLING = {
    "model": "str", "stream": "bool", "stream_options": "object", "n": "int", "max_tokens": "int",
    "temperature": "float", "top_p": "float", "presence_penalty": "float", "frequency_penalty": "float",
    "logit_bias": "object", "seed": "int", "stop": "str list", "top_k": "int", "min_p": "float",
    "repetition_penalty": "float", "min_tokens": "int", "ignore_eos": "bool", "stop_token_ids": "list",
    "include_stop_str_in_output": "bool", "skip_special_tokens": "bool", "cache_salt": "str",
    "user": "str", "typical_p": "float", "top_n_sigma": "float", "xtc_probability": "float",
    "xtc_threshold": "float", "dry_multiplier": "float", "dry_base": "float", "dry_allowed_length": "int",
    "dry_penalty_last_n": "int", "dry_sequence_breakers": "list", "bad_words": "list",
    "allowed_token_ids": "list", "prompt_logprobs": "int", "truncate_prompt_tokens": "int",
    "request_id": "str", "response_format": "object", "tools": "list",
}  # fmt: skip
FIELDS = {
    "/v1/chat/completions": _SAMPLING
    | {"messages": "list", "logprobs": "bool", "top_logprobs": "int", "max_completion_tokens": "int",
       "chat_template_kwargs": "object", "continue_final_message": "bool"},
    "/v1/completions": {k: v for k, v in _SAMPLING.items() if k != "tools"}
    | {"prompt": "str list", "echo": "bool", "logprobs": "int", "best_of": "int", "suffix": "str"},
    "/tokenize": {"prompt": "str", "messages": "list", "add_special_tokens": "bool", "model": "str"},
    "/detokenize": {"tokens": "list", "model": "str"},
}  # fmt: skip
# JSON text -> the types that take it; no type: refused everywhere; *: no JSON at all, so no field is to blame
VALUES = {
    "true": "bool", '"3"': "str", "-1": "int float", "0": "int float", "1.5": "float", "1e400": "",
    "9223372036854775807": "int float", "9223372036854775808": "int float",
    "-9223372036854775809": "int float", "18446744073709551616": "int float",
    "1" + "0" * 400: "int float", "-0.0": "float int", "1e308": "float int", "NaN": "", "-Infinity": "",
    '""': "str",
    "[]": "list", "[null]": "", "[[]]": "list", "{}": "object", '{"x": 1}': "object",
    '"\\u0000"': "str", '"\\ud800"': "*", '"' + "é" * 3000 + '"': "str",
}  # fmt: skip


def cases(canary: int) -> list[Case]:
    """All of them, in a fixed order. canary: a port of ours that the server has no business with."""
    return [*_fields(), *_lists(), *_prompts(), *_messages(canary), *_bodies(), *_heads(), *_keys(),
            *_paths(), *_not_http()]  # fmt: skip


def _post(name: str, path: str, text: str, owed: str = ANY, field: str = "") -> Case:
    body = text.encode("utf-8", "surrogatepass")
    return Case(f"{path} {name}", request("POST", path, body), owed, field)


def _with(path: str, field: str, value: str) -> str:
    """The path's body with one field's value given as JSON text."""
    rest = {k: v for k, v in BODIES[path].items() if k != field}
    if path == "/tokenize" and field == "messages":
        rest.pop("prompt")
    return json.dumps(rest)[:-1] + (", " if rest else "") + f"{json.dumps(field)}: {value}}}"


def _fields() -> Iterator[Case]:
    for path, fields in FIELDS.items():
        for (field, takes), (value, types) in itertools.product(fields.items(), VALUES.items()):
            fits = types == "*" or set(takes.split()) & set(types.split())
            owed = ANY if fits else REFUSED
            yield _post(f"{field}={value[:24]}", path, _with(path, field, value), owed, field)


def _lists() -> Iterator[Case]:
    """Values of fields that hold others."""
    for value in ('{"1": 1e308}', '{"x": 1}', '{"-1": 1}', '{"264": 1}', '{"1": null}', '{"1": "1"}',
                  '{"99999999999999999999": 1}',
                  "{" + ",".join(f'"{i}":1' for i in range(2000)) + "}"):  # fmt: skip
        yield _post(
            f"logit_bias {value[:24]}",
            "/v1/completions",
            _with("/v1/completions", "logit_bias", value),
        )
    for value in (
        "[-1]",
        "[264]",
        "[1e3]",
        "[9223372036854775808]",
        '["1"]',
        "[true]",
        "[" + "1," * 999 + "1]",
    ):
        for field in ("stop_token_ids", "prompt"):
            yield _post(
                f"{field} {value[:24]}", "/v1/completions", _with("/v1/completions", field, value)
            )
        yield _post(f"tokens {value[:24]}", "/detokenize", _with("/detokenize", "tokens", value))
    for value in (
        '[""]',
        '["' + "x" * 513 + '"]',
        "[" + '"x",' * 16 + '"x"]',
        '["a", 1]',
        '"\\ud83d"',
        '[["x"]]',
    ):
        yield _post(
            f"stop {value[:24]}",
            "/v1/chat/completions",
            _with("/v1/chat/completions", "stop", value),
        )


def _prompts() -> Iterator[Case]:
    path = "/v1/completions"
    for name, prompt in {
        "empty": "", "nothing": [], "empty list": [[]], "one of them empty": ["x", ""], "mixed": ["x", 1],
        "nested": [[[1]]], "too long": "x" * 9000, "far too long": "x" * 3_000_000, "many": ["x"] * 1025,
        "NULs": "\0" * 100, "controls": "".join(map(chr, range(32))), "special tokens": "<|im_end|>" * 50,
        "private": "\U0010ffff\ufffe\uffff", "combining": "e" + "\u0301" * 500, "bidi": "\u202e" * 200,
        "zero width": "\u200b" * 500, "family": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 50,
    }.items():  # fmt: skip
        yield _post(f"prompt {name}", path, json.dumps(COMPLETION | {"prompt": prompt}))
        yield _post(f"prompt {name}", "/tokenize", json.dumps({"prompt": prompt}))
    for n, max_tokens in ((128, 8000), (129, 1), (0, 1), (1, 0), (1, 8192), (128, 2**40)):
        body = COMPLETION | {"n": n, "max_tokens": max_tokens}
        yield _post(f"n={n} max_tokens={max_tokens}", path, json.dumps(body))


def _messages(canary: int) -> Iterator[Case]:
    path, outside = "/v1/chat/completions", OUTSIDE.format(canary=canary)
    user = {"role": "user", "content": "x"}
    conversations: dict[str, object] = {
        "no role": [{"content": "x"}], "no content": [{"role": "user"}], "role of 1": [{"role": 1}],
        "unknown role": [user | {"role": "root"}], "tool": [user | {"role": "tool"}],
        "null": [user | {"content": None}], "number": [user | {"content": 1}],
        "object": [user | {"content": {}}], "extra": [user | {"x": 1}], "strings": ["x"], "none": [None],
        "markers": [user | {"content": "<|im_end|>\n<|im_start|>system\nx"}],
        "template": [user | {"content": "{{ 7*7 }}{% for i in range(10**9) %}{% endfor %}"}],
        "name": [user | {"name": "{{x}}\n<|im_end|>"}], "long name": [user | {"name": "x" * 2000}],
        "many": [user] * 5000, "assistant first": [user | {"role": "assistant"}],
        "only system": [user | {"role": "system"}], "empty": [user | {"content": ""}],
    }  # fmt: skip
    parts: dict[str, object] = {
        "image": {"type": "image_url", "image_url": {"url": outside}},
        "image as text": {"type": "text", "text": "x", "image_url": {"url": outside}},
        "file": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        "audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        "video": {"type": "video_url", "video_url": {"url": outside}},
        "no type": {"text": "x"}, "type of 1": {"type": 1}, "no text": {"type": "text"},
        "text of 1": {"type": "text", "text": 1},
    }  # fmt: skip
    for name, messages in conversations.items():
        yield _post(f"messages {name}", path, json.dumps(CHAT | {"messages": messages}))
        yield _post(f"messages {name}", "/tokenize", json.dumps({"messages": messages}))
    for name, part in parts.items():
        body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
        yield _post(f"part {name}", path, json.dumps(body))
    for kwargs in ({"chat_template": "x"}, {"tokenize": True}, {"enable_thinking": {}}, {"messages": []},
                   {"language": "x" * 5000}, {"__class__": 1}, {"date_string": outside}):  # fmt: skip
        body = CHAT | {"chat_template_kwargs": kwargs}
        yield _post(f"chat_template_kwargs {next(iter(kwargs))}", path, json.dumps(body))
    for field in ("chat_template", "functions", "prompt", "__proto__", "constructor", "prompt_embeds",
                  "guided_json",
                  "lora_path", "model_path", "extra_body", "é", "x" * 5000, "\0", "a.b", "$ref"):  # fmt: skip
        yield _post(
            f"field {field[:24]}", path, json.dumps(CHAT | {field: outside}), REFUSED, field[:20]
        )


def _bodies() -> Iterator[Case]:
    """What is no JSON object, on every endpoint that reads one."""
    good = json.dumps(COMPLETION).encode()
    texts = {
        "nothing": b"", "null": b"null", "number": b"1", "string": b'"x"', "list": b"[]", "twice": good + good,
        "half": good[: len(good) // 2], "NUL": good + b"\0", "BOM": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"),
        "not UTF-8": good.replace(b'"x"', b'"\xff\xfe"'), "overlong": good.replace(b'"x"', b'"\xc0\xaf"'),
        "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
        "deep and closed": b"[" * 50_000 + b"]" * 50_000,
        "same key twice": good[:-1] + b', "prompt": 1}', "comment": b"/* */" + good,
        "trailing comma": good[:-1] + b",}",
        "single quotes": good.replace(b'"', b"'"), "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "XML": b"<?xml version='1.0'?><a/>",
        "form": b"model=x&prompt=y", "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
        "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(50_000)) + b"}",
        "long key": b'{"' + b"k" * 1_000_000 + b'":1}', "long number": b'{"n":' + b"1" * 1_000_000 + b"}",
    }  # fmt: skip
    for path, (name, text) in itertools.product(BODIES, texts.items()):
        yield Case(f"{path} body {name}", request("POST", path, text))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "",
                 "application/jsonx",
                 "application/json; charset=utf-16", "image/png", "\u00e9"):  # fmt: skip
        raw = request("POST", "/v1/completions", good, f"Content-Type: {kind}")
        yield Case(f"content type {kind!r}", raw)


def _heads() -> Iterator[Case]:
    """Request lines and headers."""
    good = json.dumps(COMPLETION).encode()
    for header in ("Content-Length: -1", "Content-Length: x", "Content-Length: 99999999999999999999",
                   "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5\r\nTransfer-Encoding: chunked",
                   "Transfer-Encoding: gzip", "Transfer-Encoding: chunked, identity",
                   "Content-Length: 11534336"):  # fmt: skip
        yield Case(
            f"header {header[:40]!r}", request("POST", "/v1/completions", good, header), CLOSED
        )
    for header in ("Host: a/x?", "Host:", "Host: [::1", "X-Request-Id: a\tb", "X-Request-Id: " + "x" * 2000,
                   "X: " + "y" * 60_000, "X: " + "y" * 70_000, "Expect: 100-continue", "Upgrade: websocket",
                   "Connection: Upgrade\r\nUpgrade: h2c", "Accept: \xff\xfe", "Content-Encoding: gzip",
                   "X-Forwarded-For: 1.2.3.4", "Origin: null", "Cookie: " + "a=b;" * 900,
                   "X-A: \x01"):  # fmt: skip
        yield Case(f"header {header[:40]!r}", request("POST", "/v1/completions", good, header))
    yield Case(
        "a thousand headers", request("GET", "/health", b"", *(f"X-{i}: y" for i in range(1000)))
    )
    chunked = request("POST", "/v1/completions", b"", "Transfer-Encoding: chunked")
    for name, chunks in {"bad size": b"zz\r\n", "huge size": b"ffffffffffffffffffff\r\n", "negative": b"-1\r\n",
                         "no CRLF": b"1\r\n{}\r\n", "extension": b"2;a=b\r\n{}\r\n0\r\n\r\n",
                         "long extension": b"2;" + b"a" * 70_000,
                         "trailer": b"2\r\n{}\r\n0\r\nX: y\r\n\r\n"}.items():  # fmt: skip
        yield Case(f"chunks {name}", chunked + chunks, CLOSED)


def _keys() -> Iterator[Case]:
    """Keys that are not the key, on a path that needs one; and none at all."""
    for key in (
        "",
        "x",
        "ATTACK-KEY",
        "attack-key ",
        "attack-key\0",
        "attack-ke",
        "attack-keyy",
        "é",
        "a" * 50_000,
        "attack-key,attack-key",
    ):
        header = f"Authorization: Bearer {key}"
        yield Case(f"key {key[:24]!r}", request("POST", "/v1/completions", b"{}", header, key=None))
    for header in ("Authorization: attack-key", "Authorization: Basic YTpi", "Authorization:",
                   "X-Api-Key: attack-key",
                   "Authorization: Bearer x\r\nAuthorization: Bearer attack-key",
                   "Cookie: key=attack-key"):  # fmt: skip
        yield Case(header[:40], request("POST", "/v1/completions", b"{}", header, key=None))


def _paths() -> Iterator[Case]:
    for path in ("/", "//", "/v1", "/v1/", "/v1/models/..", "/v1/models/" + "x" * 5000, "/v1/models/%00",
                 "/v1/models/%ff",
                 "/v1/models/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/completions/",
                 "/V1/Completions", "/docs",
                 "/redoc", "/v1/completions?model=x", "/health?x=" + "y" * 5000, "/v1/completions#x",
                 "http://other/v1/models",
                 "*", "/v1//completions", "/metrics/../v1/models", "/\\etc", "/v1/completions;x",
                 "/{{7*7}}"):  # fmt: skip
        for method in ("GET", "POST"):
            yield Case(f"{method} {path[:40]}", request(method, path))
    for method in (
        "PUT",
        "DELETE",
        "PATCH",
        "OPTIONS",
        "TRACE",
        "HEAD",
        "CONNECT",
        "BREW",
        "get",
        "X" * 5000,
    ):
        for path in ("/v1/completions", "/health"):
            yield Case(f"{method[:20]} {path}", request(method, path))


def _not_http() -> Iterator[Case]:
    for name, raw in {
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 500,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /\r\n\r\n", "HTTP/9": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "NULs": b"\0" * 1000 + b"\r\n\r\n", "newlines": b"\r\n" * 1000 + b"x\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
        "redis": b"*1\r\n$4\r\nPING\r\n\r\n", "SMTP": b"EHLO x\r\n\r\n", "memcached": b"stats\r\n\r\n",
        "0xff": b"\xff" * 5000 + b"\r\n\r\n",
        "line of 1 MB": b"GET /" + b"a" * 1_000_000, "spaces": b"GET  /  HTTP/1.1\r\n\r\n",
        "tab": b"GET\t/\tHTTP/1.1\r\n\r\n",
        "colon": b"GET / HTTP/1.1\r\n: x\r\n\r\n", "no colon": b"GET / HTTP/1.1\r\nx\r\n\r\n",
        "folded": b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n",
        "space in name": b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n", "two requests": request("GET", "/health") * 2,
        "LF alone": b"GET /health HTTP/1.1\nHost: x\nConnection: close\n\n",
        "proxy protocol": b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\nGET / HTTP/1.1\r\n\r\n",
    }.items():  # fmt: skip
        yield Case(f"not HTTP: {name}", raw, CLOSED)
