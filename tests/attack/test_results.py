"""The table that the attacks leave: each has a row, what failed is shown as that, and the page around it stays."""

import pytest

from .results import BEGIN, END, Result, table, write

ROWS = {
    "slow": [Result("a | b", "5 of 5\nopen", "closed", False)],
    "cache": [Result("a pipe", "the same answer", "the same", True)],
}


def test_every_attack_has_a_row() -> None:
    lines = table(ROWS, "a machine").splitlines()
    assert lines[0] == "a machine: 1 of 2 hold."
    assert lines[4:] == [
        "| slow | a \\| b | 5 of 5 open | closed | **fails** |",
        "| cache | a pipe | the same answer | the same | holds |",
    ]


def test_the_page_around_it_stays(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, "new")
    write(page, "newer")
    assert page.read_text() == f"before\n\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"


def test_a_page_without_a_place_for_it_is_left_alone(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine")
    with pytest.raises(ValueError, match="no table"):
        write(page, "new")
    assert page.read_text() == "mine"
