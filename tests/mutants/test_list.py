"""The list of mutants fits the code: each text occurs once where it is said to, and each test is there."""

from pathlib import Path

import pytest

from .run import ROOT, Mutant, load, survivors

MUTANTS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_can_be_made(mutant: Mutant) -> None:
    assert mutant.applied((ROOT / mutant.file).read_text())
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function}" in Path(ROOT / file).read_text(), test


def test_the_survivors_are_mutants() -> None:
    assert survivors() <= {mutant.name for mutant in MUTANTS}
