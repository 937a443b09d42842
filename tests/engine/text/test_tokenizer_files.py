"""Tokenizers that are no tokenizer.json: what is made of each kind, against transformers, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from nibble.engine.text import tokenizer_files
from nibble.engine.text.chat_template import ChatRenderer
from nibble.engine.text.tokenizer import Tokenizer
from nibble.errors import CheckpointError

from .tiny_tokenizers import CHATML, byte_level

TEXTS = [
    "the cat sat",
    " lead and  double",
    "naïve 🤗 12345",
    "a\n\n\tb's",
    "<|im_start|>the<|im_end|>",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "_CACHE", tmp_path / "cache")


def vocab_and_merges(
    folder: Path, config: dict | None = None, model_type: str | None = None
) -> Path:
    """The files that GPT-2 and its heirs were published with, and no tokenizer.json."""
    model = json.loads((byte_level(folder) / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def flip(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"ab", b"ba"))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: file.chmod(0o666),
        lambda file: (file.parent / "SHA256SUMS").unlink(),
        lambda file: (file.parent / "added_tokens.json").write_text("{}"),
        lambda file: file.parent.chmod(0o777),
        lambda file: (file.rename(file.with_suffix(".x")), file.symlink_to(file.with_suffix(".x"))),
    ],
    ids=["flipped", "empty", "gone", "others write", "no hashes", "one more", "open", "a link"],
)
def test_a_kept_folder_is_believed_only_as_it_was_made(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = byte_gguf(tmp_path / "model" / "m.gguf")
    folder = tokenizer_files.tokenizer_folder(file)
    made = {each.name: each.read_bytes() for each in folder.iterdir()}
    assert tokenizer_files.tokenizer_folder(file) == folder and not caplog.records
    damage(folder / "tokenizer.json")
    assert tokenizer_files.tokenizer_folder(file) == folder
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == made
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert folder.stat().st_mode & 0o022 == 0


def byte_gguf(file: Path) -> Path:
    """A GGUF file with nothing but a tokenizer in it."""
    file.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_merges(["a b"])
    writer.add_token_list(["<|endoftext|>", *letters, "ab"])
    writer.add_token_types([3] + [1] * (len(letters) + 1))
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_a_gguf_tokenizer_is_read_from_where_the_weights_are(tmp_path: Path) -> None:
    """A projector beside the model, and a file without the ending."""
    file = byte_gguf(tmp_path / "model" / "m.gguf")
    (tmp_path / "model" / "mmproj-m.gguf").write_bytes(b"GGUF, of another kind")
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(file.read_bytes())
    for place in (tmp_path / "model", blob):
        assert Tokenizer.from_pretrained(place).encode("ab") == [257]


def test_a_gguf_tokenizer_is_made_without_torch(tmp_path: Path) -> None:
    """In a process of its own, as at the server's first start."""
    byte_gguf(tmp_path / "m.gguf")
    code = """
import sys
from nibble.engine.text.tokenizer import Tokenizer
tokenizer = Tokenizer.from_pretrained(sys.argv[1])
assert tokenizer.decode(tokenizer.encode("a b")) == "a b" and tokenizer.eos_token_ids == [0]
loaded = {"torch", "transformers"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.gguf")],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home").rglob("tokenizer.json"))


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, None),
        ({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}, None),
        (None, "qwen2"),
    ],
)
def test_vocab_and_merges_of_a_known_class_are_read_as_transformers_does(
    tmp_path: Path, config: dict | None, model_type: str | None
) -> None:
    folder = vocab_and_merges(tmp_path / "m", config, model_type)
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.eos_token, ours.bos_token) == (theirs.eos_token, theirs.bos_token)


def test_vocab_and_merges_alone_are_gpt2s_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = vocab_and_merges(tmp_path / "alone", model_type="llama")
    ours = Tokenizer.from_pretrained(folder)
    assert "text is split as GPT-2 does" in caplog.text
    known = vocab_and_merges(tmp_path / "known", {"tokenizer_class": "GPT2Tokenizer"})
    theirs = AutoTokenizer.from_pretrained(known)
    assert ours.eos_token == "<|endoftext|>"
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_what_was_converted_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vocab_and_merges(tmp_path / "m", {"tokenizer_class": "GPT2Tokenizer"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [7]}')
    first = Tokenizer.from_pretrained(folder)
    monkeypatch.setattr(tokenizer_files, "CONVERT_COMMAND", (sys.executable, "-c", "exit(1)"))
    again = Tokenizer.from_pretrained(folder)
    assert again.eos_token_ids == first.eos_token_ids == [0, 7]
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match="cannot be read: exit code 1"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "packages"),
    [(b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
)
def test_a_tokenizer_model_names_the_packages_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, packages: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=rf"pip install {packages}`") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\nnothing of the kind")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: True)
    with pytest.raises(CheckpointError, match="tokenizer files cannot be read: ") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_is_read_as_transformers_does(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentences = (f"the cat sat on mat {i} and the dog ate the hat, hello" for i in range(300))
    with (tmp_path / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            num_threads=1,
            minloglevel=2,
        )
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.eos_token_ids == [2]
    for text in ("the cat sat", "hello the hat 🤗"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == processor.encode(text)


@pytest.mark.parametrize(
    ("config", "added", "special_map"),
    [
        ({"additional_special_tokens": ["<extra>", "<more>"]}, None, None),
        ({"extra_special_tokens": ["<extra>", "<more>"], "pad_token": "<pad>"}, None, None),
        ({"extra_special_tokens": {"image_token": "<extra>"}}, None, None),
        ({"image_token": "<extra>", "pad_token": "<pad>"}, None, None),
        ({}, {"<late>": 301, "<more>": 300}, None),
        ({"additional_special_tokens": ["<more>", "<extra>"]}, {"<more>": 300}, None),
        ({}, {"<more>": 300}, {"additional_special_tokens": ["<extra>"], "pad_token": "<pad>"}),
        (
            {
                "added_tokens_decoder": {"300": {"content": "<more>", "special": True}},
                "additional_special_tokens": ["<extra>"],
            },
            {"<late>": 301},
            None,
        ),
        (
            {"additional_special_tokens": [{"content": "<extra>", "__type": "AddedToken"}]},
            None,
            None,
        ),
    ],
)
def test_tokens_that_other_files_add_have_transformers_ids(
    tmp_path: Path, config: dict, added: dict | None, special_map: dict | None
) -> None:
    folder = byte_level(tmp_path, **config)
    for name, content in (("added_tokens", added), ("special_tokens_map", special_map)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs) > 300
    text = "the<more> <extra>cat<late><pad>sat"
    assert ours.encode(text) == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ours.encode(text), skip) == theirs.decode(
            theirs.encode(text), skip_special_tokens=skip
        )


def test_additional_chat_templates(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, chat_template="of the config")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "chat_template.jinja").write_text("plain")
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "x"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    for tools in (None, [tool]):
        want = theirs.apply_chat_template(chat, tools=tools, tokenize=False)
        assert ours.apply_chat_template(chat, tools=tools) == want


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ([{"name": "default"}], "without name and template"),
        ([{"template": "x"}, "y"], "without name and template"),
        ("{% for m in messages %}", "no valid Jinja: line 1"),
        ("line\n{{ messages | no_such_filter }}", "no valid Jinja: line 2"),
    ],
)
def test_a_broken_chat_template_leaves_a_model_that_completes_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: object, said: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path, chat_template=template))
    assert said in "\n".join([caplog.text, *ChatRenderer(tokenizer.chat_format()).problems()])
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_one_broken_entry_does_not_take_the_others_away(tmp_path: Path) -> None:
    entries = [
        {"name": "tool_use", "template": "{% if %}"},
        {"name": "default", "template": CHATML},
    ]
    tokenizer = Tokenizer.from_pretrained(byte_level(tmp_path, chat_template=entries))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert text.startswith("<|im_start|>user\nx")
