"""How far a long run is: a bar on a terminal, elsewhere a line every tenth of the way.

Invariant: nothing is drawn before the first news, so that bad input is answered by its error alone.
"""

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from nibble.quant.conversion.report import Progress as State

console = Console(stderr=True)


class Display:
    """Called with how far a run is; a context manager that takes the bar down."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, state: "State") -> None:
        if not console.is_terminal:
            _print_line(state)
            return
        if self._bar is None:
            self._bar = _bar()
        fields: dict[str, Any] = {"unit": state.unit, "rest": _rest(state), "total": state.blocks}
        task = next((t.id for t in self._bar.tasks if t.description == state.doing), None)
        if task is None:
            task = self._bar.add_task(state.doing, **fields)
        self._bar.update(task, completed=state.block, **fields)


def say(text: str) -> None:
    """A line to stderr, wrapped at words on a terminal and whole in a pipe or a file."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _bar() -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rest]}"),
        console=console,
    )
    bar.start()
    return bar


def _print_line(state: "State") -> None:
    if state.block * 10 // state.blocks > (state.block - 1) * 10 // state.blocks:
        text = f"{state.doing}: {state.block}/{state.blocks} {state.unit}{_rest(state, ', ')}"
        print(text, file=sys.stderr, flush=True)


def _rest(state: "State", before: str = "") -> str:
    parts = [] if state.seconds_left is None else [f"{state.seconds_left:.0f} s left"]
    parts += [] if state.error is None else [f"worst layer error {state.error:.2%}"]
    return before + ", ".join(parts) if parts else ""
