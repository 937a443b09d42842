"""GPTQ's g_idx: groups of one size in any order, the last one perhaps smaller; everything else is named."""

import pytest
import torch

from nibble.quant.formats.base import BadTensor, columns_per_group, order_of_groups


def indices(*groups: int) -> torch.Tensor:
    return torch.tensor(groups, dtype=torch.int32)


@pytest.mark.parametrize(
    ("g_idx", "perm", "size"),
    [
        (indices(0, 0, 1, 1), None, 2),
        (indices(0, 0, 0, 1), None, 3),  # the last is partial
        (indices(1, 0, 1, 0), [1, 3, 0, 2], 2),
        (indices(1, 0, 0, 0), [1, 2, 3, 0], 3),
        (indices(2, 2, 0, 1, 1, 0), [2, 5, 3, 4, 0, 1], 2),
    ],
)
def test_columns_of_a_group_are_brought_together(g_idx, perm, size) -> None:
    order, found = order_of_groups(g_idx, len(g_idx), int(g_idx.max()) + 1, "g_idx")
    assert found == size
    assert (None if order is None else order.tolist()) == perm


@pytest.mark.parametrize(
    ("g_idx", "groups", "problem"),
    [
        (indices(0, 1, 1, 1, 2, 2), 3, "unequal sizes"),
        (indices(0, 0, 1, 2, 2, 2), 3, "unequal sizes"),
        (indices(0, 0, 1, 2, 2), 3, "unequal sizes"),  # only the one in the middle is wrong
        (indices(0, 0, 1, 1, 1), 2, "unequal sizes"),  # the last may be smaller, not larger
        (indices(0, 0, 0, 0), 2, "unequal sizes"),
        (indices(0, 0, 2, 2), 2, "names group 2, but there are 2"),
        (indices(0, 0, -1, 1), 2, "names group -1"),
        (indices(0, 0, 1), 2, "has shape"),
    ],
)
def test_what_cannot_be_is_named(g_idx, groups, problem) -> None:
    width = 4 if problem == "has shape" else len(g_idx)
    with pytest.raises(BadTensor, match=problem):
        order_of_groups(g_idx, width, groups, "g_idx")


@pytest.mark.parametrize(
    ("width", "groups", "configured", "size"),
    [(128, 4, 32, 32), (100, 4, 32, 32), (128, 1, -1, 128), (128, 2, 32, 64), (32, 1, 128, 32)],
)
def test_the_shape_decides_where_the_config_does_not_fit(width, groups, configured, size) -> None:
    assert columns_per_group("scales", width, groups, configured) == size


@pytest.mark.parametrize("groups", [0, 3])
def test_a_shape_that_fits_nothing_is_named(groups) -> None:
    with pytest.raises(BadTensor, match="do not divide 128"):
        columns_per_group("scales", 128, groups, 32)
