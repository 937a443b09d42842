"""`nibble convert MODEL --awq|--gptq|--fp8 -o OUT`: quantize, measure, write the accuracy card."""

import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from nibble.cli import parse_bytes
from nibble.errors import UserError
from nibble.quant.card import Quality, summary, write_card
from nibble.quant.checkpoint.journal import begun
from nibble.quant.checkpoint.output import partial_of
from nibble.quant.conversion.block_quantizer import ACTIVATION_BYTES
from nibble.quant.conversion.estimate import Estimate
from nibble.quant.conversion.pipeline import (
    CALIB_SAMPLES,
    CALIB_SEQLEN,
    Progress,
    convert_with_report,
    dry_run,
)
from nibble.quant.conversion.plan import Method, Plan, Recipe
from nibble.quant.reformat import Grid, reformat

console = Console(stderr=True)


def convert_command(
    model: Annotated[str, typer.Argument(help="HF folder, .gguf file or Hub id")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make")],
    awq: Annotated[bool, typer.Option("--awq", help="4-bit AWQ (GEMM layout)")] = False,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="GPTQ, 2, 3, 4 or 8 bits (v1 layout)")
    ] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="FP8 weights and activations (compressed-tensors)")
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
            "--requantize", help="With --to alone: round anew what that format cannot hold"
        ),
    ] = False,
    fp8_scheme: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="What shares a scale. channel: a row, activations by token; tensor: a matrix, "
            "activations fixed by calibration; block: 128 x 128 [default: channel]",
        ),
    ] = None,
    desc_act: Annotated[
        bool,
        typer.Option(
            "--desc-act",
            help="With --gptq: groups in order of importance (act-order); slower to serve",
        ),
    ] = False,
    kv_scales: Annotated[
        bool,
        typer.Option(
            "--kv-scales", help="Calibrate scales for an FP8 KV cache too (compressed-tensors only)"
        ),
    ] = False,
    bits: Annotated[int | None, typer.Option(help="Bits per weight [default: 4]")] = None,
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
            help="Input columns per scale; -1: whole rows. Halved where it does not divide a width"
        ),
    ] = 128,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym",
            help="Zero point in the middle, or fitted [default: asym for AWQ, sym for GPTQ]",
        ),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="UTF-8 text to calibrate on, instead of the bundled mix")
    ] = None,
    calib_samples: Annotated[int, typer.Option(help="Windows to calibrate on")] = CALIB_SAMPLES,
    calib_seqlen: Annotated[int, typer.Option(help="Tokens a window")] = CALIB_SEQLEN,
    seed: Annotated[int, typer.Option(help="Chooses the windows")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda")] = "cpu",
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure the result")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted conversion to OUT")
    ] = False,
    activation_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Activations beyond this go to disk, and through a block in parts [default: 2GiB]",
        ),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do and need, and do nothing")
    ] = False,
) -> None:
    """Quantize a model to AWQ, GPTQ or FP8 weights and say what that cost."""
    if to is not None and not (awq or gptq or fp8):
        grid = Grid(bits or 4, group_size, bool(symmetric)) if requantize else None
        return _reformat(model, output, to, grid, overwrite=overwrite, resume=resume)
    if requantize:
        raise UserError(
            "--requantize goes with --to and none of --awq, --gptq and --fp8, which quantize anew anyway"
        )
    recipe = Recipe.of(
        _method(awq, gptq, fp8),
        bits,
        group_size,
        symmetric,
        target=to,
        fp8_scheme=fp8_scheme,
        kv_scales=kv_scales,
        desc_act=desc_act,
        auto_bits=auto_bits,
    )
    run: dict[str, Any] = {
        "calib_samples": calib_samples,
        "calib_seqlen": calib_seqlen,
        "device": device,
        "overwrite": overwrite,
        "resume": resume,
    }
    if dry:
        _dry_run(*dry_run(model, output, recipe, **run))
    else:
        bound = activation_memory or ACTIVATION_BYTES
        _quantize(
            model,
            output,
            recipe,
            not no_eval,
            run | {"calib": calib, "seed": seed, "activation_memory": bound},
        )


def _quantize(model: str, output: Path, recipe: Recipe, measure: bool, run: dict[str, Any]) -> None:
    with _resumable(output) as check_interrupt, _progress() as show:

        def progress(state: Progress) -> None:
            check_interrupt()
            show(state)

        report = convert_with_report(
            model, output, recipe, progress=progress, announce=_announce, **run
        )
    peak = _peak_memory()  # before the evaluation adds to it
    write_card(output, report, [], _base_model(model), peak)  # also where measuring is cut short
    quality = _measure(model, output) if measure else []
    if quality:
        write_card(output, report, quality, _base_model(model), peak)
    print(
        f"{output}: {report.plan.scheme.describe()}, {report.bytes_before / 1e6:.0f} MB -> "
        f"{report.bytes_after / 1e6:.0f} MB, {report.bits_per_weight:.2f} bits per quantized weight, "
        f"{report.seconds:.0f} s, peak memory {peak / 1e9:.1f} GB"
    )
    if quality:
        print(summary(quality))


def _peak_memory() -> int:
    """The most bytes that this process has held. getrusage's figure begins with what the parent process held."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _method(awq: bool, gptq: bool, fp8: bool) -> Method:
    chosen = [name for name, on in (("awq", awq), ("gptq", gptq), ("fp8", fp8)) if on]
    if len(chosen) != 1:
        raise UserError(
            "choose one of --awq, --gptq and --fp8" + (f", not {len(chosen)}" if chosen else "")
        )
    return chosen[0]


def _base_model(model: str) -> str:
    """The original's name for the card: a Hub id as it is, a path by its last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def _announce(plan: Plan) -> None:
    console.print(f"{len(plan.group_sizes)} layers to {plan.scheme.describe()}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)


def _reformat(
    model: str, output: Path, to: str, grid: Grid | None, *, overwrite: bool, resume: bool
) -> None:
    with _resumable(output):
        done = reformat(model, output, to, grid, overwrite=overwrite, resume=resume)
    for note in done.notes:
        console.print(f"note: {note}", highlight=False)
    print(
        f"{output}: {done.scheme.describe()}, {done.kept} layers exactly as they were, {len(done.requantized)} "
        "requantized"
    )


@contextmanager
def _resumable(output: Path) -> Iterator[Callable[[], None]]:
    """Tell somebody who interrupts a conversion that it is not lost.

    Gives a function to call now and then: Python swallows an interrupt that comes while it runs a destructor or the
    callback of a library, and that function raises it again.
    """
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
            console.print(
                f"interrupted after {parts} parts: the same command with --resume goes on",
                highlight=False,
            )
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _dry_run(plan: Plan, needs: Estimate) -> None:
    _announce(plan)
    print(
        f"would write {needs.output / 1e9:.2f} GB; needs {needs.disk / 1e9:.2f} GB of disk, about "
        f"{needs.memory / 1e9:.1f} GB of memory and {needs.seconds / 60:.1f} minutes"
    )


def _measure(model: str, output: Path) -> list[Quality]:
    from nibble.tools.evaluate import evaluate, progress_bar  # brings the engine

    with progress_bar() as progress:
        return evaluate(model, output, progress=progress)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, else a line every tenth of the way."""
    if not console.is_terminal:
        yield _print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("blocks"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rest]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("Quantizing", total=None, rest="calibrating")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.doing,
                total=progress.blocks,
                completed=progress.block,
                rest=_rest(progress),
            )

        yield show


def _print_line(progress: Progress) -> None:
    if progress.block * 10 // progress.blocks > (progress.block - 1) * 10 // progress.blocks:
        print(
            f"{progress.doing}: block {progress.block}/{progress.blocks}, {_rest(progress)}",
            file=sys.stderr,
            flush=True,
        )


def _rest(progress: Progress) -> str:
    error = "" if progress.error is None else f", worst layer error {progress.error:.2%}"
    return f"{progress.seconds_left:.0f} s left{error}"


if __name__ == "__main__":
    from nibble.cli import main

    raise SystemExit(main(["convert", *sys.argv[1:]]))
