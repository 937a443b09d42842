"""`make test-models`: every registered architecture in turn, tiny and seeded, against transformers.

make test-models                         all, one line each; exit status 1 if a limit is missed or a model fails
make test-models ARGS='qwen3 llava-see'  some
make test-models ARGS=--write            all, and their rows of docs/MODELS.md, if none misses a limit
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from nibble.architectures.registry import model_spec
from nibble.engine.backends.base import Target
from nibble.engine.backends.cpp.loader import CppBackend
from nibble.engine.backends.triton.loader import TritonBackend
from nibble.engine.config import EngineConfig
from nibble.kernels.cpu import library
from nibble.quant.checkpoint import open_checkpoint

from ..attack.results import row, write
from ..conftest import write_byte_tokenizer
from ..engine import models, multimodal_models
from . import measures

PAGE = Path(__file__).resolve().parents[2] / "docs/MODELS.md"
BEGIN = "<!-- models: written by `make test-models ARGS=--write` -->"
END = "<!-- end of models -->"
METHODS = ("gptq", "awq", "fp8")
FLOAT32_LIMIT = 1e-4  # of the spread of the logits
BFLOAT16_LIMIT = 1.3  # times transformers' own error
# how far predictions are from the original's; those of other tokens are at 1
DIVERGENCE_LIMIT = {"gptq": 0.6, "awq": 0.6, "fp8": 0.2}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tiny model of the tests."""

    name: str
    architecture: str  # its class in transformers
    model_type: str
    build: Callable[[Path], transformers.PreTrainedModel]
    auto: Any  # the class of transformers that loads it

    def load(self, folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
        """By transformers, which makes up at random what a checkpoint does not have: an error here."""
        model, info = self.auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if lost := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
            raise RuntimeError(f"transformers does not load {lost[0]} and {len(lost) - 1} more")
        return model.eval()

    @property
    def experts(self) -> bool:
        return "moe" in self.model_type or self.name.removesuffix("-see") in models.MOE


def entries() -> Iterator[Entry]:
    """Of what the tests have a tiny model of: those that see have names that end in "-see"."""
    for name, config in models.CONFIGS.items():
        kind = config.model_type
        # what the tests have registered, too
        architecture = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
        build = partial(models.build, name)
        yield Entry(name, architecture, kind, build, transformers.AutoModelForCausalLM)
    for name in multimodal_models.NAMES:
        kind = multimodal_models.config(name).model_type
        architecture = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
        build, auto = (
            partial(multimodal_models.build, name),
            transformers.AutoModelForImageTextToText,
        )
        yield Entry(f"{name}-see", architecture, kind, build, auto)


@dataclass(slots=True)
class Result:
    """What was measured of a model; `missed` says which limits it did not keep."""

    entry: Entry
    refused: dict[str, str | None] = field(
        default_factory=dict
    )  # backend -> why it does not take all
    float32: dict[str, float] = field(default_factory=dict)  # way -> difference
    bfloat16: dict[str, float] = field(default_factory=dict)  # way -> error
    conversions: dict[str, float] = field(default_factory=dict)  # method -> difference
    missed: list[str] = field(default_factory=list)

    def check(self, what: str, figure: float, limit: float) -> float:
        if not figure <= limit:  # NaN is none
            self.missed.append(f"{what} {figure:.2g} (limit {limit:g})")
        return figure


def measure(entry: Entry, scratch: Path) -> Result:
    """Everything, in an empty folder."""
    result, folder, bf16 = Result(entry), scratch / "float32", scratch / "bf16"
    exact = reference(entry.build(folder))
    checkpoint = open_checkpoint(folder)
    spec = model_spec(checkpoint.config, checkpoint.names())
    for name, backend in (("cpp", CppBackend), ("triton", TritonBackend)):
        target = Target(EngineConfig(model=str(folder)), torch.bfloat16, torch.device("cpu"))
        result.refused[name] = measures.why_not(backend(target), spec)
    differences = measures.float32_differences(measures.make_runner(folder, "float32"), exact)
    for way, figure in differences.items():
        result.float32[way] = result.check(f"float32 {way}", figure, FLOAT32_LIMIT)
    rounded = entry.load(folder, torch.bfloat16)
    rounded.save_pretrained(bf16)
    write_byte_tokenizer(bf16)
    runner = measures.make_runner(folder, "bfloat16")
    errors = measures.bfloat16_errors(runner, exact, reference(rounded), entry.experts)
    for way, figure in errors.items():
        result.bfloat16[way] = result.check(f"bfloat16 {way}", figure, BFLOAT16_LIMIT)
    if result.refused["cpp"] is None and measures.answers(runner, True) != measures.answers(
        runner, False
    ):
        result.missed.append("bfloat16: other tokens after a preemption")
    for method in METHODS:
        _measure_conversion(result, bf16, method)
    return result


def _measure_conversion(result: Result, bf16: Path, method: str) -> None:
    """In float32, and as the C++ backend multiplies its weights (by activations in bfloat16)."""
    ids, load = measures.prompt(60), result.entry.load
    out = measures.convert(bf16, bf16.with_name(method), method)
    plain = measures.dequantized(out, bf16)
    exact = reference(load(plain, torch.float32))
    got = measures.make_runner(out, "float32").logits(ids)
    figure = measures.difference(got, exact(ids))
    result.conversions[method] = result.check(f"{method} as served", figure, FLOAT32_LIMIT)
    lost = measures.divergence(exact(ids), reference(load(bf16, torch.float32))(ids))
    result.check(f"{method} from the original", lost, DIVERGENCE_LIMIT[method])
    rounded = reference(load(plain, torch.bfloat16))
    runner = measures.make_runner(out, "bfloat16")
    errors = measures.bfloat16_errors(runner, exact, rounded, result.entry.experts)
    worst = result.check(f"{method} in bfloat16", max(errors.values()), BFLOAT16_LIMIT)
    result.bfloat16[method] = worst


def reference(model: transformers.PreTrainedModel) -> measures.Reference:
    """A model as a function of tokens."""

    @torch.inference_mode()
    def logits(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    return logits


def line(result: Result, seconds: float) -> str:
    """For a terminal."""
    figures = [f"float32 {max(result.float32.values()):.0e}"]
    figures += [f"bfloat16 {max(result.bfloat16.values()):.2f}"]
    figures += [f"{method} {figure:.0e}" for method, figure in result.conversions.items()]
    figures += [f"{name}: {why}" for name, why in result.refused.items() if why]
    verdict = "MISSED " + ", ".join(result.missed) if result.missed else "ok"
    return f"{result.entry.name:20} {verdict}; {', '.join(figures)} [{seconds:.0f} s]"


def table(results: list[Result], page: str, order: Iterable[str]) -> str:
    """In Markdown, a row a model, in order: of those that were measured, and what the page says of others."""
    _, _, old = page.partition(BEGIN)
    split = [(line, line.split("|")) for line in old.splitlines()]
    rows = {cells[3].strip(): line for line, cells in split if len(cells) > 3}
    rows |= {result.entry.name: _row(result) for result in results}
    names = ("Class", "model_type", "Tiny model", "C++", "Triton", "float32", "bfloat16")
    head = [row(*names, *(method.upper() for method in METHODS)), "|" + "---|" * 10]
    return "\n".join([*head, *(rows[name] for name in order if name in rows)])


def _row(result: Result) -> str:
    entry = result.entry
    return row(
        f"`{entry.architecture}`",
        f"`{entry.model_type}`",
        entry.name,
        *(f"no: {why}" if why else "yes" for why in result.refused.values()),
        f"{max(result.float32.values()):.0e}",
        f"{max(result.bfloat16.values()):.2f}",
        *(f"{figure:.0e}" for figure in result.conversions.values()),
    )


def main(args: list[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser("make test-models", description=__doc__.splitlines()[0])
    known = {entry.name: entry for entry in entries()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--write", action="store_true", help=f"their rows of {PAGE.name}")
    options = parser.parse_args(args)
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no tiny model {unknown[0]!r}; there are {', '.join(known)}")
    if (why := library.why_missing()) is not None:
        parser.error(f"the C++ kernels are measured too: {why}")
    names, results = options.names or list(known), []
    for name in names:
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as scratch:
                result = measure(known[name], Path(scratch))
        except Exception as error:  # whatever one model does, the others are measured
            print(f"{name:20} FAILED {type(error).__name__}: {error}", flush=True)
            continue
        results.append(result)
        print(line(result, time.perf_counter() - started), flush=True)
    held = [result for result in results if not result.missed]
    print(f"{len(held)} of {len(names)} keep every limit")
    if len(held) < len(names):
        return 1
    if options.write:
        write(PAGE, table(results, PAGE.read_text(), known), BEGIN, END)
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # that requests were preempted, which is what is wanted
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
