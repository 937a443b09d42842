"""Which tiles a product is computed with: tables in JSON, never a search while serving.

The first of these that has a table for the kind of weight is used:

    ~/.cache/nibble/tiles/<device name>.json    what `nibble tune` measured on this machine (blanks as underscores)
    <room>/configs/<device name>.json           measured, and shipped with the package
    configs/heuristic.json                      by compute capability: reasoned from the roofline (docs/KERNELS.md), and
                                                compiled for every capability by `make kernels-report`; of every room,
                                                for what differs between them weighs less than the card

Rows of `gemm` are ordered by `rows`; the first that holds M and admits the weight's group serves.
"""

import json
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ...quant.private_files import why_not_private

logger = logging.getLogger(__name__)

HEURISTIC = Path(__file__).parent / "configs" / "heuristic.json"
MEASURED = Path("~/.cache/nibble/tiles")  # where `nibble tune` writes
_BOUNDS = {  # of what a table may ask for
    "rows": (1, 1 << 20),
    "block_m": (16, 256),
    "block_n": (16, 512),
    "warps": (1, 16),
    "stages": (1, 8),
    "splits_per_sm": (1, 64),
    "max_group": (0, 1 << 20),
    "gemv_rows": (0, 1 << 20),
    "gemv_block_n": (16, 512),
    "gemv_warps": (1, 16),
    "gemv_splits_per_sm": (1, 64),
    "dequantize_rows": (1, 1 << 30),
}
_POWERS = ("block_m", "block_n", "warps", "gemv_block_n", "gemv_warps")


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int  # M up to here
    block_m: int
    block_n: int
    warps: int
    stages: int
    swap: bool = False
    splits_per_sm: int = 2  # K is split until about as many programs run on each multiprocessor
    max_group: int = 0  # for weights with a scale for at most as many features; 0: for all


@dataclass(frozen=True, slots=True)
class Table:
    min_cc: int
    gemv_rows: int  # up to here the GEMV serves
    gemv_block_n: int
    gemv_warps: int
    dequantize_rows: int  # from here on: dequantize, then cuBLAS
    gemm: tuple[Tile, ...]
    gemv_splits_per_sm: int = 2
    weights: tuple[str, ...] = ()  # as `weights_name` gives them; none: all
    origin: str = ""  # when, where and with what it was measured

    def tile(self, rows: int, group: int = 0) -> Tile:
        """The tile for `rows` rows of activations and a weight whose groups are `group` features (0: a whole row)."""
        fitting = [tile for tile in self.gemm if not tile.max_group or 0 < group <= tile.max_group]
        return next((tile for tile in fitting if rows <= tile.rows), fitting[-1])

    def serves(self, weights: str) -> bool:
        """Whether it is for this kind of weight."""
        return not self.weights or weights in self.weights


def weights_name(kind: str, bits: int) -> str:
    """What tables call a kind of weight: "int4", "fp8", "fp4"."""
    return {"fp8": "fp8", "table": "fp4"}.get(kind, f"int{bits}")


def file_name(device_name: str) -> str:
    """Of a card's own tables."""
    return device_name.replace(" ", "_").replace("/", "_") + ".json"


@cache
def table(device_name: str, cc: int, weights: str, shipped: Path) -> Table:
    """The table of a card, or of its compute capability (75, 80, ...), for a kind of weight. shipped: the room's
    folder of measured ones."""
    for folder in (MEASURED, shipped):
        for own in measured_tables(folder / file_name(device_name)):
            if own.serves(weights):
                return own
    fitting = (t for t in tables(HEURISTIC) if t.min_cc <= cc and t.serves(weights))
    return max(fitting, key=lambda t: t.min_cc)


def tables(file: Path) -> list[Table]:
    """Every table of a file. ValueError, TypeError or KeyError where it is none, or asks for what no card computes."""
    entries = json.loads(file.read_text())
    if not isinstance(entries, list):
        raise TypeError("not a list of tables")
    found = [
        Table(
            **{
                **entry,
                "gemm": tuple(Tile(**tile) for tile in entry["gemm"]),
                "weights": tuple(entry.get("weights", ())),
            }
        )
        for entry in entries
    ]
    for each in found:
        _check(each)
    return found


def _check(found: Table) -> None:
    if not found.gemm and found.gemv_rows + 1 < found.dequantize_rows:
        raise ValueError("a table without tiles")
    for part in (found, *found.gemm):
        for name, (least, most) in _BOUNDS.items():
            value = getattr(part, name, least)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}")
            if not least <= value <= most or (name in _POWERS and value & (value - 1)):
                raise ValueError(f"{name} is {value}")


def measured_tables(file: Path) -> list[Table]:
    """Those of a card's own file; none where there is no such file. A broken one costs a warning, never a start."""
    try:
        file = file.expanduser()
    except RuntimeError:  # nobody's home: a container without one
        return []
    try:
        if reason := why_not_private(file):
            logger.warning("%s is ignored: it %s", file, reason)
            return []
        return tables(file)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning(
            "%s holds no tables of tiles (%s): ignored; run `nibble tune` again, or remove it",
            file,
            error,
        )
        return []


def as_json(entries: list[Table]) -> str:
    """What `tables` reads."""
    return json.dumps([asdict(entry) for entry in entries], indent=1) + "\n"


def split_k(programs: int, k_tiles: int, num_sms: int, wanted: int = 2) -> int:
    """Splits of K so that about `wanted` programs run on each multiprocessor, with four tiles of K for each or more."""
    return max(1, min(wanted * num_sms // programs, k_tiles // 4, 16))
