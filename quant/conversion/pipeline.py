"""The conversion: one decoder block in memory at a time, calibrated through the blocks already quantized.

    (--auto-bits: the bits of each layer are chosen first, see bit_allocation.py)
    for each block:  read lazily -> fold AWQ's scales -> run the activations through it, quantizing each linear with
                     error compensation (GPTQ) the moment its inputs arrive -> write its part -> journal it -> free

Invariant: OUT appears whole or not at all (output.py), and a run killed at any point can be resumed and ends in the
same bytes (journal.py): the activations that enter a block are kept beside the parts. Each block's inputs are the
outputs of the quantized blocks before it, and within a block GPTQ sees each linear's inputs through the linears already
quantized, so errors are made up for instead of adding up unseen.

AWQ and GPTQ name what is written. Scaling channels helps whatever rounds them and compensation helps whatever the
format, so both formats get both (SmolLM2, 4 bits, asymmetric, group 64, mean KL on held-out prose: rounding .319, range
search .185, GPTQ .153, AWQ scales and range search .152, AWQ scales and GPTQ .109). FP8 needs neither.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UserError
from ...version import __version__ as nibble_version
from .. import formats
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.journal import Journal, fingerprint
from ..checkpoint.output import check_disk, check_output, unpublish, writing
from ..checkpoint.side_files import copy_side_files
from ..checkpoint.writer import ShardWriter, write_json
from . import calibration
from .block_quantizer import (
    ACTIVATION_BYTES,
    Activations,
    BlockResult,
    quantize_block,
    windows_at_once,
)
from .blocks import BlockSource
from .calibration import Samples
from .estimate import Estimate, estimate
from .plan import FP8Scheme, Plan, Recipe, Target, make_plan
from .sensitivity import allocate

CALIB_SAMPLES = 24  # windows; more helps a little and costs in proportion
CALIB_SEQLEN = 512  # tokens a window


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is, told after each block."""

    block: int  # blocks done
    blocks: int
    seconds: float  # since this run began
    error: (
        float | None
    )  # relative output error of the worst layer of the block; None where nothing was calibrated
    blocks_before: int = 0  # done by the runs that this one resumes
    doing: str = "Quantizing"

    @property
    def seconds_left(self) -> float:
        return self.seconds / (self.block - self.blocks_before) * (self.blocks - self.block)


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What became of one block, as the journal keeps it."""

    seconds: float
    quantized_weights: int
    quantized_bytes: int
    layer_error: dict[str, float]
    fallbacks: dict[str, str]

    @classmethod
    def of(cls, result: BlockResult, seconds: float) -> "BlockReport":
        weights = result.weights.values()
        return cls(
            seconds,
            sum(weight.codes.numel() for weight in weights),
            sum(weight.nbytes for weight in weights),
            result.layer_error,
            result.fallbacks,
        )


@dataclass(slots=True)
class Report:
    """What a conversion did, for the accuracy card."""

    source: Path
    recipe: Recipe
    plan: Plan
    samples: Samples | None
    seconds: float = 0.0  # of quantizing, over all runs that took part
    bytes_before: int = 0
    bytes_after: int = 0
    quantized_weights: int = 0
    quantized_bytes: int = 0  # of those weights with their scales and zero points
    layer_error: dict[str, float] = field(
        default_factory=dict
    )  # |(W - Q) x|^2 / |W x|^2 on calibration inputs
    fallbacks: dict[str, str] = field(
        default_factory=dict
    )  # module -> why round-to-nearest was used

    def add(self, block: "BlockReport") -> None:
        """Take in what became of a block."""
        self.seconds += block.seconds
        self.quantized_weights += block.quantized_weights
        self.quantized_bytes += block.quantized_bytes
        self.layer_error |= block.layer_error
        self.fallbacks |= block.fallbacks

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers."""
        return 8 * self.quantized_bytes / self.quantized_weights


def convert(
    model: str | Path,
    output: str | Path,
    method: Literal["awq", "gptq", "fp8"] = "awq",
    bits: int | None = None,
    group_size: int = 128,
    symmetric: bool | None = None,
    calib: str | Path | None = None,
    calib_samples: int = CALIB_SAMPLES,
    calib_seqlen: int = CALIB_SEQLEN,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    to: Target | None = None,
    fp8_scheme: FP8Scheme | None = None,
    kv_scales: bool = False,
    desc_act: bool = False,
    auto_bits: float | None = None,
) -> Path:
    """Quantize a checkpoint (HF folder, .gguf file or Hub id) into the folder `output` and return it.

    symmetric None: asymmetric for AWQ, symmetric for GPTQ. group_size: see plan.py for widths it does not divide.
    calib: a UTF-8 text file instead of the bundled mix. to: the format that is written, where the method has more than
    one ("gptq_v2", "compressed-tensors", "fp8"). fp8_scheme: "channel" (default), "tensor" or "block". kv_scales: also
    scales for an FP8 KV cache. desc_act: GPTQ's groups in order of importance. auto_bits: bits per weight on average,
    chosen layer by layer. Raises UserError on bad input; then there is no `output`.
    """
    recipe = Recipe.of(
        method,
        bits,
        group_size,
        symmetric,
        target=to,
        fp8_scheme=fp8_scheme,
        kv_scales=kv_scales,
        desc_act=desc_act,
        auto_bits=auto_bits,
    )
    convert_with_report(
        model,
        output,
        recipe,
        calib=calib,
        calib_samples=calib_samples,
        calib_seqlen=calib_seqlen,
        seed=seed,
        device=device,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )
    return Path(output)


def convert_with_report(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    calib: str | Path | None = None,
    calib_samples: int = CALIB_SAMPLES,
    calib_seqlen: int = CALIB_SEQLEN,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    activation_memory: int = ACTIVATION_BYTES,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> Report:
    """As `convert`, from a checked recipe; returns what was done. `announce` is told the plan before work starts.

    resume: go on with what an interrupted run of the same conversion left in OUT.partial; the result is the same, byte
    for byte. activation_memory: bytes of activations beyond which they go to disk and through a block in parts.
    """
    output = Path(output)
    checkpoint, source, plan = _prepare(model, output, recipe, device, overwrite, resume)
    disk = estimate(checkpoint, source, plan, recipe, calib_samples * calib_seqlen).disk
    check_disk(output, disk)
    with writing(output, disk, resume) as partial:
        copy_side_files(checkpoint, partial)
        samples = (
            _samples(checkpoint, partial, calib, calib_samples, calib_seqlen, seed)
            if recipe.calibrated
            else None
        )
        if samples is not None and recipe.auto_bits is not None:
            plan = allocate(source, samples, plan, recipe, _telling(progress, len(source)))
        if announce is not None:
            announce(plan)
        report = Report(checkpoint.path, recipe, plan, samples, bytes_before=checkpoint.nbytes)
        writer = ShardWriter(partial)
        tokens = None if samples is None else samples.token_ids.tolist()
        run = fingerprint(
            checkpoint,
            recipe,
            plan.bits,
            tokens,
            windows_at_once(source, calib_seqlen, activation_memory),
            nibble_version,
        )
        journal = Journal.open(writer, run)
        _convert_outside(checkpoint, source, journal)
        _convert_blocks(source, journal, report, activation_memory, progress)
        files = writer.finish()
        report.bytes_after = sum(file.stat().st_size for file in files)
        write_json(partial / "config.json", _config(checkpoint, plan))
    return report


def _telling(
    progress: Callable[[Progress], None] | None, blocks: int
) -> Callable[[int, float], None]:
    """Tell `progress` how far the choice of bits is."""

    def tell(done: int, seconds: float) -> None:
        if progress is not None:
            progress(Progress(done, blocks, seconds, None, doing="Choosing bits"))

    return tell


def dry_run(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    calib_samples: int = CALIB_SAMPLES,
    calib_seqlen: int = CALIB_SEQLEN,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
) -> tuple[Plan, Estimate]:
    """What `convert_with_report` would do and need, from headers alone. Raises what its preflight would raise."""
    checkpoint, source, plan = _prepare(model, Path(output), recipe, device, overwrite, resume)
    needs = estimate(checkpoint, source, plan, recipe, calib_samples * calib_seqlen)
    check_disk(Path(output), needs.disk)
    return plan, needs


def _prepare(
    model: str | Path, output: Path, recipe: Recipe, device: str, overwrite: bool, resume: bool
) -> tuple[Checkpoint, BlockSource, Plan]:
    where = compute_device(device)
    checkpoint = open_checkpoint(model)
    if resume:
        unpublish(output)
    check_output(output, checkpoint, overwrite, resume)
    source = BlockSource(checkpoint, where)
    return checkpoint, source, make_plan(checkpoint, source, recipe)


def compute_device(name: str) -> torch.device:
    """The device of that name. Raises UserError where torch has none such here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--device {name}: is no device (give cpu, cuda or one of several such as cuda:1)"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is not supported (cpu and cuda are)")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no CUDA GPU here (install a driver and a "
            "CUDA build of torch, or use --device cpu)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0"
        )
    return device


def _convert_outside(checkpoint: Checkpoint, source: BlockSource, journal: Journal) -> None:
    """Embeddings, the last norm and the head, dense, in the model's dtype, one tensor in memory at a time."""
    names = _outside_blocks(checkpoint, source)
    for name, module in list(names.items())[len(journal.entries) :]:
        tensor = (
            checkpoint.dense(module, source.dtype)
            if module
            else checkpoint.tensor(name, source.dtype)
        )
        journal.record(*journal.writer.add({name: tensor}), {}, None)
        checkpoint.release()


@torch.no_grad()
def _convert_blocks(
    source: BlockSource,
    journal: Journal,
    report: Report,
    activation_memory: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    start = time.monotonic()
    done = [entry["report"] for entry in journal.entries if entry["report"]]
    for entry in done:
        report.add(BlockReport(**entry))
    activations = (
        None
        if report.samples is None
        else Activations(
            source, report.samples, journal.state(), journal.writer.work, activation_memory
        )
    )
    for index in range(len(done), len(source)):
        began = time.monotonic()
        block = source.load(index)
        result = quantize_block(source, index, block, activations, report.plan, report.recipe)
        tensors = _block_tensors(source, index, block, result, report.plan)
        entry = BlockReport.of(result, time.monotonic() - began)
        last = activations is None or index + 1 == len(source)
        journal.record(
            *journal.writer.add(tensors), asdict(entry), None if last else activations.state()
        )
        report.add(entry)
        source.checkpoint.release()
        if progress is not None:
            worst = max(entry.layer_error.values(), default=None)
            progress(Progress(index + 1, len(source), time.monotonic() - start, worst, len(done)))


def _block_tensors(
    source: BlockSource, index: int, block: nn.Module, result: BlockResult, plan: Plan
) -> dict[str, Tensor]:
    """All tensors of a block by full name, quantized ones in the target format, others in the model's dtype."""
    prefix = source.name(index)
    write = formats.by_method(plan.scheme.method).write
    tensors = {
        f"{prefix}.{name}": value.to(plan.dtype)
        for name, value in block.state_dict().items()
        if name.removesuffix(".weight") not in result.weights
    }
    tensors |= {f"{prefix}.{name}": scale for name, scale in result.scales.items()}
    for name, weight in result.weights.items():
        for suffix, tensor in write(weight.to("cpu"), plan.scheme.format).items():
            tensors[f"{prefix}.{name}.{suffix}"] = tensor
    return tensors


def _outside_blocks(checkpoint: Checkpoint, source: BlockSource) -> dict[str, str]:
    """Names of the tensors outside the blocks -> the module each is the weight of, "" where it is none."""
    blocks = f"{source.spec.prefix}layers."
    modules = checkpoint.modules()
    consumed = {name for m in modules for name in checkpoint.weight_names(m)}
    weights = {f"{m}.weight": m for m in sorted(modules) if not m.startswith(blocks)}
    return weights | {
        name: "" for name in sorted(checkpoint.names() - consumed) if not name.startswith(blocks)
    }


def _samples(
    checkpoint: Checkpoint,
    folder: Path,
    calib: str | Path | None,
    count: int,
    length: int,
    seed: int,
) -> Samples:
    if count < 1 or length < 8:
        raise UserError(
            f"--calib-samples {count} x --calib-seqlen {length} is too little (at least 1 x 8)"
        )
    context = checkpoint.config.get("max_position_embeddings")
    if isinstance(context, int) and length > context:
        raise UserError(
            f"--calib-seqlen {length} is more than the {context} positions that the model knows"
        )
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, model_max_length=1 << 40
        )  # text is cut into windows later
    except Exception as error:  # whatever transformers and tokenizers make of a damaged file
        raise CheckpointError(
            "has no tokenizer that can be loaded, which calibration needs",
            file=checkpoint.path,
            fix="put tokenizer.json and tokenizer_config.json of the original beside it",
        ) from error
    if calib is not None:
        return calibration.file_samples(tokenizer, Path(calib), count, length, seed)
    return calibration.bundled_samples(tokenizer, count, length, seed)


def _config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    dropped = ("quantization_config", "compression_config", "torch_dtype")
    config = {k: v for k, v in checkpoint.config.items() if k not in dropped}
    return config | {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quantization_config": plan.scheme.to_config(),
    }
