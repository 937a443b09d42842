"""The conversion: one decoder block in memory at a time, calibrated through the blocks already quantized.

    (--auto-bits: the bits of each layer are chosen first, see sensitivity.py)
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.multimodal import text_config
from ...errors import CheckpointError, UserError
from ...version import __version__ as nibble_version
from .. import canary, formats
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.journal import Journal, fingerprint
from ..checkpoint.output import check_disk, check_output, unpublish, writing
from ..checkpoint.side_files import copy_side_files
from ..checkpoint.writer import ShardWriter, config_in, write_json, write_sums
from ..device import named_device
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
from .plan import Plan, make_plan
from .recipe import CALIB_SAMPLES, CALIB_SEQLEN, Recipe
from .report import BlockReport, Progress, Report
from .sensitivity import allocate
from .witness import witness


def quantize_checkpoint(
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
    """Quantize a checkpoint (HF folder, .gguf file or Hub id) into the folder `output`; returns what was done.

    calib: a UTF-8 text file instead of the bundled mix. overwrite: replace what is in `output`. resume: go on with what
    an interrupted run of the same conversion left in OUT.partial; the result is the same, byte for byte.
    activation_memory: bytes of activations beyond which they go to disk and through a block in parts. `announce` is
    told the plan before work starts, `progress` how far it is.

    Raises UserError on bad input; then there is no `output`.
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
        report = Report(
            checkpoint.path,
            recipe,
            plan,
            samples,
            source_scheme=checkpoint.scheme.describe() if checkpoint.scheme else None,
            bytes_before=checkpoint.nbytes,
        )
        writer = ShardWriter(partial)
        tokens = None if samples is None else samples.token_ids.tolist()
        run = fingerprint(
            checkpoint,
            recipe,
            plan.group_sizes,
            plan.bits,
            tokens,
            windows_at_once(source, calib_seqlen, activation_memory),
            nibble_version,
        )
        journal = Journal.open(writer, run)
        _convert_outside(checkpoint, source, journal)
        _convert_blocks(source, journal, report, activation_memory, progress)
        digests = writer.finish()
        report.bytes_after = sum(file.stat().st_size for file in digests)
        write_json(partial / "config.json", _config(checkpoint, plan))
        write_json(partial / canary.FILE, canary.as_json(witness(partial, source.device)))
        write_sums(partial, digests)
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
    """What `quantize_checkpoint` would do and need, from headers alone. Raises what its preflight would raise."""
    checkpoint, source, plan = _prepare(model, Path(output), recipe, device, overwrite, resume)
    needs = estimate(checkpoint, source, plan, recipe, calib_samples * calib_seqlen)
    check_disk(Path(output), needs.disk)
    return plan, needs


def _prepare(
    model: str | Path, output: Path, recipe: Recipe, device: str, overwrite: bool, resume: bool
) -> tuple[Checkpoint, BlockSource, Plan]:
    where = named_device(device)
    checkpoint = open_checkpoint(model)
    if resume:
        unpublish(output)
    check_output(output, checkpoint, overwrite, resume)
    source = BlockSource(checkpoint, where)
    return checkpoint, source, make_plan(checkpoint, source, recipe)


def _convert_outside(checkpoint: Checkpoint, source: BlockSource, journal: Journal) -> None:
    """Embeddings, the last norm and the head, dense, in the model's dtype, one tensor in memory at a time; what else a
    multimodal model has, as it is."""
    names = _outside_blocks(checkpoint, source)
    own = (source.spec.prefix, f"{source.spec.head}.")
    for name, module in list(names.items())[len(journal.entries) :]:
        dtype = source.dtype if name.startswith(own) else None
        tensor = checkpoint.dense(module, dtype) if module else checkpoint.tensor(name, dtype)
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
    if progress is not None:
        progress(Progress(len(done), len(source), 0.0, None, len(done)))
    for index in range(len(done), len(source)):
        began = time.monotonic()
        block = source.load(index)
        result = quantize_block(source, index, block, activations, report.plan, report.recipe)
        tensors = _block_tensors(source, index, block, result, report.plan)
        entry = BlockReport.of(result, time.monotonic() - began)
        goes_on = index + 1 < len(source)
        state = activations.state() if activations is not None and goes_on else None
        journal.record(*journal.writer.add(tensors), asdict(entry), state)
        report.add(entry)
        source.checkpoint.release()
        if progress is not None:
            worst = max(entry.layer_error.values(), default=None)
            progress(Progress(index + 1, len(source), time.monotonic() - start, worst, len(done)))


def _block_tensors(
    source: BlockSource, index: int, block: nn.Module, result: BlockResult, plan: Plan
) -> dict[str, Tensor]:
    """All tensors of a block by full name, quantized ones in the target format, others in the model's dtype, or in
    their own where rounding them would be felt."""
    prefix, as_stored = source.name(index), source.spec.layers[index].as_stored
    write = formats.by_method(plan.scheme.method).write
    kept = {*as_stored, *(name for name, _ in block.named_buffers())}  # as exact as they were
    tensors = {
        f"{prefix}.{name}": value.to(
            source.checkpoint.dtype(f"{prefix}.{name}") if name in kept else plan.dtype
        )
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
    blocks = tuple(f"{source.name(index)}." for index in range(len(source)))
    weights = {f"{m}.weight": m for m in sorted(checkpoint.modules()) if not m.startswith(blocks)}
    loose = {name: "" for name in sorted(checkpoint.loose_names()) if not name.startswith(blocks)}
    return weights | loose


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
    context = text_config(checkpoint.config).get("max_position_embeddings")
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
    return config_in(plan.dtype, checkpoint) | {"quantization_config": plan.scheme.to_config()}
