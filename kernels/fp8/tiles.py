"""Tiles of the W8A8 products: a table per card in `configs/`, or the heuristic's by capability.

`nibble tune` does not measure these yet: a card's own table is written by hand.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..dequant_gemm.tiles import file_name

FOLDER = Path(__file__).parent / "configs" / "w8a8"


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int  # M up to here
    block_m: int
    block_n: int
    block_k: int  # at most; a weight's groups may ask for less
    warps: int
    stages: int
    swap: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    min_cc: int
    quantize_rows: int  # up to here the product quantizes its rows itself, which saves a launch
    promote: bool  # the tensor cores' sums have fewer bits than float32: add them up outside
    gemm: tuple[Tile, ...]

    def tile(self, rows: int) -> Tile:
        """The tile for `rows` rows of activations."""
        return next((tile for tile in self.gemm if rows <= tile.rows), self.gemm[-1])


@cache
def table(device_name: str, cc: int) -> Table:
    """The table of a card, or of its compute capability (89, 90, ...)."""
    own = FOLDER / file_name(device_name)
    if own.exists():
        return tables(own)[0]
    return max(
        (t for t in tables(FOLDER / "heuristic.json") if t.min_cc <= cc), key=lambda t: t.min_cc
    )


def tables(file: Path) -> list[Table]:
    """Every table of a file."""
    return [
        Table(**{**entry, "gemm": tuple(Tile(**tile) for tile in entry["gemm"])})
        for entry in json.loads(file.read_text())
    ]
