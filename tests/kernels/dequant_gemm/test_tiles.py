"""Planning of measurements, and tables: what follows from given times, and what a start makes of the files."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from nibble.kernels.dequant_gemm import candidates, tiles
from nibble.kernels.dequant_gemm.candidates import DEQUANTIZE, Candidate, Measurement, Trial
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.kernels.measure.timing import CALLS, repeats, rotations

SHAPES = ((4096, 4096), (28672, 4096))


def table(
    name: str, cc: int, weights: str = "int4", shipped: Path = Path("no tables here")
) -> Table:
    return tiles.table(name, cc, weights, shipped)


@pytest.mark.parametrize("nbytes", [1, 8_700_000, 50 << 20, 200 << 20])
def test_rotated_operands_pass_twice_the_cache(nbytes: int) -> None:
    l2 = 50 << 20
    copies = rotations(nbytes, l2)
    assert copies * nbytes > 2 * l2 and (copies - 1) * nbytes <= 2 * l2


def test_a_graph_holds_enough_calls_of_each_copy() -> None:
    for calls in (1, 5, 64, 100):
        assert repeats(calls, 2.0) * calls >= CALLS and (repeats(calls, 2.0) - 1) * calls < CALLS
    assert repeats(1, 1000.0) == 4 and repeats(3, 10_000.0) == 1 and repeats(1, 0.0) == CALLS


@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100, 120])
def test_candidates_fit_the_kernel(cc: int) -> None:
    for rows in candidates.ANCHORS:
        found = candidates.gemm_candidates(rows, cc)
        assert 0 < len(found) == len(set(found)) <= 16
        for candidate in found:
            tile = candidate.tile
            assert tile.block_m >= min(rows, 64) and tile.block_n in (64, 128)
            assert tile.block_m * tile.block_n / (32 * tile.warps) <= 64, (
                "the accumulator alone fills the registers"
            )


def test_a_card_without_tensor_cores_gets_no_gemm() -> None:
    done = _measured(75, lambda trial: 1.0 if trial.candidate.path == "gemv" else 2.0)
    built = candidates.build_table(done, SHAPES, 75, ("int4",), "")
    assert (built.gemv_rows, built.dequantize_rows, built.gemm) == (8, 9, ())


def _measured(cc: int, time, reason=lambda trial: "") -> list[Measurement]:
    """All three rounds with invented times."""
    done: list[Measurement] = []
    for plan in (candidates.first_round, candidates.second_round, candidates.third_round):
        for trial in plan(done, SHAPES, cc):
            why = reason(trial)
            done.append(Measurement(trial, math.inf if why else time(trial), why))
    return done


def _invented(trial: Trial) -> float:
    """GEMV wins up to 2 rows, swapped tiles with 4 stages and 4 splits up to 128 rows, dequantization beyond."""
    tile, rows = trial.candidate.tile, trial.rows
    if tile is None:
        return 100.0 + rows / 100
    if trial.candidate.path == "gemv":
        return (4.0 + (tile.warps == 8)) * rows
    preferred = (
        tile.swap
        and tile.stages in (3, 4)
        and tile.splits_per_sm == 4
        and tile.block_n == 64
        and tile.warps == 4
    )
    return (9.0 if preferred else 10.0 if tile.swap else 12.0) * max(
        1, rows / 16
    ) - tile.stages / 10


def test_the_table_follows_from_the_times() -> None:
    built = candidates.build_table(_measured(90, _invented), SHAPES, 90, ("int3", "int4"), "today")
    assert (built.gemv_rows, built.gemv_warps, built.dequantize_rows) == (2, 4, 256)
    first = built.tile(3)
    assert (first.rows, first.block_m, first.stages, first.splits_per_sm, first.swap) == (
        16,
        16,
        4,
        4,
        True,
    )
    assert [tile.rows for tile in built.gemm] == sorted({tile.rows for tile in built.gemm})
    assert (
        built.tile(128).splits_per_sm == 4
        and built.weights == ("int3", "int4")
        and built.origin == "today"
    )


def test_what_fails_once_never_wins() -> None:
    def spills(trial: Trial) -> str:
        tile = trial.candidate.tile
        wide = trial.shape == SHAPES[1]
        return (
            "spills 2 registers"
            if wide and tile and trial.candidate.path == "gemm" and tile.stages == 4
            else ""
        )

    built = candidates.build_table(_measured(90, _invented, spills), SHAPES, 90, ("int4",), "")
    assert {tile.stages for tile in built.gemm} <= {2, 3}


def test_the_mean_is_geometric_and_needs_every_shape() -> None:
    fast, slow = (Candidate("gemm", Tile(0, 16, 64, 4, stages)) for stages in (3, 4))
    done = [
        Measurement(Trial(SHAPES[0], 16, fast), 1.0),
        Measurement(Trial(SHAPES[1], 16, fast), 4.0),
        Measurement(Trial(SHAPES[0], 16, slow), 0.5),
    ]
    assert candidates.means_at(done, SHAPES, 16) == {fast: pytest.approx(2.0)}
    assert candidates.means_at(done, SHAPES, 32) == {}
    assert DEQUANTIZE.describe() == "dequantize" and fast.describe() == "gemm 16x64 w4 s3 k2"


TABLE = Table(
    90,
    1,
    64,
    4,
    256,
    (Tile(16, 16, 64, 4, 4, True, splits_per_sm=4), Tile(256, 64, 128, 8, 3, True)),
    8,
    ("int4",),
    "measured",
)


def test_narrow_groups_have_tiles_of_their_own() -> None:
    both = candidates.with_narrow(
        TABLE, Table(90, 0, 64, 4, 256, (Tile(64, 16, 64, 4, 3, True),)), 32
    )
    assert both.tile(5, 16).stages == both.tile(5, 32).stages == 3
    assert both.tile(5, 128) == both.tile(5, 0) == TABLE.tile(5)
    assert both.tile(200, 32) == TABLE.tile(200)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of "A Card" in a user's folder that is used instead of the real one."""
    monkeypatch.setattr(tiles, "MEASURED", tmp_path)
    tiles.table.cache_clear()
    yield tmp_path / "A_Card.json"
    tiles.table.cache_clear()


def test_a_measured_table_is_found_by_the_next_start(measured: Path) -> None:
    fp8 = Table(90, 0, 64, 4, 64, TABLE.gemm, weights=("fp8",))
    assert measured.name == tiles.file_name("A Card")
    measured.write_text(tiles.as_json([TABLE, fp8]))
    assert tiles.tables(measured) == [TABLE, fp8]
    assert table("A Card", 90) == TABLE and table("A Card", 90, "fp8") == fp8
    assert not table("A Card", 90, "int8").origin, "what was not measured has the heuristic's"
    assert table("Another Card", 90).min_cc == 90


_BROKEN_TABLES = [
    {"gemm": []},
    {"gemv_warps": 3},
    {"gemv_warps": "4"},
    {"dequantize_rows": -1},
    {"gemm": [{"rows": 16, "block_m": 16, "block_n": 48, "warps": 4, "stages": 4}]},
    {"gemm": [{"rows": 16, "block_m": 1 << 20, "block_n": 64, "warps": 4, "stages": 4}]},
    {
        "gemm": [
            {"rows": 16, "block_m": 16, "block_n": 64, "warps": 4, "stages": 4, "max_group": None}
        ]
    },
    {"gemm": ["tile"]},
]


@pytest.mark.parametrize(
    "content",
    ["", "{}", '[{"min_cc": 90}]', '[{"gemm": []}]', "[3]"]
    + [json.dumps([asdict(TABLE) | change]) for change in _BROKEN_TABLES],
)
def test_a_broken_table_is_ignored_with_a_warning(
    measured: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    measured.write_text(content)
    assert table("A Card", 90).gemm
    assert "run `nibble tune` again" in caplog.text


def test_a_table_that_others_could_have_written_is_ignored(measured: Path, caplog) -> None:
    measured.write_text(tiles.as_json([TABLE]))
    measured.chmod(0o666)
    assert not table("A Card", 90).origin
    assert "can be written by others" in caplog.text


def test_without_a_home_there_is_the_heuristic(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert table("A Card", 90).min_cc == 90


def test_tuning_one_kind_keeps_the_others() -> None:
    fp8, newer = (
        Table(90, 0, 64, 4, 64, (), weights=("fp8",)),
        Table(90, 2, 64, 4, 64, (), weights=("int4",)),
    )
    assert candidates.merge([TABLE, fp8], [newer]) == [fp8, newer]


@pytest.mark.parametrize(
    ("kind", "bits", "name"), [("int", 4, "int4"), ("int", 8, "int8"), ("fp8", 8, "fp8")]
)
def test_names_of_weights(kind: str, bits: int, name: str) -> None:
    assert tiles.weights_name(kind, bits) == name


@pytest.mark.parametrize(
    ("cc", "group", "stages"), [(86, 32, 3), (89, 16, 3), (89, 128, 4), (90, 32, 4)]
)
def test_narrow_groups_spill_nothing_on_small_cards(cc: int, group: int, stages: int) -> None:
    assert table("a card without its own table", cc).tile(4, group).stages == stages
