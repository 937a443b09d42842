"""Pairs sorted by expert in the interpreter, against a plain loop."""

import pytest
import torch
from kernel_cases import DEVICE, on_device  # noqa: F401  (a fixture)

from nibble.kernels.moe import align as module
from nibble.kernels.moe.align import align, max_tiles


def chosen_of(tokens: int, top_k: int, experts: list[int], seed: int = 0) -> torch.Tensor:
    """Each token goes through different ones of these."""
    generator = torch.Generator("cpu").manual_seed(seed)
    how = {"generator": generator, "device": "cpu"}
    rows = [torch.randperm(len(experts), **how)[:top_k] for _ in range(tokens)]
    return torch.tensor(experts, device="cpu")[torch.stack(rows)].int().to(DEVICE)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "num_experts", "block_m"),
    [
        (1, 3, [0, 4, 6], 7, 16),  # the last expert
        (5, 2, [1, 2, 3], 128, 16),  # most without pairs
        (40, 3, list(range(7)), 7, 16),  # some with several tiles
        (33, 1, [2], 5, 32),  # all through one
        (32, 1, [2], 5, 32),  # which fill its tile
        (70, 4, list(range(12)), 12, 64),
    ],
)
def test_every_pair_is_in_a_tile_of_its_expert(
    tokens: int,
    top_k: int,
    experts: list[int],
    num_experts: int,
    block_m: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)  # so that pairs take several
    chosen = chosen_of(tokens, top_k, experts)
    found = align(chosen, num_experts, block_m)
    want_pairs: list[int] = []
    want_experts: list[int] = []
    flat = chosen.flatten().tolist()
    for expert in range(num_experts):
        own = [pair for pair, number in enumerate(flat) if number == expert]
        own += [len(flat)] * (-len(own) % block_m)
        want_pairs += own
        want_experts += [expert] * (len(own) // block_m)
    used = len(want_experts)
    assert found.num_tiles.item() == used <= len(found.experts)
    assert found.experts[:used].tolist() == want_experts
    assert found.pairs[: used * block_m].tolist() == want_pairs


def test_there_is_room_for_the_worst_case_and_no_more() -> None:
    """One pair each for all experts but one, which has the rest."""
    for pairs, experts, block_m in ((8, 128, 16), (512, 128, 16), (33, 4, 16), (16, 1, 16)):
        having = min(pairs, experts)
        counts = [1] * (having - 1) + [pairs - having + 1]
        need = sum(-(-count // block_m) for count in counts)
        assert need <= max_tiles(pairs, experts, block_m) <= need + having
    assert max_tiles(8, 128, 16) == 8
