"""The GGUF container: metadata and tensor table, every count and offset checked against the file before it is used.

    magic 'GGUF' | version u32 | tensor count u64 | pair count u64
    pairs:   key string | type u32 | value           strings: length u64, UTF-8 bytes
    tensors: name string | n_dims u32 | dims u64[n_dims], fastest first | type u32 | offset u64
    padding to general.alignment (32), then the tensor data; offsets count from there

Invariant: once a GgufFile is open, `rows` of any tensor reads inside the file. Our own reader because gguf-py's takes
20 s for a vocabulary of 262144 and trusts the counts it reads. No torch: the HTTP server's process reads tokenizers
here. Source: ggml/docs/gguf.md and `enum ggml_type` of ggml.h.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ....architectures import limits
from ....errors import CheckpointError, UnsupportedError
from ...locate import MAGIC, SPLIT_NAME

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
BLOCK = {  # type -> (weights, bytes) per block
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "MXFP4": (32, 17),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0",
    35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_AGAIN = "the file is truncated or damaged; download it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    shape: tuple[int, ...]  # row major: the last dimension is contiguous
    kind: str  # a key of BLOCK
    start: int  # byte offset in the file
    nbytes: int
    data: mmap.mmap  # of the file that holds it: a split model has several


class GgufFile:
    """An open GGUF file: `metadata` and `tensors` by their GGUF names.

    Raises CheckpointError if the file is damaged, UnsupportedError for a version or tensor type Nibble does not read.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file() or path.stat().st_size < 24:
            raise CheckpointError("is no GGUF file: too short", file=path, fix=_AGAIN)
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._data, path)
        if cursor.take(4) != MAGIC:
            pointer = self._data[:7] == b"version"
            raise CheckpointError(
                "is a Git LFS pointer, not the file" if pointer else "does not begin with 'GGUF'",
                file=path,
                fix="run `git lfs pull`" if pointer else "give a GGUF file, or download it again",
            )
        version, n_tensors, n_pairs = (
            cursor.number("<u4"),
            cursor.number("<u8"),
            cursor.number("<u8"),
        )
        if version not in (2, 3):
            raise UnsupportedError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
        self._check_count(n_pairs, limits.MAX_METADATA, "metadata entries")
        self._check_count(n_tensors, limits.MAX_TENSORS, "tensors")
        cursor.expect(n_pairs, 13, "metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("<u4"))
        cursor.expect(n_tensors, 24, "tensors")
        self.tensors = self._tensor_table(cursor, n_tensors)
        if self.metadata.get("split.no", 0) == 0:
            self._add_other_parts()

    def _check_count(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            raise CheckpointError(
                f"claims {count} {what}, more than the {limit} that are read",
                file=self.path,
                fix=_AGAIN,
            )

    def _add_other_parts(self) -> None:
        """Take in the tensors of NAME-00002-of-0000n.gguf and so on; the metadata are the first part's."""
        count = self.metadata.get("split.count", 1)
        if count in (0, 1):
            return
        if not isinstance(count, int) or not 0 < count <= limits.MAX_SHARDS:
            raise CheckpointError(f"split.count is {str(count)[:40]!r}", file=self.path, fix=_AGAIN)
        match = SPLIT_NAME.fullmatch(self.path.name)
        if match is None or int(match[2]) != 1 or int(match[3]) != count:
            raise CheckpointError(
                f"is the first of {count} parts, but is not named so",
                file=self.path,
                fix=f"name the parts NAME-00001-of-{count:05d}.gguf and so on",
            )
        for number in range(2, count + 1):
            part = self.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
            if not part.is_file():
                raise CheckpointError(
                    f"part {number} of {count} is missing", file=part, fix="download it"
                )
            other = GgufFile(part)
            if other.metadata.get("split.no") != number - 1:
                raise CheckpointError(
                    f"is not part {number} of {count}",
                    file=part,
                    fix="the parts must be those of one model, under the names they were published with",
                )
            if twice := other.tensors.keys() & self.tensors.keys():
                raise CheckpointError(
                    "is in two parts",
                    file=part,
                    tensor=min(twice),
                    fix="the parts must be those of one model",
                )
            self.tensors |= other.tensors

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number from the metadata. CheckpointError if it is something else, or missing without default."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**40:
            raise CheckpointError(
                f"metadata {key} is {str(value)[:40]!r}, want a positive number",
                file=self.path,
                fix="convert the model to GGUF again",
            )
        return value

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Bytes of rows first..last of a tensor as uint8 [rows, row_bytes]; a read-only view of the file."""
        tensor = self.tensors[name]
        n_rows = prod(tensor.shape[:-1])
        flat = np.frombuffer(tensor.data, np.uint8, tensor.nbytes, tensor.start)
        return flat.reshape(n_rows, -1)[first:last]

    def release(self) -> None:
        """Give back the memory of pages that were read; they are read again where they are needed."""
        for data in {id(t.data): t.data for t in self.tensors.values()}.values():
            data.madvise(mmap.MADV_DONTNEED)

    def _tensor_table(self, cursor: "_Cursor", count: int) -> dict[str, GgufTensor]:
        raw = [self._tensor_entry(cursor) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"general.alignment is {alignment!r}, not a power of two", file=self.path
            )
        begin = -(-cursor.pos // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in raw:
            weights, size = BLOCK[kind]
            nbytes = prod(shape) // weights * size
            if name in tensors:
                raise CheckpointError("appears twice", file=self.path, tensor=name)
            if offset % alignment or begin + offset + nbytes > len(self._data):
                raise CheckpointError(
                    f"its {nbytes} bytes at offset {begin + offset} do not lie in the file of "
                    f"{len(self._data)} bytes",
                    file=self.path,
                    tensor=name,
                    fix=_AGAIN,
                )
            tensors[name] = GgufTensor(shape, kind, begin + offset, nbytes, self._data)
        return tensors

    def _tensor_entry(self, cursor: "_Cursor") -> tuple[str, tuple[int, ...], str, int]:
        name = cursor.string()
        n_dims = cursor.number("<u4")
        if not 1 <= n_dims <= 4:
            raise CheckpointError(
                f"has {n_dims} dimensions", file=self.path, tensor=name, fix=_AGAIN
            )
        shape = tuple(cursor.number("<u8") for _ in range(n_dims))[::-1]
        kind_id, offset = cursor.number("<u4"), cursor.number("<u8")
        kind = _TENSOR_TYPES.get(kind_id, f"number {kind_id}")
        if kind not in BLOCK:
            raise UnsupportedError(
                f"{self.path}, tensor {name!r}: type {kind} is not supported "
                f"(supported: {', '.join(BLOCK)})"
            )
        if 0 in shape or shape[-1] % BLOCK[kind][0]:
            raise CheckpointError(
                f"type {kind} with shape {list(shape)} is impossible",
                file=self.path,
                tensor=name,
                fix=_AGAIN,
            )
        return name, shape, kind, offset


class _Cursor:
    """Reads forward through a buffer; a read past its end is a CheckpointError."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.pos = data, path, 0

    def expect(self, count: int, size: int, what: str) -> None:
        if self.pos + count * size > len(self.data):
            raise CheckpointError(
                f"claims {count} {what} but is only {len(self.data)} bytes long",
                file=self.path,
                fix=_AGAIN,
            )

    def take(self, n: int) -> bytes:
        self.expect(n, 1, "more bytes")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        (n,) = struct.unpack("<Q", self.take(8))
        raw = self.take(n)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"holds a string at byte {self.pos - n} that is not UTF-8",
                file=self.path,
                fix=_AGAIN,
            ) from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise CheckpointError(
                f"holds a value of unknown type {kind} at byte {self.pos}",
                file=self.path,
                fix=_AGAIN,
            )
        item, count = self.number("<u4"), self.number("<u8")
        if count > limits.MAX_ITEMS:
            raise CheckpointError(
                f"holds a list of {count}, more than the {limits.MAX_ITEMS} that are read",
                file=self.path,
                fix=_AGAIN,
            )
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            self.expect(count, dtype.itemsize, "array items")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        self.expect(count, 8, "array items")
        return [self.value(item, depth + 1) for _ in range(count)]
