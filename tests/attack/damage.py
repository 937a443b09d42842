"""Damaged checkpoints: how each is made of a good one, and whether it must be refused.

MUST    no answer of such a model can be right: exit code 2 and one line
MAY     served or refused; what it may not do is hang, crash, or end in a traceback
"""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
TOKENIZER_CONFIG, INDEX = "tokenizer_config.json", "model.safetensors.index.json"
LINEAR = "model.layers.0.self_attn.q_proj."
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 270000000\n"
)
MUST, MAY = True, False


class Damage(NamedTuple):
    make: Callable[[Path], object]
    must_be_refused: bool = MUST


def _cut(name: str, share: float) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return make


def _put(name: str, text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def _json(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return make


def _set(name: str, *keys: str, to: Any) -> Callable[[Path], object]:
    """One entry of a JSON file, by its path of keys."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return _json(name, change)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        tensors = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return make


def _tensor(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return _tensors(lambda tensors: tensors.update({name: new(tensors[name]).contiguous()}))


def _filled(name: str, value: float) -> Callable[[Path], object]:
    def new(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return _tensor(name, new)


def _header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """The file's header rewritten, its data as it was."""

    def make(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + size])
        change(head)
        text = json.dumps(head).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return make


def _index(weight_map: dict[str, object] | None = None, **more: object) -> Callable[[Path], object]:
    """An index beside the one file; None: of its true names."""

    def make(folder: Path) -> None:
        names = weight_map
        if names is None:
            names = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
        (folder / "shard.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names} | more))

    return make


def _outside(folder: Path) -> None:
    """The weights are a link to a file that is no checkpoint."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/passwd")


def _pickles(folder: Path) -> None:
    """Weights as pickles alone; one that is loaded leaves a file behind."""
    (folder / WEIGHTS).unlink()
    code = b"cposix\nsystem\n(S'touch " + str(folder / "RAN").encode() + b"'\ntR."
    (folder / "pytorch_model.bin").write_bytes(code)


def _code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\nclass Model: pass\n")
    _set(CONFIG, "auto_map", to={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Model"})(
        folder
    )


def _many_tensors(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    end = len(data) - 8 - size
    head |= {
        f"x{i}": {"dtype": "F16", "shape": [0], "data_offsets": [end, end]} for i in range(100_000)
    }
    text = json.dumps(head).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _flipped(seed: int) -> Callable[[Path], object]:
    """32 bytes of the header changed at random."""

    def make(folder: Path) -> None:
        draw, data = random.Random(seed), bytearray((folder / WEIGHTS).read_bytes())
        size = struct.unpack("<Q", bytes(data[:8]))[0]
        for _ in range(32):
            data[draw.randrange(8, 8 + size)] = draw.randrange(256)
        (folder / WEIGHTS).write_bytes(data)

    return make


def _template(text: str) -> Callable[[Path], object]:
    return _set(TOKENIZER_CONFIG, "chat_template", to=text)


_DATA = LINEAR + "qweight"
_HUGE = 2**40
_LOOPS = "{% for i in range(99999) %}" * 2 + "x" + "{% endfor %}" * 2
DAMAGES: dict[str, Damage] = {
    **{f"weights cut at {k}/8": Damage(_cut(WEIGHTS, k / 8)) for k in (0, 1, 4, 7)},
    "weights: header of 2^64-1 bytes": Damage(_put(WEIGHTS, b"\xff" * 8 + b"{}")),
    "weights: header of 2^30 bytes": Damage(_put(WEIGHTS, struct.pack("<Q", 2**30) + b"{}")),
    "weights: an LFS pointer": Damage(_put(WEIGHTS, POINTER)),
    "weights: a pickle under their name": Damage(_put(WEIGHTS, b"\x80\x04cposix\nsystem\n(S'id'\ntR.")),
    "weights: pickles alone": Damage(_pickles),
    "weights: a link out of the folder": Damage(_outside),
    "weights: offsets past the end": Damage(_header(lambda h: h[_DATA]["data_offsets"].__setitem__(1, _HUGE))),
    "weights: negative offsets": Damage(_header(lambda h: h[_DATA]["data_offsets"].__setitem__(0, -8))),
    "weights: a shape of 2^40": Damage(_header(lambda h: h[_DATA].update(shape=[_HUGE, _HUGE]))),
    "weights: an unknown type": Damage(_header(lambda h: h[_DATA].update(dtype="X9"))),
    "weights: a header of 100 000 tensors": Damage(_many_tensors, MAY),
    **{f"weights: header changed at random ({i})": Damage(_flipped(i), MAY) for i in range(3)},
    "a tensor too few": Damage(_tensors(lambda t: t.pop(_DATA))),
    "qweight as float": Damage(_tensor(_DATA, lambda t: t.to(torch.float16))),
    "qweight of half the size": Damage(_tensor(_DATA, lambda t: t[: len(t) // 2])),
    "qzeros of another shape": Damage(_tensor(LINEAR + "qzeros", lambda t: t[:, :1])),
    "scales of another shape": Damage(_tensor(LINEAR + "scales", lambda t: t.T)),
    "a scale that is NaN": Damage(_filled(LINEAR + "scales", float("nan"))),
    "a scale that is infinite": Damage(_filled(LINEAR + "scales", float("inf"))),
    "an embedding of another size": Damage(_tensor("model.embed_tokens.weight", lambda t: t[:, :32])),
    "index: a shard that is not there": Damage(_index()),
    "index: a shard outside": Damage(_index({_DATA: "../../etc/passwd"})),
    "index: an absolute path": Damage(_index({_DATA: "/etc/passwd"})),
    "index: a list": Damage(_index(weight_map={}, metadata=[])),
    "index: numbers for files": Damage(_index({_DATA: 7})),
    **{
        f"config: {key} = {json.dumps(value)[:20]}": Damage(_set(CONFIG, key, to=value), must)
        for key, value, must in (
            ("hidden_size", 0, MUST), ("hidden_size", 65, MUST), ("hidden_size", "64", MUST),
            ("hidden_size", _HUGE, MUST),
            ("num_hidden_layers", 10**9, MUST), ("num_hidden_layers", -1, MUST), ("num_hidden_layers", 3, MUST),
            ("num_attention_heads", 0, MUST), ("num_key_value_heads", 3, MUST), ("vocab_size", 2**62, MUST),
            ("vocab_size", None, MUST), ("rms_norm_eps", "x", MUST), ("hidden_act", "unknown", MUST),
            ("max_position_embeddings", -1, MUST), ("architectures", [], MAY),
            ("architectures", ["Unknown"], MUST),
            ("architectures", 7, MUST), ("eos_token_id", "x", MUST), ("eos_token_id", [[]], MUST),
            ("rope_parameters", "x", MUST), ("torch_dtype", "float7", MAY), ("quantization_config", [], MUST),
        )
    },
    "config: bits of 5": Damage(_set(CONFIG, "quantization_config", "bits", to=5)),
    "config: a group that divides nothing": Damage(_set(CONFIG, "quantization_config", "group_size", to=48), MAY),
    "config: a group of 0": Damage(_set(CONFIG, "quantization_config", "group_size", to=0)),
    "config: an unknown method": Damage(_set(CONFIG, "quantization_config", "quant_method", to="x")),
    "config: code of its own (auto_map)": Damage(_code, MAY),
    "config: a list": Damage(_put(CONFIG, "[]")),
    "config: empty": Damage(_put(CONFIG, "")),
    "config: not UTF-8": Damage(_put(CONFIG, b"\xff\xfe{}")),
    "config: nested too deep": Damage(_put(CONFIG, '{"a":' * 100_000)),
    "config: missing": Damage(lambda f: (f / CONFIG).unlink()),
    "config: a folder": Damage(lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir())),
    "tokenizer: cut": Damage(_cut(TOKENIZER, 0.5)),
    "tokenizer: a list": Damage(_put(TOKENIZER, "[]")),
    "tokenizer: an LFS pointer": Damage(_put(TOKENIZER, POINTER)),
    "tokenizer: missing": Damage(lambda f: (f / TOKENIZER).unlink()),
    "tokenizer: no vocabulary": Damage(_set(TOKENIZER, "model", "vocab", to={}), MAY),
    "tokenizer: ids beyond the vocabulary": Damage(_set(TOKENIZER, "model", "vocab", "!", to=2**31), MAY),
    "tokenizer config: added_tokens_decoder a list": Damage(_set(TOKENIZER_CONFIG,
    "added_tokens_decoder", to=[1])),
    "tokenizer config: a key that is no id": Damage(_set(TOKENIZER_CONFIG,
    "added_tokens_decoder", to={"x": {"content": "y"}})),
    "tokenizer config: a list": Damage(_put(TOKENIZER_CONFIG, "[]"), MAY),
    "tokenizer config: not UTF-8": Damage(_put(TOKENIZER_CONFIG, b'{"x": "\xff"}'), MAY),
    "generation config: eos a word": Damage(_put("generation_config.json", '{"eos_token_id": "x"}'), MAY),
    "generation config: cut": Damage(_put("generation_config.json", '{"eos'), MAY),
    "template: not UTF-8": Damage(_put("chat_template.jinja", b"\xff\xfe{{ messages }}"), MAY),
    "template: no Jinja": Damage(_template("{% if %}"), MAY),
    "template: loops for ever": Damage(_template(_LOOPS), MAY),
    "template: makes much of little": Damage(_template("{{ 'x' * 10**9 }}"), MAY),
    "template: reaches for Python": Damage(_template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), MAY),
    "template: recurses": Damage(_template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), MAY),
    "template: a number": Damage(_set(TOKENIZER_CONFIG, "chat_template", to=7), MAY),
}  # fmt: skip
