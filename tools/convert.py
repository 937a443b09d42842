"""Quantize, measure, write the accuracy card: `nibble.convert`, `nibble convert` and `python tools/convert.py` alike.

Nothing that needs torch is imported before there is work for it: `nibble convert --help` is answered at once.
"""

if __name__ == "__main__":  # python tools/convert.py
    from script import run

    raise SystemExit(run("convert"))

import functools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nibble.quant.conversion.recipe import (
    CALIB_SAMPLES,
    CALIB_SEQLEN,
    FP8Scheme,
    Method,
    Recipe,
    Target,
)

if TYPE_CHECKING:
    from nibble.quant.conversion.plan import Plan
    from nibble.quant.conversion.report import Progress


def convert(
    model: str | Path,
    output: str | Path | None = None,
    method: Method = "awq",
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
    progress: "Callable[[Progress], None] | None" = None,
    to: Target | None = None,
    fp8_scheme: FP8Scheme | None = None,
    kv_scales: bool = False,
    desc_act: bool = False,
    auto_bits: float | None = None,
    *,
    evaluate: bool = True,
    activation_memory: int | None = None,
    announce: "Callable[[Plan], None] | None" = None,
) -> Path:
    """Quantize a checkpoint, measure what that cost, and write the accuracy card; returns the folder that it made.

    model: an HF folder, a .gguf file or a Hub id.
    output: the folder to make; None: `default_output`, in the working directory.
    method: "awq" (4 bits), "gptq" (2, 3, 4 or 8) or "fp8"; bits None: 4, or 8 for FP8.
    group_size: input columns a scale, -1 for whole rows; for widths it does not divide see quant/conversion/plan.py.
    symmetric: the zero point in the middle; None: fitted for AWQ, in the middle for GPTQ.
    calib: a UTF-8 text file to calibrate on instead of the bundled mix: calib_samples windows, drawn with seed, of
    calib_seqlen tokens each.
    device: where to compute, "cpu", "cuda" or "cuda:N".
    overwrite: replace what is at `output`. resume: go on with what an interrupted run left; the same bytes result.
    progress: called after each block, and while measuring after each window.
    to: the format that is written, where a method has more than one: "gptq_v2", "compressed-tensors", "fp8".
    fp8_scheme: what shares a scale: "channel" (None: this), "tensor" or "block". kv_scales: calibrate scales for an
    FP8 KV cache, too. desc_act: GPTQ's groups in order of importance. auto_bits: bits a weight on average, chosen layer
    by layer (GPTQ).
    evaluate: measure perplexity, KL divergence and top-1 agreement against `model` on the bundled held-out text, with
    Nibble's engine; False: the card says that nothing was measured.
    activation_memory: bytes of activations beyond which they go to disk; None: 2 GiB.
    announce: told the plan (what is quantized how, with notes for people) before work starts.

    Raises UserError on bad input; then there is no `output`. Files: FORMATS.md, "When a conversion is interrupted".
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
    output = default_output(model, recipe) if output is None else Path(output)
    quantize_and_measure(
        model,
        output,
        recipe,
        evaluate=evaluate,
        calib=calib,
        calib_samples=calib_samples,
        calib_seqlen=calib_seqlen,
        seed=seed,
        device=device,
        overwrite=overwrite,
        resume=resume,
        activation_memory=activation_memory,
        progress=progress,
        announce=announce,
    )
    return output


def quantize_and_measure(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    evaluate: bool = True,
    activation_memory: int | None = None,
    progress: "Callable[[Progress], None] | None" = None,
    **run: Any,
) -> None:
    """`convert` from a checked recipe. run: the other arguments of `quantize_checkpoint`."""
    from nibble.quant.card import write_card
    from nibble.quant.conversion.block_quantizer import ACTIVATION_BYTES
    from nibble.quant.conversion.pipeline import quantize_checkpoint

    bound = activation_memory or ACTIVATION_BYTES
    report = quantize_checkpoint(
        model, output, recipe, activation_memory=bound, progress=progress, **run
    )
    card = functools.partial(
        write_card,
        output,
        report,
        base_model=base_model(model),
        peak_rss=_peak_memory(),  # before measuring adds to it
    )
    card(quality=[])  # it stays where measuring is cut short
    if evaluate:
        from nibble.tools import evaluate as measuring  # brings the engine

        tell = measuring.telling(progress) if progress else None
        card(quality=measuring.evaluate(model, output, progress=tell))


def default_output(model: str | Path, recipe: Recipe) -> Path:
    """MODEL-NAME-AWQ-INT4-g128, in the working directory: what was asked for, whatever each layer then gets."""
    parts = [base_model(model).rpartition("/")[2], recipe.method.upper()]
    if recipe.method == "fp8":
        parts += [] if recipe.fp8_scheme == "channel" else [recipe.fp8_scheme]
    else:
        parts.append(
            f"INT{recipe.bits}" if recipe.auto_bits is None else f"AUTO{recipe.auto_bits:g}"
        )
        parts += [] if recipe.group_size == -1 else [f"g{recipe.group_size}"]
    return Path("-".join(parts))


def base_model(model: str | Path) -> str:
    """The original's name for the card: a Hub id as it is, a path by its last part."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else str(model)


def _peak_memory() -> int:
    """The most bytes that this process has held. getrusage's figure begins with what the parent process held."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
