"""A table of damaged checkpoints: each ends in one line that names what is wrong, soon, and in little memory.

What is called is what the two processes of `nibble serve` call to load a model; a UserError there is exit code 2.
"""

import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.text.tokenizer import Tokenizer
from nibble.errors import UserError

Damage = Callable[[Path], Any]
SECONDS = 20  # far more than any of them takes
WEIGHTS = "model.safetensors"


def load(folder: Path) -> None:
    Tokenizer.from_pretrained(folder)
    EngineCore(
        EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=2**22, prepared_cache=None)
    )


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_llama.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Damage


def written(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, sixteenths: int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * sixteenths // 16])

    return damage


def fields(name: str = "config.json", **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(content | changes))

    return damage


def without(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in content.items() if k not in names})
        )

    return damage


def fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def in_its_place(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def header(change: Callable[[dict], Any]) -> Damage:
    """Another header before the same data."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        changed = change(entries)
        raw = changed if isinstance(changed, bytes) else json.dumps(changed or entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def entry(**changes: Any) -> Damage:
    """Of the first tensor."""
    return header(
        lambda entries: entries[next(n for n in entries if n != "__metadata__")].update(changes)
    )


def many_entries(entries: dict) -> dict:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return entries | {f"t{i}": empty for i in range(200_000)}


def sparse(name: str, size: int) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return damage


def together(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


INDEX = "model.safetensors.index.json"
TABLE: dict[str, Damage] = {
    # weights
    "no weights": removed(WEIGHTS),
    "empty weights": written(WEIGHTS, b""),
    "seven bytes": written(WEIGHTS, b"1234567"),
    **{f"weights cut at {k}/16": cut(WEIGHTS, k) for k in (1, 8, 15)},
    "a length of 2**64 - 1": written(WEIGHTS, b"\xff" * 8 + b"{}"),
    "an LFS pointer": written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "a pickle under another name": written(WEIGHTS, b"\x80\x04\x95" + bytes(64)),
    "pickles only": together(removed(WEIGHTS), written("pytorch_model.bin", b"\x80\x04")),
    "a FIFO for weights": fifo(WEIGHTS),
    "a device for weights": in_its_place(WEIGHTS, "/dev/zero"),
    "a folder for weights": lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
    "a link to nothing for weights": in_its_place(WEIGHTS, "nowhere"),
    "a header that is no JSON": header(lambda _: b"{" * 1000),
    "a header nested deep": header(lambda _: b"[" * 100_000 + b"]" * 100_000),
    "a header that is a list": header(lambda _: b"[1]"),
    "a header of 200000 entries": header(many_entries),
    "a header of 40 MB": lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 40 * 10**6) + bytes(50 * 10**6)),
    "an entry that is a number": header(lambda e: e.update({next(n for n in e if n != "__metadata__"): 3})),
    "an unknown dtype": entry(dtype="F31"),
    "a dtype that is a list": entry(dtype=[]),
    "a shape that is text": entry(shape="abc"),
    "a shape of text": entry(shape=["a"]),
    "a shape beyond 64 bits": entry(shape=[2**40, 2**40]),
    "a shape below zero": entry(shape=[-1, -1]),
    "offsets swapped": entry(data_offsets=[8, 0]),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "offsets beyond the file": entry(data_offsets=[0, 2**62]),
    "offsets that are text": entry(data_offsets="ab"),
    "two tensors in one place": header(
        lambda e: e.update({n: v | {"data_offsets": e["lm_head.weight"]["data_offsets"]} for n, v in e.items()
                            if isinstance(v, dict) and n == "model.embed_tokens.weight"})),
    "a tensor missing": header(lambda e: e.pop("model.norm.weight") and None),
    "a norm in 64-bit integers": entry(dtype="I64"),
    # the index
    "an index to elsewhere": written(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'),
    "an index of numbers": written(INDEX, '{"weight_map": {"a": 3}}'),
    "an index without a map": written(INDEX, "{}"),
    "an index to a missing shard": written(INDEX, '{"weight_map": {"a": "b.safetensors"}}'),
    "an index with a NUL": written(INDEX, '{"weight_map": {"a": "b\\u0000.safetensors"}}'),
    "an index that is no JSON": written(INDEX, "{"),
    "a FIFO for an index": fifo(INDEX),
    # config.json
    "no config": removed("config.json"),
    "a config that is no JSON": written("config.json", "{,}"),
    "a config that is no text": written("config.json", b"\xff\xfe\x00"),
    "a config that is a list": written("config.json", "[]"),
    "a config nested deep": written("config.json", "[" * 200_000),
    "a config of a gigabyte": sparse("config.json", 2**30),
    "a FIFO for a config": fifo("config.json"),
    "an unknown architecture": fields(architectures=["NoSuchModel"], model_type="no"),
    "an architecture that is a number": fields(architectures=3, model_type=None),
    "code of its own": fields(architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"}, model_type="x"),
    "a thousand million layers": fields(num_hidden_layers=10**9),
    "no layers": fields(num_hidden_layers=0),
    "layers below zero": fields(num_hidden_layers=-2),
    "layers as text": fields(num_hidden_layers="2"),
    "two and a half layers": fields(num_hidden_layers=2.5),
    "one layer too many": fields(num_hidden_layers=3),
    "a hidden size of a million million": fields(hidden_size=10**12),
    "a hidden size beyond floats": fields(hidden_size=10**400),
    "a vocabulary of a million million": fields(vocab_size=10**12),
    "another vocabulary": fields(vocab_size=1000),
    "another intermediate size": fields(intermediate_size=96),
    "a million million heads": fields(num_attention_heads=10**12),
    "heads that are not shared evenly": fields(num_key_value_heads=3),
    "an odd head dimension": fields(head_dim=15),
    "a context of none": fields(max_position_embeddings=0),
    "an epsilon of text": fields(rms_norm_eps="small"),
    "an epsilon that is no number": fields(rms_norm_eps=float("nan")),
    "an infinite epsilon": fields(rms_norm_eps=float("inf")),
    "an epsilon beyond floats": fields(rms_norm_eps=10**400),
    "an epsilon below zero": fields(rms_norm_eps=-1.0),
    "a theta of zero": fields(rope_parameters={"rope_theta": 0.0, "rope_type": "default"}),
    "a theta below zero": fields(rope_parameters={"rope_theta": -1e4, "rope_type": "default"}),
    "an unknown rope": fields(rope_parameters={"rope_theta": 1e4, "rope_type": "mine"}),
    "a rope that is a list": fields(rope_parameters=[], rope_scaling=[1]),
    "a rope type that is a list": fields(rope_parameters={"rope_theta": 1e4, "rope_type": ["a"]}),
    "a rope factor of zero": fields(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 0}),
    "an unknown activation": fields(hidden_act="relu6"),
    "an activation that is a list": fields(hidden_act=["silu"]),
    "ties that are text": fields(tie_word_embeddings="yes"),
    "a quantization that is a list": fields(quantization_config=["awq"]),
    "a quantization without a method": fields(quantization_config={"bits": 4}),
    "an unknown quantization": fields(quantization_config={"quant_method": "mine", "bits": 4}),
    "a quantization method that is a list": fields(quantization_config={"quant_method": ["awq"]}),
    "a quantization of five bits": fields(quantization_config={"quant_method": "awq", "bits": 5}),
    "a quantization of text bits": fields(quantization_config={"quant_method": "gptq", "bits": "x"}),
    "an end token of text": fields(eos_token_id="x"),
    # the tokenizer
    "no tokenizer": removed("tokenizer.json"),
    "a tokenizer cut short": cut("tokenizer.json", 8),
    "an empty tokenizer": written("tokenizer.json", "{}"),
    "a tokenizer that is no text": written("tokenizer.json", b"\xff\x00"),
    "a tokenizer of a gigabyte": sparse("tokenizer.json", 2**30),
    "a tokenizer.model of a gigabyte": together(removed("tokenizer.json"), sparse("tokenizer.model", 2**30)),
    "a FIFO for a tokenizer": fifo("tokenizer.json"),
    "a tokenizer's config that is a list": written("tokenizer_config.json", "[]"),
    "a tokenizer's config of a gigabyte": sparse("tokenizer_config.json", 2**30),
    "a tokenizer's config nested deep": written("tokenizer_config.json", '{"a":' + "[" * 200_000),
    "a tokenizer's config that is no text": written("tokenizer_config.json", b'{"x": "\xff"}'),
    "tokens in a list": fields("tokenizer_config.json", added_tokens_decoder=[1]),
    "tokens under a letter": fields("tokenizer_config.json", added_tokens_decoder={"x": {}}),
    "tokens without content": fields("tokenizer_config.json", added_tokens_decoder={"300": {}}),
    "tokens that are numbers": fields("tokenizer_config.json", extra_special_tokens=[3]),
    "added tokens of text": written("added_tokens.json", '{"<a>": "b", "<c>": 1}'),
    "an end of text": written("generation_config.json", '{"eos_token_id": "x"}'),
    "an end that is an object": written("generation_config.json", '{"eos_token_id": {"a": 1}}'),
    "an end beyond 64 bits": written("generation_config.json", '{"eos_token_id": [100000000000000000000]}'),
    "a template that is no text": written("chat_template.jinja", b"\xff\xfe{{ x }}"),
    "a template of a gigabyte": sparse("chat_template.jinja", 2**30),
    "a further template that is no text": lambda f: (
        (f / "additional_chat_templates").mkdir(), (f / "additional_chat_templates" / "a.jinja").write_bytes(b"\xff")),
}  # fmt: skip


@pytest.mark.parametrize("damage", TABLE.values(), ids=TABLE.keys())
def test_it_ends_in_one_line(folder: Path, damage: Damage) -> None:
    damage(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        load(folder)
    said = str(caught.value)
    assert said and "\n" not in said and len(said) < 1000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 700, f"{grown:.0f} MiB"


def test_it_loads_undamaged(folder: Path) -> None:
    load(folder)
