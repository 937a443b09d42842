"""Models that are damaged and still give numbers: each is refused at load, by its canary or before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nibble
from nibble.engine.llm import LLM
from nibble.errors import CheckpointError
from nibble.kernels.cpu.library import why_missing
from nibble.quant.canary import FILE
from nibble.quant.reformat import reformat


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By method."""
    folder = tmp_path_factory.mktemp("canary")
    options = {"calib_samples": 2, "calib_seqlen": 32, "evaluate": False}
    return {
        "awq": nibble.convert(tiny_llama, folder / "awq", "awq", group_size=32, **options),
        "gptq": nibble.convert(tiny_llama, folder / "gptq", "gptq", group_size=32, **options),
        "fp8": nibble.convert(tiny_llama, folder / "fp8", "fp8", evaluate=False),
        "tensor": nibble.convert(
            tiny_llama, folder / "tensor", "fp8", fp8_scheme="tensor", **options
        ),
    }


def load(model: Path, **options: object) -> LLM:
    return LLM(str(model), prepared_cache=None, kv_cache_memory=1 << 22, **options)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "tensor"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "kv_cache_dtype": "int8", "lm_head_bits": 8},
        {"dtype": "bfloat16", "cpu_isa": "none"},
        {"dtype": "float32"},
    ],
    ids=["cpp", "cpp in int8", "torch", "float32"],
)
def test_every_way_to_serve_it_agrees(method, options, converted):
    if options.get("kv_cache_dtype") and why_missing():
        pytest.skip(f"no C++ kernels: {why_missing()}")
    assert (converted[method] / FILE).is_file()
    load(converted[method], **options)


def config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file, {"format": "pt"})

    return damage


DOWN = "model.layers.1.mlp.down_proj"
SEEN_BY_THE_CANARY: dict[str, tuple[str, Callable[[Path], None]]] = {
    "norms' epsilon": ("awq", config(rms_norm_eps=0.9)),
    "rope's base": ("awq", config(rope_theta=3.0, rope_parameters={"rope_theta": 3.0})),
    "rows exchanged": ("awq", tensor(f"{DOWN}.qweight", lambda t: t.flip(0))),
    "zero points lost": ("awq", tensor(f"{DOWN}.qzeros", torch.zeros_like)),
    "scales of one row of groups": ("awq", tensor(f"{DOWN}.scales", lambda t: t.roll(1, 0) * 4)),
    "v1 for v2": ("gptq", tensor(f"{DOWN}.qweight", lambda t: t ^ 0x11111111 << 2)),
    "a norm of ones": ("fp8", tensor("model.norm.weight", lambda t: -t)),
    "an embedding shifted": ("fp8", tensor("model.embed_tokens.weight", lambda t: t.roll(1, 0))),
}


@pytest.mark.parametrize(("method", "damage"), SEEN_BY_THE_CANARY.values(), ids=SEEN_BY_THE_CANARY)
def test_what_answers_otherwise_is_refused(method, damage, converted, tmp_path):
    model = shutil.copytree(converted[method], tmp_path / "model")
    damage(model)
    with pytest.raises(
        CheckpointError, match="answers otherwise than when it was converted"
    ) as told:
        load(model)
    assert "\n" not in str(told.value)
    (model / FILE).unlink()
    load(model)  # only the canary knows


def fill(name: str, value: float) -> Callable[[Path], None]:
    return tensor(name, lambda t: torch.full_like(t, value))


SEEN_BEFORE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    **{
        f"{method} scales of {value}": (method, fill(f"{DOWN}.{suffix}", value), says)
        for method, suffix in (("awq", "scales"), ("gptq", "scales"), ("fp8", "weight_scale"))
        for value, says in ((0, "is zero"), (-1, "is negative"), (65504, "reaches 65504"))
    },
    "one negative FP8 scale": (
        "fp8",
        tensor(f"{DOWN}.weight_scale", lambda t: torch.cat([-t[:1], t[1:]])),
        "is negative",
    ),
    "infinite epsilon": ("awq", config(rms_norm_eps=float("inf")), "rms_norm_eps is no finite number"),
    "epsilon of nothing": ("awq", config(rms_norm_eps=0), "rms_norm_eps is 0"),
    "epsilon that is no number": ("awq", config(rms_norm_eps=float("nan")), "rms_norm_eps is no finite number"),
    "epsilon of 1": ("awq", config(rms_norm_eps=1.0), "rms_norm_eps is 1"),
    "negative base": ("awq", config(rope_theta=-1, rope_parameters={"rope_theta": -1}), "rope_theta is -1"),
    "one layer less": ("awq", config(num_hidden_layers=1), "is of layer 1, config.json says that there are 1"),
    "an infinite number of digits": ("awq", config(rms_norm_eps=10**400), "no finite number"),
    "a million layers": ("awq", config(num_hidden_layers=10**6), "num_hidden_layers is more than 1024"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "damage", "says"), SEEN_BEFORE.values(), ids=SEEN_BEFORE)
def test_absurd_numbers_are_refused_without_a_canary(method, damage, says, converted, tmp_path):
    model = shutil.copytree(converted[method], tmp_path / "model")
    (model / FILE).unlink()
    damage(model)
    with pytest.raises(CheckpointError, match=says) as told:
        load(model)
    if "scale" in says or "scales" in str(damage):
        assert DOWN in str(told.value)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_rows_without_weights_may_have_scales_of_zero(share, converted, tmp_path):
    model = shutil.copytree(converted["gptq"], tmp_path / "model")
    (model / FILE).unlink()

    def some(t: torch.Tensor) -> torch.Tensor:
        t[:, : int(share * t.shape[1])] = 0
        return t

    tensor(f"{DOWN}.scales", some)(model)
    load(model)


def test_another_format_gets_its_own(converted, tmp_path):
    reformat(converted["gptq"], tmp_path / "out", "gptq_v2")
    kept, again = (
        json.loads((folder / FILE).read_text()) for folder in (converted["gptq"], tmp_path / "out")
    )
    assert again == kept, "the values are the same"
