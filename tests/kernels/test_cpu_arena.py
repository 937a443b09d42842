"""Memory for prepared weights."""

import torch

from nibble.kernels.cpu.arena import _CHUNK, Arena


def test_copies_are_equal_aligned_and_apart():
    arena = Arena()
    tensors = [
        torch.randint(0, 100, (n, 3), dtype=kind)
        for n, kind in (
            (5, torch.uint8),
            (7, torch.float16),
            (1, torch.float32),
            (1000, torch.int16),
        )
    ]
    copies = [arena.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert (
            torch.equal(tensor, copy) and copy.shape == tensor.shape and copy.dtype == tensor.dtype
        )
        assert copy.data_ptr() % 64 == 0
    copies[0].zero_()
    assert torch.equal(copies[1], tensors[1])


def test_what_is_larger_than_a_chunk_gets_its_own():
    arena = Arena()
    large = torch.arange(_CHUNK // 4 + 5, dtype=torch.int32)
    assert torch.equal(arena.copy(large), large)
    small = torch.arange(3)
    assert torch.equal(arena.copy(small), small)


def test_a_view_is_copied_as_it_looks():
    matrix = torch.arange(12).view(3, 4)
    assert torch.equal(Arena().copy(matrix.t()), matrix.t())
