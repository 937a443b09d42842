"""Memory for prepared weights: large chunks that ask for huge pages. A step reads every weight once, and with pages of
4 KiB looking up where they are costs as much as reading them, most of all in a virtual machine.
"""

import mmap

import torch
from torch import Tensor

_CHUNK = 64 << 20  # bytes; a multiple of a huge page
_ALIGNMENT = 64


class Arena:
    """Hands out pieces of chunks. A chunk lives as long as a tensor that lies in it."""

    def __init__(self) -> None:
        self._chunk, self._used = _new_chunk(_CHUNK), 0

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values in this memory, aligned to 64 bytes."""
        nbytes = tensor.nbytes
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes > len(self._chunk):
            self._chunk, start = _new_chunk(nbytes), 0
        self._used = start + nbytes
        copy = torch.frombuffer(self._chunk, dtype=tensor.dtype, offset=start, count=tensor.numel())
        return copy.view(tensor.shape).copy_(tensor)


def _new_chunk(nbytes: int) -> mmap.mmap:
    chunk = mmap.mmap(
        -1, -(-nbytes // _CHUNK) * _CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk
