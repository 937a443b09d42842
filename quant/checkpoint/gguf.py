"""A GGUF file as a checkpoint: its tensors under their Hugging Face names, rows in Hugging Face order."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..formats.base import BadTensor, check_finite
from ..formats.gguf import blocks as gguf
from ..formats.gguf import model as gguf_model
from ..formats.gguf.container import GgufFile
from ..scheme import LayerScheme, QuantScheme
from ..weight import QuantizedWeight
from .base import Checkpoint

_CHUNK = 1 << 24  # weights dequantized at a time


class GgufCheckpoint(Checkpoint):
    """A GGUF file of a llama or gemma3 model."""

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(path)
        self._gguf_names = gguf_model.tensor_names(self.file)
        self.config = gguf_model.synthesize_config(self.file)
        self.scheme = self._describe_blocks()

    def names(self) -> set[str]:
        return set(self._gguf_names)

    def has(self, name: str) -> bool:
        return name in self._gguf_names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._gguf_name(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return gguf.DENSE.get(self.file.tensors[self._gguf_name(name)].kind, torch.float32)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            offset = gguf_model.norm_offset(self.file, self._gguf_name(name))
            vector = self._dense_rows(name, 0, 1).reshape(shape)
            order = gguf_model.hf_row_order(self.file, self._gguf_name(name))
            if order is not None:  # the biases of q and k have the rows' order
                vector = vector[torch.from_numpy(order)]
            return (
                (vector.float() - offset).to(dtype or vector.dtype)
                if offset
                else vector.to(dtype or vector.dtype)
            )
        out = torch.empty(shape, dtype=dtype or self.dtype(name))
        step = max(1, _CHUNK // shape[-1])
        for first in range(0, shape[0], step):
            out[first : first + step] = self._dense_rows(name, first, first + step)
        return out

    def _linear(self, module: str) -> QuantizedWeight | Tensor:
        name = f"{module}.weight"
        return self._blocks(name, 0, None) if self.is_quantized(module) else self.tensor(name)

    def dense(self, module: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor(
            f"{module}.weight", dtype
        )  # a few rows at a time, which a large vocabulary needs

    def is_quantized(self, module: str) -> bool:
        return self.file.tensors[self._gguf_name(f"{module}.weight")].kind not in gguf.DENSE

    def modules(self) -> set[str]:
        return {
            name.removesuffix(".weight") for name in self._gguf_names if name.endswith(".weight")
        }

    def weight_names(self, module: str) -> list[str]:
        return [f"{module}.weight"] if self.has(f"{module}.weight") else []

    def release(self) -> None:
        self.file.release()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.file.tensors.values())

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise CheckpointError(
                "is missing",
                file=self.path,
                tensor=name,
                fix="the file is not whole, or not of the architecture that it names",
            )
        return self._gguf_names[name]

    def _rows(self, name: str, first: int, last: int | None) -> Any:
        gguf_name = self._gguf_name(name)
        order = gguf_model.hf_row_order(self.file, gguf_name)
        return (
            self.file.rows(gguf_name, first, last)
            if order is None
            else self.file.rows(gguf_name)[order[first:last]]
        )

    def _blocks(self, name: str, first: int, last: int | None) -> QuantizedWeight:
        weight = gguf.read_blocks(
            self._rows(name, first, last), self.file.tensors[self._gguf_name(name)].kind
        )
        self._check_finite(name, weight.scales, weight.mins)
        return weight

    def _dense_rows(self, name: str, first: int, last: int) -> Tensor:
        kind = self.file.tensors[self._gguf_name(name)].kind
        if kind not in gguf.DENSE:
            return self._blocks(name, first, last).dequantize()
        rows = gguf.read_dense(self._rows(name, first, last), kind)
        self._check_finite(name, rows)
        return rows

    def _check_finite(self, name: str, *tensors: Tensor | None) -> None:
        try:
            for tensor in tensors:
                if tensor is not None:
                    check_finite(name, tensor)
        except BadTensor as error:
            raise CheckpointError(
                error.problem,
                file=self.path,
                tensor=self._gguf_names[name],
                fix="download it again",
            ) from None

    def _describe_blocks(self) -> QuantScheme | None:
        """The commonest block type of the matrices, for reports; each module's own type is read from the file."""
        kinds = Counter(
            t.kind
            for n, t in self.file.tensors.items()
            if n.startswith("blk.") and len(t.shape) == 2
        )
        kind = kinds.most_common(1)[0][0] if kinds else "F32"
        if kind in gguf.DENSE:
            return None
        layer = LayerScheme("int", gguf.BITS[kind], gguf.GROUP[kind], kind in gguf.SYMMETRIC)
        return QuantScheme(method="gguf", format=kind, default=layer)
