"""A GGUF file as a checkpoint: its tensors under their Hugging Face names, rows in Hugging Face order."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedError
from ..formats.base import BadTensor, check_finite
from ..formats.gguf import blocks as gguf
from ..formats.gguf import model as gguf_model
from ..formats.gguf.container import GgufFile
from ..scheme import LayerScheme, QuantScheme
from ..weight import QuantizedWeight, in_column_order
from .base import Checkpoint

_CHUNK = 1 << 24  # weights dequantized at a time


class GgufCheckpoint(Checkpoint):
    """A GGUF file of one of the families in architectures/registry.py GGUF."""

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(path)
        self._places = gguf_model.tensor_names(self.file)
        self.config = gguf_model.synthesize_config(self.file)
        self.scheme = self._describe_blocks()

    def names(self) -> set[str]:
        return set(self._places)

    def has(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return gguf_model.hf_shape(self.file, self._place(name))

    def dtype(self, name: str) -> torch.dtype:
        return gguf.DENSE.get(self._kind(name), torch.float32)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            vector = self._vector(name)
            return vector.to(dtype or vector.dtype)
        out = torch.empty(shape, dtype=dtype or self.dtype(name))
        step = max(1, _CHUNK // shape[-1])
        for first in range(0, shape[0], step):
            part = out[first : first + step]
            part.copy_(self._dense_rows(name, first, first + step).view(part.shape))
        return out

    def _vector(self, name: str) -> Tensor:
        place = self._place(name)
        vector: Tensor = gguf_model.hf_values(place, self._dense_rows(name, 0, 1).flatten())
        order = gguf_model.hf_row_order(self.file, place.name)
        if order is not None:  # what belongs to rows has their order
            vector = vector[torch.from_numpy(order)]
        offset = gguf_model.norm_offset(self.file, place.name)
        return (vector.float() - offset).to(vector.dtype) if offset else vector

    def _linear(self, module: str) -> QuantizedWeight | Tensor:
        name = f"{module}.weight"
        return self._blocks(name, 0, None) if self.is_quantized(module) else self.tensor(name)

    def dense(self, module: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor(
            f"{module}.weight", dtype
        )  # a few rows at a time, which a large vocabulary needs

    def is_quantized(self, module: str) -> bool:
        return self._kind(f"{module}.weight") not in gguf.DENSE

    def modules(self) -> set[str]:
        return {name.removesuffix(".weight") for name in self._places if name.endswith(".weight")}

    def weight_names(self, module: str) -> list[str]:
        return [f"{module}.weight"] if self.has(f"{module}.weight") else []

    def release(self) -> None:
        self.file.release()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.file.tensors.values())

    def _kind(self, name: str) -> str:
        return self.file.tensors[self._place(name).name].kind

    def _place(self, name: str) -> gguf_model.Place:
        if name not in self._places:
            raise CheckpointError(
                "is missing",
                file=self.path,
                tensor=name,
                fix="the file is not whole, or not of the architecture that it names",
            )
        return self._places[name]

    def _rows(self, name: str, first: int, last: int | None) -> Any:
        """Bytes of some rows, as far as there are: of a vector, the one that it is."""
        place = self._place(name)
        begin, end = gguf_model.hf_rows(self.file, place)
        last = end - begin if last is None else min(last, end - begin)
        order = None
        if len(self.shape(name)) > 1:
            order = gguf_model.hf_row_order(self.file, place.name)
        if order is None:
            return self.file.rows(place.name, begin + first, begin + last)
        return self.file.rows(place.name)[order[first:last]]

    def _blocks(self, name: str, first: int, last: int | None) -> QuantizedWeight:
        weight = gguf.read_blocks(self._rows(name, first, last), self._kind(name))
        self._check_finite(name, weight.scales, weight.mins)
        order = gguf_model.hf_column_order(self.file, self._place(name).name)
        if order is None:
            return weight
        try:
            return in_column_order(weight, torch.from_numpy(order))
        except ValueError as error:
            where = f"{self.path}, tensor {self._place(name).name!r}"
            raise UnsupportedError(f"{where}: {error}") from None

    def _dense_rows(self, name: str, first: int, last: int) -> Tensor:
        kind = self._kind(name)
        if kind not in gguf.DENSE:
            return self._blocks(name, first, last).dequantize()
        rows = gguf.read_dense(self._rows(name, first, last), kind)
        self._check_finite(name, rows)
        order = gguf_model.hf_column_order(self.file, self._place(name).name)
        return rows if order is None else rows[:, torch.from_numpy(order)]

    def _check_finite(self, name: str, *tensors: Tensor | None) -> None:
        try:
            for tensor in tensors:
                if tensor is not None:
                    check_finite(name, tensor)
        except BadTensor as error:
            raise CheckpointError(
                error.problem,
                file=self.path,
                tensor=self._places[name].name,
                fix="download it again",
            ) from None

    def _describe_blocks(self) -> QuantScheme | None:
        """The commonest block type of the matrices, for reports; each module's own type is read from the file."""
        kinds = Counter(
            t.kind
            for n, t in self.file.tensors.items()
            if n.startswith("blk.") and len(t.shape) > 1
        )
        kind = kinds.most_common(1)[0][0] if kinds else "F32"
        if kind in gguf.DENSE:
            return None
        symmetric, bits = kind in gguf.SYMMETRIC, gguf.BITS[kind]
        is_table = kind in gguf.TABLES
        layer = LayerScheme("fp4" if is_table else "int", bits, gguf.GROUP[kind], symmetric)
        return QuantScheme(method="gguf", format=kind, default=layer)
