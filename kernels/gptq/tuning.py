"""Which tiles a product is computed with: a table per card in `configs/`, never a search while serving.

`configs/<device name>.json` (blanks as underscores) is a card's own measured table; where there is none,
`configs/heuristic.json` gives one by compute capability, reasoned from the roofline (docs/KERNELS.md) and compiled for
every capability by `make kernels-report`. Rows of `gemm` are ordered by `rows`; the first that holds M serves.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int  # M up to here
    block_m: int
    block_n: int
    warps: int
    stages: int
    swap: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    min_cc: int
    gemv_rows: int  # up to here the GEMV serves
    gemv_block_n: int
    gemv_warps: int
    dequantize_rows: int  # from here on: dequantize, then cuBLAS
    gemm: tuple[Tile, ...]

    def tile(self, rows: int) -> Tile:
        """The tile for `rows` rows of activations."""
        return tile_for(self.gemm, rows)


def tile_for(tiles, rows: int):
    """The first tile for that many rows, else the last."""
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


@cache
def table(device_name: str, cc: int) -> Table:
    """The table of a card, or of its compute capability (75, 80, ...)."""
    return table_of(FOLDER, tables, device_name, cc)


def table_of(folder: Path, read, device_name: str, cc: int):
    """The table of the card's own file in `folder`, else the heuristic's for `cc`; `read` lists a file's tables."""
    own = folder / f"{device_name.replace(' ', '_')}.json"
    if own.exists():
        return read(own)[0]
    return max((t for t in read(folder / "heuristic.json") if t.min_cc <= cc), key=lambda t: t.min_cc)


def tables(file: Path) -> list[Table]:
    """Every table of a file."""
    return [Table(**{**entry, "gemm": tuple(Tile(**tile) for tile in entry["gemm"])})
            for entry in json.loads(file.read_text())]


def split_k(programs: int, tiles: int, processors: int) -> int:
    """Parts to cut K into so that about two programs run on each multiprocessor, with four trips for each or more."""
    return max(1, min(2 * processors // programs, tiles // 4, 16))
