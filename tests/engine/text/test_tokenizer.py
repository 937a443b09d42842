"""The tokenizer against transformers' AutoTokenizer on the same files."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nibble.engine.text.tokenizer import Tokenizer, TooManyTokens
from nibble.errors import CheckpointError

from .tiny_tokenizers import CHATML, byte_fallback, byte_level

TEXTS = [
    "the cat sat",
    " lead and  double",
    "naïve 🤗 日本",
    "",
    "a\n\tb",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>hi</s> the",
]
CHAT = [{"role": "user", "content": "the <b>cat</b> "}, {"role": "assistant", "content": "sat on "}]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
def test_encode_and_decode_as_transformers(
    tmp_path: Path, make: Callable[..., Path], config: dict
) -> None:
    folder = make(tmp_path, **config)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_tokens_the_configuration_adds(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path, pad_token="<pad>")
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("the<pad>cat") == theirs.encode("the<pad>cat")
    assert ours.decode(ours.encode("<pad>the")) == theirs.decode(
        theirs.encode("<pad>the"), skip_special_tokens=True
    )


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_token_bytes_add_up_to_the_text(tmp_path: Path, make: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_pretrained(make(tmp_path))
    for text in ("the cat", "hi 🤗 é", "a\nb\x00"):
        data = b"".join(
            map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False))
        )
        assert (
            data.decode().removeprefix(" ") == text
        )  # SentencePiece puts a space before the first word
    assert tokenizer.token_bytes(10**6) == b""


def test_token_str_writes_cut_characters_as_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_fallback(tmp_path))
    ids = tokenizer.encode("🤗", add_special_tokens=False)[1:]
    assert [tokenizer.token_str(i) for i in ids] == [
        "bytes:\\xf0",
        "bytes:\\x9f",
        "bytes:\\xa4",
        "bytes:\\x97",
    ]
    assert tokenizer.token_str(tokenizer.encode("the", add_special_tokens=False)[0]) == " the"


@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_chat_template_as_transformers(tmp_path: Path, options: dict) -> None:
    folder = byte_level(tmp_path, chat_template=CHATML)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(
        CHAT, tokenize=False, **options
    )


TEMPLATES = {
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}",
    "loopcontrols": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "trim": "{% if true %}\n  {{ bos_token }}\n  {% endif %}\nend",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "variables": "{{ eos_token }}{{ flavour }}{{ dict(a=1) }}{{ strftime_now('%Y')|length }}{{ missing }}",
    "trimmed message": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_template_language_as_transformers(tmp_path: Path, template: str) -> None:
    folder = byte_level(tmp_path, chat_template=template)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tools = [
        {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}
    ]
    options = {"tools": tools, "add_generation_prompt": False, "flavour": "sweet"}
    assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(
        CHAT, tokenize=False, **options
    )


def test_continuing_a_message_that_the_template_trims_or_drops(tmp_path: Path) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    folder = byte_level(tmp_path, chat_template=TEMPLATES["trimmed message"])
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(
        CHAT, tokenize=False, **options
    )
    dropping = Tokenizer.from_pretrained(
        byte_level(tmp_path, chat_template=TEMPLATES["loopcontrols"])
    )
    with pytest.raises(ValueError, match="leaves out the last message"):
        dropping.apply_chat_template(CHAT, **options)
    with pytest.raises(ValueError, match="no text to continue"):
        ours.apply_chat_template([{"role": "assistant", "content": None}], **options)


def test_homes_of_the_chat_template(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = byte_level(tmp_path, chat_template=named)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(CHAT) == "plain"
    assert tokenizer.apply_chat_template(CHAT, tools=[{}]) == "tools"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_pretrained(folder).apply_chat_template(CHAT) == "file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}", "no valid Jinja: line 1"),
        ("{{ messages[9].content }}", "template"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "_x"),
    ],
)
def test_a_template_that_fails_or_misbehaves_is_a_value_error(
    tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(CHAT)


def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize("home", ["cache", "no home"])
def test_a_gguf_files_tokenizer_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    made = []
    monkeypatch.setattr("nibble.engine.text.tokenizer_files._CACHE", tmp_path / home)
    monkeypatch.setattr("nibble.quant.formats.gguf.container.GgufFile", lambda path: path)
    monkeypatch.setattr(
        "nibble.quant.formats.gguf.side_files.write_side_files",
        lambda file, out: made.append(byte_level(out)),
    )
    if home == "no home":
        (tmp_path / home).write_text("not a folder")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    tokenizers = [Tokenizer.from_pretrained(path) for path in (file, file, tmp_path)]
    assert [tokenizer.vocab_size for tokenizer in tokenizers] == [tokenizers[0].vocab_size] * 3
    assert len(made) == (1 if home == "cache" else 3)
    file.write_bytes(b"GGUF, another")
    Tokenizer.from_pretrained(file)
    assert len(made) == (2 if home == "cache" else 4)


def test_eos_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    assert Tokenizer.from_pretrained(folder).eos_token_ids == [2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9]}))
    assert Tokenizer.from_pretrained(folder).eos_token_ids == [0, 2, 9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"version":', "is not a tokenizer"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "makes no sense"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "makes no sense"),
        ("tokenizer_config.json", '{"extra_special_tokens": [3]}', "makes no sense"),
        ("added_tokens.json", '{"<a>": "b", "<c>": 1}', "makes no sense"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = byte_level(tmp_path)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_threads_run_while_a_text_is_tokenised(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path))
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    before = ticks
    tokenizer.encode("the cat sat on the mat " * 40_000)
    during = ticks - before
    done.set()
    other.join()
    assert during > 10  # none, were the lock held


def test_a_text_that_is_too_long_is_refused_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path))
    tokenised = []
    encoding = tokenizer._encoding
    monkeypatch.setattr(
        tokenizer,
        "_encoding",
        lambda text, add_special_tokens: tokenised.append(len(text)) or encoding(text, False),
    )
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode("!" * 10**6, max_tokens=100)
    assert caught.value.at_least and caught.value.count > 100 and sum(tokenised) < 10_000
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode("!" * 101, max_tokens=100)
    assert (caught.value.count, caught.value.at_least) == (101, False)
    assert len(tokenizer.encode("!" * 100, max_tokens=100)) == 100


def test_no_text_that_fits_is_refused_however_many_characters_a_token_has(tmp_path: Path) -> None:
    """A control token has 13 characters; each of them is cut in half somewhere."""
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path))
    for limit in (1, 3, 1000, 5000):
        text = "<|endoftext|>" * limit
        assert len(tokenizer.encode(text, max_tokens=limit)) == limit
        assert len(tokenizer.encode(" " + text, max_tokens=limit + 1)) == limit + 1


_STRANGE_WORDS = """
import pathlib, resource, sys
from nibble.engine.text.tokenizer import Tokenizer

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

tokenizer = Tokenizer.from_pretrained(sys.argv[1])
before = resident()
for i in range(10_000):
    tokenizer.encode(f"{i:05}" + "z" * 200)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_texts_are_not_remembered(tmp_path: Path) -> None:
    """Where nothing splits a text it is one word, and each would be kept."""
    command = [sys.executable, "-c", _STRANGE_WORDS, str(byte_fallback(tmp_path))]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 8 << 20  # bytes; remembered, they are some 60 MB
