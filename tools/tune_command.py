"""`nibble tune`: its options, and what it says on the way. The work is in tune.py.

The result is a table for the card in ~/.cache/nibble/tiles, which every later start reads. Nothing that needs torch is
imported before there is work for it: `nibble tune --help` is answered at once.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Printed

from nibble.errors import UserError
from nibble.kernels.dequant_gemm import candidates
from nibble.kernels.dequant_gemm.candidates import LLAMA_3_8B, ROWS
from nibble.kernels.dequant_gemm.tiles import (
    MEASURED,
    Table,
    as_json,
    file_name,
    measured_tables,
)


def tune_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Local folder, .gguf file or Hub id whose projections to measure",
            show_default="Llama 3 8B's",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="int4, int8, fp8; repeatable", show_default="the model's own, else all"),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N")] = "cuda",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write here",
            show_default=f"{MEASURED}/CARD.json, which every start reads",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N", help="Processes that compile; 0: as many as cores and memory allow"
        ),
    ] = 0,
) -> int:
    """Measure which tiles the quantized products are fastest with on this GPU. Takes minutes; let nothing else run."""
    import torch

    from nibble.quant.checkpoint.writer import write_text
    from nibble.tools import tune

    card = tune.need_card(device)
    shapes, own = (tune.shapes_of(model), tune.weights_of(model)) if model else (LLAMA_3_8B, None)
    names = weights or own or list(tune.WEIGHTS)
    if unknown := sorted(set(names) - set(tune.WEIGHTS)):
        raise UserError(f"--weights {unknown[0]!r} is unknown; use {', '.join(tune.WEIGHTS)}")
    name = torch.cuda.get_device_name(card)
    target = out or MEASURED.expanduser() / file_name(name)
    # Not forked: a process that has initialized CUDA cannot be.
    pool = ProcessPoolExecutor(
        workers or tune.workers_for(card), multiprocessing.get_context("spawn")
    )
    with pool, _progress() as tell:
        tuner = tune.Tuner(shapes, card, pool, tell)
        found = [tuner.measure(kind) for kind in names]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, as_json(candidates.merge(measured_tables(target), found)))
    for table in found:
        Console().print(_printed(table))
    print(
        f"{name}: written to {target}"
        + ("" if out is None else f"; starts read {MEASURED}/{file_name(name)}")
    )
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total
        )


def _printed(table: Table) -> Printed:
    shown = Printed("rows", "path", title=", ".join(table.weights))
    if table.gemv_rows:
        shown.add_row(
            f"1 to {table.gemv_rows}",
            f"GEMV, {table.gemv_block_n} outputs, {table.gemv_warps} warps",
        )
    first = table.gemv_rows + 1
    for tile in table.gemm:
        if not tile.max_group and first < min(tile.rows + 1, table.dequantize_rows):
            last = min(tile.rows, table.dequantize_rows - 1)
            shown.add_row(f"{first} to {last}", candidates.Candidate("gemm", tile).describe())
            first = last + 1
    beyond = f"from {table.dequantize_rows}" + (
        " (not measured)" if table.dequantize_rows > ROWS[-1] else ""
    )
    shown.add_row(beyond, "dequantize, cuBLAS")
    return shown
