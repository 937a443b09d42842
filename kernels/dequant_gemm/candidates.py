"""What `nibble tune` tries, and the table that follows from what it measured: no device, no Triton.

    round 1   every tile of `gemm_candidates` at the rows of ANCHORS
    round 2   the best few of each anchor, with K split further
    round 3   the best for 16 rows, and every GEMV, at fewer rows; dequantization at all

A candidate wins where the geometric mean of its times over all shapes is smallest; one that failed once cannot.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from .tiles import Table, Tile

ANCHORS = (16, 32, 64, 128, 256, 512)  # rows that a tile is chosen for
FEW = (1, 2, 4, 8)  # rows that the GEMV may serve; below the first anchor
ROWS = (*FEW, *ANCHORS)
SURVIVORS = 3  # tiles of an anchor that reach the second round
SPLITS_PER_SM = (4, 8)  # in the second round
Shape = tuple[int, int]  # N, K

LLAMA_3_8B: tuple[Shape, ...] = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a product. `tile.rows` and `tile.max_group` mean nothing here; a GEMV uses `tile` from
    block_n on."""

    path: str  # "gemv", "gemm", "dequantize"
    tile: Tile | None = None

    def describe(self) -> str:
        """Such as "gemm 16x64 w4 s4 swap k2"."""
        if self.tile is None:
            return self.path
        t = self.tile
        size = f"{t.block_m}x{t.block_n}" if self.path == "gemm" else str(t.block_n)
        return f"{self.path} {size} w{t.warps} s{t.stages}{' swap' if t.swap else ''} k{t.splits_per_sm}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure."""

    shape: Shape
    rows: int
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Measurement:
    trial: Trial
    microseconds: float = math.inf
    reason: str = (
        ""  # why there is no time: it did not compile, spilled, or computed something else
    )


DEQUANTIZE = Candidate("dequantize")


def gemm_candidates(rows: int, cc: int) -> list[Candidate]:
    """Tiles for `rows` rows. None before cc 8.0, where Triton has no tensor cores."""
    if cc < 80:
        return []
    few = rows < 64
    # With many rows and the weight on the right, every warp decodes all of it (docs/KERNELS.md): only swapped there.
    return [
        Candidate("gemm", Tile(0, block_m, block_n, warps, stages, swap))
        for block_m in sorted({min(rows, 64), min(rows, 128)})
        for block_n in (64, 128)
        for warps in _warps(block_m, block_n)
        for stages in ((3, 4) if few else (2, 3))
        for swap in ((True, False) if few else (True,))
    ]


def _tile(candidate: Candidate) -> Tile:
    """Of a GEMV or GEMM. ValueError for dequantization, which has none."""
    if candidate.tile is None:
        raise ValueError(f"{candidate.path} has no tile")
    return candidate.tile


def _warps(block_m: int, block_n: int) -> tuple[int, ...]:
    """Four warps decode 64 outputs, eight would do so twice; a float32 accumulator of 128x128 needs the registers of
    eight."""
    return (4,) if block_n == 64 else (8,) if block_m >= 128 else (4, 8)


def gemv_candidates() -> list[Candidate]:
    """Each width with each number of warps, K split little or much."""
    return [
        Candidate("gemv", Tile(0, 1, block_n, warps, 1, splits_per_sm=splits))
        for block_n in (64, 128)
        for warps in (4, 8)
        for splits in (2, 8)
    ]


def first_round(done: list[Measurement], shapes: tuple[Shape, ...], cc: int) -> list[Trial]:
    """Of the card's own tiles. The rounds take the same: what was measured before, the shapes, the capability."""
    return [
        Trial(shape, rows, candidate)
        for shape in shapes
        for rows in ANCHORS
        for candidate in gemm_candidates(rows, cc)
    ]


def second_round(done: list[Measurement], shapes: tuple[Shape, ...], cc: int) -> list[Trial]:
    """Of the tiles that did best."""
    return [
        Trial(shape, rows, replace(candidate, tile=replace(_tile(candidate), splits_per_sm=splits)))
        for rows in ANCHORS
        for candidate in ranking(done, shapes, rows, ("gemm",))[:SURVIVORS]
        for splits in SPLITS_PER_SM
        for shape in shapes
    ]


def third_round(done: list[Measurement], shapes: tuple[Shape, ...], cc: int) -> list[Trial]:
    """Of the other paths, and of few rows."""
    few = [*ranking(done, shapes, ANCHORS[0], ("gemm",))[:1], *gemv_candidates()]
    trials = [
        Trial(shape, rows, candidate) for shape in shapes for rows in FEW for candidate in few
    ]
    return trials + [Trial(shape, rows, DEQUANTIZE) for shape in shapes for rows in ROWS]


def ranking(
    done: list[Measurement], shapes: tuple[Shape, ...], rows: int, paths: tuple[str, ...]
) -> list[Candidate]:
    """The candidates that were measured right at `rows` for every shape, fastest first."""
    means = means_at(done, shapes, rows)
    return sorted((c for c in means if c.path in paths), key=means.__getitem__)


def means_at(
    done: list[Measurement], shapes: tuple[Shape, ...], rows: int
) -> dict[Candidate, float]:
    """Geometric mean over the shapes, in microseconds, of each candidate that has a time for all of them."""
    spilled = {m.trial.candidate for m in done if m.reason}
    times: dict[Candidate, dict[Shape, float]] = defaultdict(dict)
    for m in done:
        if m.trial.rows == rows and m.trial.candidate not in spilled:
            times[m.trial.candidate][m.trial.shape] = m.microseconds
    return {
        candidate: math.exp(sum(map(math.log, by_shape.values())) / len(by_shape))
        for candidate, by_shape in times.items()
        if set(shapes) <= set(by_shape)
    }


def build_table(
    done: list[Measurement],
    shapes: tuple[Shape, ...],
    cc: int,
    weights: tuple[str, ...],
    origin: str,
) -> Table:
    """The fastest of everything that was measured."""
    means = {rows: means_at(done, shapes, rows) for rows in ROWS}
    best = {rows: _fastest(means[rows], "gemm") for rows in ANCHORS}
    tiles = [replace(_tile(candidate), rows=rows) for rows, candidate in best.items() if candidate]
    gemv = _fastest(means[FEW[0]], "gemv") or gemv_candidates()[0]
    gemv_rows = _served_by_gemv(means, gemv)
    return Table(
        cc,
        gemv_rows,
        _tile(gemv).block_n,
        _tile(gemv).warps,
        max(_dequantize_rows(means), gemv_rows + 1),
        tuple(_merged(tiles)),
        _tile(gemv).splits_per_sm,
        weights,
        origin,
    )


def _fastest(means: dict[Candidate, float], path: str) -> Candidate | None:
    return min((c for c in means if c.path == path), key=means.__getitem__, default=None)


def _served_by_gemv(means: dict[int, dict[Candidate, float]], gemv: Candidate) -> int:
    """The most rows up to which the GEMV is faster than everything else."""
    served = 0
    for rows in FEW:
        others = [time for candidate, time in means[rows].items() if candidate.path != "gemv"]
        if (
            means[rows].get(gemv, math.inf) > min(others, default=math.inf)
            or gemv not in means[rows]
        ):
            break
        served = rows
    return served


def _dequantize_rows(means: dict[int, dict[Candidate, float]]) -> int:
    """The first measured number of rows from which on dequantizing is the fastest of all."""
    first = ROWS[-1] + 1
    for rows in reversed(ROWS):
        gemm = [time for candidate, time in means[rows].items() if candidate.path == "gemm"]
        if (
            means[rows].get(DEQUANTIZE, math.inf) > min(gemm, default=math.inf)
            or DEQUANTIZE not in means[rows]
        ):
            break
        first = rows
    return first


def _merged(tiles: list[Tile]) -> list[Tile]:
    """Neighbours that differ in `rows` alone are one."""
    kept: list[Tile] = []
    for tile in tiles:
        if kept and replace(kept[-1], rows=tile.rows) == tile:
            kept.pop()
        kept.append(tile)
    return kept


def with_narrow(table: Table, narrow: Table, max_group: int) -> Table:
    """`table`, with the tiles of `narrow` for weights whose groups are at most `max_group` features."""
    tiles = tuple(replace(tile, max_group=max_group) for tile in narrow.gemm)
    return replace(table, gemm=(*tiles, *table.gemm))


def merge(old: list[Table], new: list[Table]) -> list[Table]:
    """What a file holds after `new` were measured: they replace those for the same weights, the others stay."""
    measured = {name for table in new for name in table.weights}
    return [table for table in old if not set(table.weights) & measured] + new
