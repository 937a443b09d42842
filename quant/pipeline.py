"""The conversion: one decoder block in memory at a time, calibrated through the blocks already quantized.

    for each block:  read lazily -> fold AWQ's scales -> run the activations through it, quantizing each linear with
                     error compensation (GPTQ) the moment its inputs arrive -> write its part -> free

Invariant: OUT appears whole or not at all. Everything is written into OUT.partial, config.json last, and one rename
makes it OUT. Each block's inputs are the outputs of the quantized blocks before it, and within a block GPTQ sees each
linear's inputs through the linears already quantized, so errors are made up for instead of adding up unseen.

AWQ and GPTQ name what is written. Scaling channels helps whatever rounds them and compensation helps whatever the
format, so both formats get both (SmolLM2, 4 bits, asymmetric, group 64, mean KL on held-out prose: rounding .319, range
search .185, GPTQ .153, AWQ scales and range search .152, AWQ scales and GPTQ .109). FP8 needs neither.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import calibration, formats
from .block_quantizer import Activations, BlockResult, quantize_block
from .blocks import BlockSource
from .calibration import Samples
from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, NibbleError
from .plan import Plan, Recipe, make_plan
from .side_files import copy_side_files
from .weight import QuantizedWeight
from .writer import ShardWriter, write_json

CALIB_SAMPLES = 24  # windows; more helps a little and costs in proportion
CALIB_SEQLEN = 512  # tokens a window


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is, told after each block."""

    block: int  # blocks done
    blocks: int
    seconds: float  # since the start
    error: float | None  # relative output error of the worst layer of the block; None where nothing was calibrated

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.block * (self.blocks - self.block)


@dataclass(slots=True)
class Report:
    """What a conversion did, for the accuracy card."""

    source: Path
    recipe: Recipe
    plan: Plan
    samples: Samples | None
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    quantized_weights: int = 0
    quantized_bytes: int = 0  # of those weights with their scales and zero points
    layer_error: dict[str, float] = field(default_factory=dict)  # |(W - Q) x|^2 / |W x|^2 on calibration inputs
    fallbacks: dict[str, str] = field(default_factory=dict)  # module -> why round-to-nearest was used

    def add(self, result: BlockResult) -> None:
        """Take in what became of a block."""
        self.quantized_weights += sum(weight.codes.numel() for weight in result.weights.values())
        self.quantized_bytes += sum(weight.nbytes for weight in result.weights.values())
        self.layer_error |= result.layer_error
        self.fallbacks |= result.fallbacks

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers."""
        return 8 * self.quantized_bytes / self.quantized_weights


def convert(model: str | Path, output: str | Path, method: Literal["awq", "gptq", "fp8"] = "awq",
            bits: int | None = None, group_size: int = 128, symmetric: bool | None = None,
            calib: str | Path | None = None, calib_samples: int = CALIB_SAMPLES,
            calib_seqlen: int = CALIB_SEQLEN, seed: int = 0, device: str = "cpu", overwrite: bool = False,
            progress: Callable[[Progress], None] | None = None) -> Path:
    """Quantize a checkpoint (HF folder, .gguf file or Hub id) into the folder `output` and return it.

    symmetric None: asymmetric for AWQ, symmetric for GPTQ. group_size: see plan.py for widths it does not divide.
    calib: a UTF-8 text file instead of the bundled mix. Raises NibbleError on bad input; then there is no `output`.
    """
    convert_with_report(model, output, Recipe.of(method, bits, group_size, symmetric), calib=calib,
                        calib_samples=calib_samples, calib_seqlen=calib_seqlen, seed=seed, device=device,
                        overwrite=overwrite, progress=progress)
    return Path(output)


def convert_with_report(model: str | Path, output: str | Path, recipe: Recipe, *, calib: str | Path | None = None,
                        calib_samples: int = CALIB_SAMPLES, calib_seqlen: int = CALIB_SEQLEN, seed: int = 0,
                        device: str = "cpu", overwrite: bool = False,
                        progress: Callable[[Progress], None] | None = None,
                        announce: Callable[[Plan], None] | None = None) -> Report:
    """As `convert`, from a checked recipe; returns what was done. `announce` is told the plan before work starts."""
    output = Path(output)
    checkpoint = open_checkpoint(model)
    _check_output(output, checkpoint, overwrite)
    source = BlockSource(checkpoint, torch.device(device))
    plan = make_plan(checkpoint, source, recipe)
    if announce is not None:
        announce(plan)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    start = time.monotonic()
    try:
        copy_side_files(checkpoint, partial)
        samples = None if recipe.method == "fp8" else _samples(partial, calib, calib_samples, calib_seqlen, seed)
        report = Report(checkpoint.path, recipe, plan, samples, bytes_before=checkpoint.nbytes)
        writer = ShardWriter(partial)
        writer.add(_outside_blocks(checkpoint, source))
        _convert_blocks(source, writer, report, progress, start)
        files = writer.finish()
        report.bytes_after = sum(file.stat().st_size for file in files)
        write_json(partial / "config.json", _config(checkpoint, plan))
        _publish(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report.seconds = time.monotonic() - start
    return report


@torch.no_grad()
def _convert_blocks(source: BlockSource, writer: ShardWriter, report: Report,
                    progress: Callable[[Progress], None] | None, start: float) -> None:
    activations = None if report.samples is None else Activations(source, report.samples)
    for index in range(len(source)):
        block = source.load(index)
        result = quantize_block(source, index, block, activations, report.plan, report.recipe)
        writer.add(_block_tensors(source, index, block, result.weights, report.plan))
        report.add(result)
        if progress is not None:
            worst = max(result.layer_error.values(), default=None)
            progress(Progress(index + 1, len(source), time.monotonic() - start, worst))


def _block_tensors(source: BlockSource, index: int, block: nn.Module, quantized: dict[str, QuantizedWeight],
                   plan: Plan) -> dict[str, Tensor]:
    """All tensors of a block by full name, quantized ones in the target format, others in the model's dtype."""
    prefix = source.name(index)
    write = formats.by_method(plan.scheme.method).write
    tensors = {f"{prefix}.{name}": value.to(plan.dtype) for name, value in block.state_dict().items()
               if name.removesuffix(".weight") not in quantized}
    for name, weight in quantized.items():
        for suffix, tensor in write(weight.to("cpu"), plan.scheme.format).items():
            tensors[f"{prefix}.{name}.{suffix}"] = tensor
    return tensors


def _outside_blocks(checkpoint: Checkpoint, source: BlockSource) -> dict[str, Tensor]:
    """Embeddings, the last norm and the head, dense, in the model's dtype."""
    blocks = f"{source.map.blocks}."
    modules = {m for m in checkpoint.modules() if not m.startswith(blocks)}
    consumed = {name for m in checkpoint.modules() for name in checkpoint.weight_names(m)}
    tensors = {f"{m}.weight": checkpoint.dense(m, source.dtype) for m in sorted(modules)}
    for name in sorted(checkpoint.names() - consumed):
        if not name.startswith(blocks):
            tensors[name] = checkpoint.tensor(name, source.dtype)
    return tensors


def _samples(folder: Path, calib: str | Path | None, count: int, length: int, seed: int) -> Samples:
    if count < 1 or length < 8:
        raise NibbleError(f"--calib-samples {count} x --calib-seqlen {length} is too little (at least 1 x 8)")
    from transformers import AutoTokenizer  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=1 << 40)  # the text is cut into windows later
    if calib is not None:
        return calibration.file_samples(tokenizer, Path(calib), count, length, seed)
    return calibration.bundled_samples(tokenizer, count, length, seed)


def _config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    dropped = ("quantization_config", "compression_config", "torch_dtype")
    config = {k: v for k, v in checkpoint.config.items() if k not in dropped}
    return config | {"dtype": str(plan.dtype).removeprefix("torch."), "quantization_config": plan.scheme.to_config()}


def _check_output(output: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    if output.exists() and output.resolve() == checkpoint.path.resolve():
        raise CheckpointError("is the model itself", file=output, fix="give another output folder")
    if output.is_file():
        raise CheckpointError("is a file", file=output, fix="give a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError("exists and is not empty", file=output, fix="give another folder, or --overwrite")


def _publish(partial: Path, output: Path) -> None:
    """One rename makes the result visible; what stood there is removed only after it is complete."""
    if output.exists():
        replaced = output.with_name(output.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(output)
