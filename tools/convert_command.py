"""`nibble convert MODEL --awq|--gptq|--fp8`: its options, and what it says on the way. The work is in convert.py."""

import functools
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nibble.cli import parse_bytes
from nibble.errors import UserError
from nibble.quant.conversion.recipe import CALIB_SAMPLES, CALIB_SEQLEN, Method, Recipe
from nibble.tools.convert import base_model, default_output, quantize_and_measure
from nibble.tools.progress import Display, say

if TYPE_CHECKING:
    from nibble.quant.conversion.plan import Plan
    from nibble.quant.conversion.recipe import FP8Scheme, Target
    from nibble.quant.conversion.report import Progress

_CALIBRATION, _RUN = "Calibration", "The run"  # panels of --help


def convert_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="HF folder, .gguf file or Hub id")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Folder to make",
            show_default="./MODEL-AWQ-INT4-g128 and the like",
        ),
    ] = None,
    awq: Annotated[bool, typer.Option("--awq", metavar="", help="4-bit AWQ (GEMM layout)")] = False,
    gptq: Annotated[
        bool, typer.Option("--gptq", metavar="", help="GPTQ, 2, 3, 4 or 8 bits (v1 layout)")
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option("--fp8", metavar="", help="FP8 weights and activations (compressed-tensors)"),
    ] = False,
    bits: Annotated[
        int | None, typer.Option(metavar="N", help="Bits per weight", show_default="4")
    ] = None,
    auto_bits: Annotated[
        float | None,
        typer.Option(
            metavar="AVG",
            help="With --gptq: bits chosen for each layer, this many on average (such as 3.5)",
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Input columns per scale; -1: whole rows. Halved where it does not divide a width",
        ),
    ] = 128,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym",
            metavar="",
            help="Zero point in the middle, or fitted",
            show_default="asym for AWQ, sym for GPTQ",
        ),
    ] = None,
    fp8_scheme: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="What shares a scale. channel: a row, activations by token; tensor: a matrix, "
            "activations fixed by calibration; block: 128 x 128",
            show_default="channel",
        ),
    ] = None,
    desc_act: Annotated[
        bool,
        typer.Option(
            "--desc-act",
            metavar="",
            help="With --gptq: groups in order of importance (act-order); slower to serve",
        ),
    ] = False,
    kv_scales: Annotated[
        bool,
        typer.Option(
            "--kv-scales",
            metavar="",
            help="Calibrate scales for an FP8 KV cache too (compressed-tensors only)",
        ),
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Write awq, gptq, gptq_v2, compressed-tensors or fp8. Alone, without --awq, --gptq or "
            "--fp8: change the format of a quantized model and not one value",
        ),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            metavar="",
            help="With --to alone: round anew what that format cannot hold",
        ),
    ] = False,
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to calibrate on",
            show_default="the bundled mix",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    calib_samples: Annotated[
        int,
        typer.Option(metavar="N", help="Windows to calibrate on", rich_help_panel=_CALIBRATION),
    ] = CALIB_SAMPLES,
    calib_seqlen: Annotated[
        int, typer.Option(metavar="N", help="Tokens a window", rich_help_panel=_CALIBRATION)
    ] = CALIB_SEQLEN,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Chooses the windows", rich_help_panel=_CALIBRATION)
    ] = 0,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda or cuda:N", rich_help_panel=_RUN)
    ] = "cpu",
    no_eval: Annotated[
        bool,
        typer.Option(
            "--no-eval", metavar="", help="Do not measure the result", rich_help_panel=_RUN
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", metavar="", help="Replace OUT if it exists", rich_help_panel=_RUN
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            help="Go on with an interrupted conversion to OUT",
            rich_help_panel=_RUN,
        ),
    ] = False,
    activation_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Activations beyond this go to disk, and through a block in parts",
            show_default="2GiB",
            rich_help_panel=_RUN,
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            help="Say what it would do and need, and do nothing",
            rich_help_panel=_RUN,
        ),
    ] = False,
) -> None:
    """Quantize a model to AWQ, GPTQ or FP8 weights and say what that cost.

    Example: nibble convert HuggingFaceTB/SmolLM2-135M-Instruct --awq
    """
    if to is not None and not (awq or gptq or fp8):
        grid = (bits or 4, group_size, bool(symmetric)) if requantize else None
        output = output or Path(f"{base_model(model).rpartition('/')[2]}-{to}")
        return _reformat(model, output, to, grid, overwrite, resume)
    if requantize:
        raise UserError(
            "--requantize goes with --to and none of --awq, --gptq and --fp8, which quantize anew anyway"
        )
    recipe = Recipe.of(
        _method(awq, gptq, fp8),
        bits,
        group_size,
        symmetric,
        target=cast("Target | None", to),  # checked by Recipe.of, as the scheme is
        fp8_scheme=cast("FP8Scheme | None", fp8_scheme),
        kv_scales=kv_scales,
        desc_act=desc_act,
        auto_bits=auto_bits,
    )
    if output is None:
        output = default_output(model, recipe)
        say(f"no -o given: the result goes to ./{output}")
    run: dict[str, Any] = {
        "calib_samples": calib_samples,
        "calib_seqlen": calib_seqlen,
        "device": device,
        "overwrite": overwrite,
        "resume": resume,
    }
    if dry:
        return _dry_run(model, output, recipe, run)
    run |= {"calib": calib, "seed": seed, "activation_memory": activation_memory}
    _convert(model, output, recipe, run | {"evaluate": not no_eval})


def _convert(model: str, output: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    with _resumable(output) as check_interrupt, Display() as show:

        def progress(state: "Progress") -> None:
            check_interrupt()
            show(state)

        announce = functools.partial(_announce, recipe)
        quantize_and_measure(model, output, recipe, progress=progress, announce=announce, **run)
    _print_card(output)


def _print_card(output: Path) -> None:
    """What the accuracy card says, for the terminal."""
    from nibble.quant.card import Quality, summary

    record = json.loads((output / "nibble_quality.json").read_text(encoding="utf-8"))
    print(
        f"{output}: {record['scheme']}, {record['bytes_before'] / 1e6:.0f} MB -> "
        f"{record['bytes_after'] / 1e6:.0f} MB, {record['bits_per_weight']:.2f} bits per quantized weight, "
        f"{60 * record['minutes']:.0f} s, peak memory {record['peak_rss_bytes'] / 1e9:.1f} GB"
    )
    if record["evaluation"]:
        print(summary([Quality(**row) for row in record["evaluation"]]))


def _method(awq: bool, gptq: bool, fp8: bool) -> Method:
    given: dict[Method, bool] = {"awq": awq, "gptq": gptq, "fp8": fp8}
    chosen = [name for name, on in given.items() if on]
    if len(chosen) != 1:
        raise UserError(
            "choose one of --awq, --gptq and --fp8" + (f", not {len(chosen)}" if chosen else "")
        )
    return chosen[0]


def _announce(recipe: Recipe, plan: "Plan") -> None:
    what = plan.scheme.describe()
    if recipe.auto_bits is not None:
        widths = ", ".join(map(str, recipe.widths))
        what = (
            f"{recipe.target} of {recipe.auto_bits:g} bits on average, each layer one of {widths}"
        )
    say(f"{len(plan.group_sizes)} layers to {what}")
    for warning in plan.warnings:
        say(f"warning: {warning}")
    for note in plan.notes:
        say(f"note: {note}")


def _reformat(
    model: str,
    output: Path,
    to: str,
    grid: tuple[int, int, bool] | None,
    overwrite: bool,
    resume: bool,
) -> None:
    from nibble.quant.reformat import Grid, reformat

    anew = Grid(*grid) if grid else None
    with _resumable(output):
        done = reformat(model, output, to, anew, overwrite=overwrite, resume=resume)
    for note in done.notes:
        say(f"note: {note}")
    print(
        f"{output}: {done.scheme.describe()}, {done.kept} layers exactly as they were, {len(done.requantized)} "
        "requantized"
    )


def _dry_run(model: str, output: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    from nibble.quant.conversion.pipeline import dry_run

    plan, needs = dry_run(model, output, recipe, **run)
    _announce(recipe, plan)
    print(
        f"would write {needs.output / 1e9:.2f} GB; needs {needs.disk / 1e9:.2f} GB of disk, about "
        f"{needs.memory / 1e9:.1f} GB of memory and {needs.seconds / 60:.1f} minutes"
    )


@contextmanager
def _resumable(output: Path) -> Iterator[Callable[[], None]]:
    """Tell somebody who interrupts a conversion that it is not lost.

    Gives a function to call now and then: Python swallows an interrupt that comes while it runs a destructor or the
    callback of a library, and that function raises it again.
    """
    from nibble.quant.checkpoint.journal import begun
    from nibble.quant.checkpoint.output import partial_of

    interrupted: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    except KeyboardInterrupt:
        if parts := begun(partial_of(output)):
            say(f"interrupted after {parts} parts: the same command with --resume goes on")
        raise
    finally:
        signal.signal(signal.SIGINT, before)
