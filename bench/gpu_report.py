"""What `make bench-gpu` makes of its rows: ratios to peers of the same run, shares of the copy bandwidth, goals met.

The goals are G1 to G7 and G9 of the project's targets: `goals` states each. Pure: no GPU.
"""

from collections.abc import Iterable
from typing import Any

from rich.table import Table

DENSE, INT4PACK, SCALED_MM = "torch bf16", "torch _weight_int4pack_mm", "torch _scaled_mm"
GEMLITE = "gemlite int4 g128"
SDPA, FLEX, FLASHINFER, PLAIN = "torch SDPA", "torch flex_attention", "FlashInfer", "torch"
Row = dict[str, Any]
# By section: kinds that others are compared with, and what a row and its peer have in common.
PEERS = {
    "products": ((DENSE, INT4PACK, SCALED_MM, GEMLITE), ("model", "layer", "m")),
    "attention": ((SDPA, FLEX, FLASHINFER), ("phase", "batch", "context")),
    "glue": ((PLAIN,), ("operation", "m")),
}


def with_ratios(rows: list[Row], bandwidth: float) -> list[Row]:
    """Each row with `share` of the copy bandwidth and `ratios`: how many times as fast as each peer it is."""
    peers: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.get("us") and row["kind"] in PEERS[row["section"]][0]:
            peers.setdefault(_place(row), {})[row["kind"]] = row["us"]
    found = []
    for row in rows:
        more: Row = {}
        if row.get("us"):
            more["share"] = round(row["bytes"] / (row["us"] * 1e-6) / bandwidth, 3)
            more["ratios"] = {
                peer: round(us / row["us"], 3)
                for peer, us in peers.get(_place(row), {}).items()
                if peer != row["kind"]
            }
        found.append(row | more)
    return found


def _place(row: Row) -> tuple:
    return row["section"], *(row.get(key) for key in PEERS[row["section"]][1])


def tables(rows: list[Row]) -> list[Table]:
    """One table for each section that has rows: microseconds, share of bandwidth, times as fast as each peer."""
    found = []
    for section in PEERS:
        mine = [
            row for row in rows if row["section"] == section and ("us" in row or "reason" in row)
        ]
        peers = [
            peer for peer in PEERS[section][0] if any(peer in row.get("ratios", {}) for row in mine)
        ]
        if mine:
            shown = Table(
                "what",
                "kind",
                "us",
                "of bandwidth",
                *(f"x {peer}" for peer in peers),
                title=section,
            )
            for row in mine:
                shown.add_row(_what(row), str(row.get("kind", row["name"])), *_figures(row, peers))
            found.append(shown)
    engine = [
        row for row in rows if row["section"] == "engine" and ("value" in row or "reason" in row)
    ]
    if engine:
        shown = Table("model", "figure", "", title="engine")
        for row in engine:
            shown.add_row(
                row["name"], row.get("figure", ""), str(row.get("value", row.get("reason")))
            )
        found.append(shown)
    return found


def _what(row: Row) -> str:
    if "m" in row:
        place = f"{row['model']} {row['layer']}" if "model" in row else row["operation"]
        return f"{place}, {row['m']} rows"
    return f"{row['phase']} {row['batch']} x {row['context']}" if "phase" in row else row["name"]


def _figures(row: Row, peers: list[str]) -> list[str]:
    if "us" not in row:
        return [row["reason"]]
    ratios = row["ratios"]
    return [
        f"{row['us']:.1f}",
        f"{row['share']:.0%}",
        *(f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in peers),
    ]


def goals(rows: list[Row]) -> list[tuple[str, str, bool | None]]:
    """(goal, what was measured, met); None: nothing was measured for it."""
    products = [row for row in rows if row["section"] == "products" and row.get("us")]
    attention = [row for row in rows if row["section"] == "attention" and row.get("us")]
    engine = {(row["format"], row["figure"]): row["value"] for row in rows if "figure" in row}
    return [*_products(products), *_fp8(products), *_attention(attention), *_engine(engine)]


def _products(rows: list[Row]) -> list[tuple[str, str, bool | None]]:
    w4 = [row for row in rows if row["kind"].startswith("int4 g128")]
    large = [row for row in w4 if row["n"] * row["k"] >= 58e6 and row["m"] <= 16]
    square = [row for row in w4 if (row["n"], row["k"]) == (4096, 4096) and row["m"] <= 16]
    one = {(row["kind"], row["n"], row["k"]): row["us"] for row in w4 if row["m"] == 1}
    steep = [
        row["us"] / one[key]
        for row in w4
        if row["m"] == 16 and (key := (row["kind"], row["n"], row["k"])) in one
    ]
    return [
        _least(
            "G1 W4A16, 1 to 16 rows, 58 M weights or more: 80 % of the copy bandwidth",
            _of(large, "share"),
            0.80,
        ),
        _least("G1 W4A16, 1 to 16 rows, 4096x4096: 55 %", _of(square, "share"), 0.55),
        _most("G1 W4A16, 16 rows over 1 row: 1.15 times the time", steep, 1.15),
        _least("G3 W4A16, 32 rows: 2.2 times bf16", _faster(w4, 32, 32), 2.2),
        _least("G3 W4A16, 64 rows: 1.7 times bf16", _faster(w4, 64, 64), 1.7),
        _least("G3 W4A16, 256 rows or more: 0.95 times bf16", _faster(w4, 256, 1024), 0.95),
    ]


def _faster(rows: list[Row], least: int, most: int) -> list[float]:
    """How many times as fast as bf16, where there are so many rows of activations."""
    return [
        row["ratios"][DENSE] for row in rows if least <= row["m"] <= most and DENSE in row["ratios"]
    ]


def _fp8(rows: list[Row]) -> list[tuple[str, str, bool | None]]:
    peer = {(row["n"], row["k"], row["m"]): row["us"] for row in rows if row["kind"] == SCALED_MM}
    ours = [row for row in rows if row["kind"].startswith("fp8")]
    best = {
        place: min(row["us"] for row in ours if _size(row) == place)
        for place in {_size(row) for row in ours}
    }
    bf16 = {_size(row): row["us"] for row in rows if row["kind"] == DENSE}
    few = [bf16[place] / us for place, us in best.items() if place in bf16 and place[2] <= 64]
    many = [peer[place] / us for place, us in best.items() if place in peer and place[2] >= 1024]
    return [
        _least("G5 FP8, up to 64 rows: 1.7 times bf16", few, 1.7),
        _least("G5 FP8, 1024 rows: 0.85 times torch _scaled_mm", many, 0.85),
    ]


def _size(row: Row) -> tuple[int, int, int]:
    return row["n"], row["k"], row["m"]


def _attention(rows: list[Row]) -> list[tuple[str, str, bool | None]]:
    ours = [
        row for row in rows if row["phase"] == "decode" and row["kind"] in ("bf16", "fp8", "int8")
    ]
    full = [row for row in ours if row["context"] >= 4096 and row["batch"] * 8 >= 128]
    alone = [row for row in ours if row["context"] == 32768 and row["batch"] == 1]
    return [
        _least(
            "G4 decode attention, 4k and more, 16 sequences and more: 85 %",
            _of(full, "share"),
            0.85,
        ),
        _least("G4 decode attention, one sequence of 32k: 70 %", _of(alone, "share"), 0.70),
    ]


def _engine(figures: dict[tuple[str, str], float]) -> list[tuple[str, str, bool | None]]:
    def of(fmt: str, figure: str) -> list[float]:
        return [figures[fmt, figure]] if (fmt, figure) in figures else []

    rates = [
        ("G2", "awq", 1, 500),
        ("G6", "fp8", 1, 300),
        ("G6", "fp8", 32, 5200),
        ("G6", "fp8", 256, 15000),
    ]
    firsts = [(128, 15), (2048, 50), (8192, 210)]
    return [
        *(
            _least(
                f"{goal} Llama-3-8B {fmt}, {batch} at once: {want} tokens per second (on an H200)",
                of(fmt, f"tokens per second at {batch}"),
                want,
            )
            for goal, fmt, batch, want in rates
        ),
        *(
            _most(
                f"G7 Llama-3-8B fp8, prompt of {length}: {want} ms to the first token",
                of("fp8", f"time to first token at {length}, ms"),
                want,
            )
            for length, want in firsts
        ),
        _most(
            "G9 Llama-3-8B awq, files in the cache: 5 s from process start to first token and end",
            of("awq", "process start to first token and end, s"),
            5,
        ),
    ]


def _of(rows: Iterable[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def _least(goal: str, values: list[float], want: float) -> tuple[str, str, bool | None]:
    return (
        (goal, f"{min(values):.4g} to {max(values):.4g}", min(values) >= want)
        if values
        else (goal, "", None)
    )


def _most(goal: str, values: list[float], want: float) -> tuple[str, str, bool | None]:
    return (
        (goal, f"{min(values):.4g} to {max(values):.4g}", max(values) <= want)
        if values
        else (goal, "", None)
    )


def goals_table(rows: list[Row]) -> Table:
    """Every goal, met, not met or not measured."""
    shown = Table("goal", "measured", "", title="goals")
    for goal, measured, met in goals(rows):
        shown.add_row(
            goal, measured, "not measured" if met is None else "met" if met else "not met"
        )
    return shown
