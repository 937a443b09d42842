"""Calls of the C++ kernels as one piece of memory, which another machine's build of them can run too.

Structures and arrays lie in the image as they are; a pointer is an offset into it until it is relocated. The layout is
written down in neon_driver.cpp, which reads it.
"""

import ctypes
import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.kernels.cpu import library as lib
from nibble.kernels.cpu.library import NbBatch, NbModel, Pool
from nibble.kernels.cpu.prepared import PreparedGroup

LINEAR, FORWARD, LOGITS = range(3)
_STRUCTURES = (
    lib.NbLinear,
    lib.NbInput,
    lib.NbLinearGroup,
    lib.NbRope,
    lib.NbAttention,
    lib.NbDeltaNet,
    lib.NbShortConv,
    lib.NbGatedMlp,
    lib.NbExperts,
    lib.NbPerLayerInput,
    lib.NbPerLayerInputs,
    lib.NbLayer,
    lib.NbModel,
    lib.NbBatch,
)
_HEADER = 8 * (len(_STRUCTURES) + 4)
_ALIGNMENT = 64


@dataclass(frozen=True)
class Result:
    """Where a call leaves what it computes; group: which calls are judged alike."""

    group: str
    name: str
    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    leading: int | None = None  # only so many of the last dimension count

    def read(self, image: Tensor) -> Tensor:
        nbytes = self.dtype.itemsize * torch.Size(self.shape).numel()
        return (
            image[self.at : self.at + nbytes].view(self.dtype).view(self.shape)[..., : self.leading]
        )


class Image:
    def __init__(self) -> None:
        self.results: list[Result] = []
        self._data = bytearray(_HEADER)
        self._calls: list[tuple[int, ...]] = []
        self._relocations: list[tuple[int, int]] = []
        self._places: dict[int, int] = {}  # address here -> offset
        self._kept: list[object] = []  # lest an address is used twice

    def linear(self, group: str, name: str, linears: PreparedGroup, x: Tensor) -> None:
        """x float32 [rows, k]"""
        self.arrays(linears)
        self._call(
            LINEAR,
            self.structure(linears.struct()),
            self.add(x),
            len(x),
            Result(group, name, 0, (len(x), sum(w.n for w in linears.linears))),
        )

    def forward(self, group: str, name: str, model: int, batch: NbBatch, hidden: int) -> None:
        """model: the offset of an NbModel; the batch's arrays have been added."""
        self._call(
            FORWARD,
            model,
            self.structure(batch),
            0,
            Result(group, name, 0, (batch.num_tokens, hidden)),
        )

    def logits(self, group: str, name: str, model: int, hidden: Tensor, vocab: int) -> None:
        self._call(
            LOGITS,
            model,
            self.add(hidden),
            len(hidden),
            Result(group, name, 0, (len(hidden), vocab)),
        )

    def watch(self, group: str, name: str, tensor: Tensor, leading: int | None = None) -> None:
        """What the calls leave in a tensor that has been added is a result too."""
        at = self._places[tensor.data_ptr()]
        self.results.append(Result(group, name, at, tuple(tensor.shape), tensor.dtype, leading))

    def add(self, thing: object) -> int:
        """Every tensor in it; the offset of the last one."""
        at = 0
        for tensor in _tensors(thing):
            address = tensor.data_ptr()
            if address not in self._places:
                self._kept.append(tensor)
                self._places[address] = self._put(
                    tensor.view(-1).view(torch.uint8).numpy().tobytes()
                )
            at = self._places[address]
        return at

    def arrays(self, linears: PreparedGroup) -> None:
        """What the structure of a group of linears points to."""
        self.add(linears)
        for array in linears.arrays:
            self.structure(array)

    def structure(self, value: ctypes.Structure | ctypes.Array) -> int:
        """Its offset. What it points to has been added."""
        self._kept.append(value)
        raw = bytes(value)
        at = self._places[ctypes.addressof(value)] = self._put(raw)
        for offset in _pointers(type(value)):
            if address := int.from_bytes(raw[offset : offset + 8], "little"):
                self._relocations.append((at + offset, self._places[address]))
        return at

    def finish(self) -> bytes:
        calls = self._put(b"".join(struct.pack("<5q", *call) for call in self._calls))
        relocations = self._put(b"".join(struct.pack("<2q", *pair) for pair in self._relocations))
        self._put(b"")  # a whole number of lines
        self._data[:_HEADER] = struct.pack(
            f"<{_HEADER // 8}q",
            *map(ctypes.sizeof, _STRUCTURES),
            relocations,
            len(self._relocations),
            calls,
            len(self._calls),
        )
        return bytes(self._data)

    def run(self, image: bytes, pool: Pool) -> Tensor:
        """The finished image with its results, computed by this machine's library."""
        memory = torch.frombuffer(bytearray(image), dtype=torch.uint8).clone()
        base, words = memory.data_ptr(), memory.view(torch.int64)
        for at, to in self._relocations:
            words[at // 8] = base + to
        for kind, thing, given, rows, output in self._calls:
            thing, given, output = base + thing, base + given, base + output
            if kind == LINEAR:
                pool.library.nb_linear(
                    pool.handle, lib.NbLinearGroup.from_address(thing), given, rows, output
                )
            elif kind == FORWARD:
                pool.library.nb_forward(
                    pool.handle, NbModel.from_address(thing), NbBatch.from_address(given), output
                )
            else:
                pool.library.nb_logits(
                    pool.handle, NbModel.from_address(thing), given, rows, output
                )
        return memory

    def _call(self, kind: int, thing: int, given: int, rows: int, result: Result) -> None:
        at = self._put(bytes(4 * torch.Size(result.shape).numel()))
        self._calls.append((kind, thing, given, rows, at))
        self.results.append(dataclasses.replace(result, at=at))

    def _put(self, raw: bytes) -> int:
        self._data += bytes(-len(self._data) % _ALIGNMENT)
        at = len(self._data)
        self._data += raw
        return at


def _tensors(thing: object) -> Iterator[Tensor]:
    """All that can be reached from it."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from _tensors(getattr(thing, field.name))


def _pointers(kind: type, base: int = 0) -> Iterator[int]:
    """The offsets of all pointers in a ctypes type."""
    if issubclass(kind, ctypes.Structure):
        for name, inner in kind._fields_:
            yield from _pointers(inner, base + getattr(kind, name).offset)
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers(kind._type_, base + i * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.c_void_p | ctypes._Pointer):
        yield base
