"""Checkpoint: one model on disk, whatever its format, in Hugging Face names and row order.

Tensors are read lazily, one at a time, and their values are checked as they are read. What is on disk decides whether
a module is quantized; the scheme says how to read it.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...architectures.multimodal import text_config
from ...errors import CheckpointError
from ..scheme import QuantScheme
from ..weight import QuantizedWeight, part

_ALL = slice(None)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Checkpoint(ABC):
    """A model's tensors by HF name. `config` is config.json's content; `scheme` is None for a 16/32-bit model."""

    path: Path
    config: dict[str, Any]
    scheme: QuantScheme | None

    @abstractmethod
    def names(self) -> set[str]:
        """All tensor names."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `tensor` returns by default."""

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, cast to dtype if given. Of a GGUF file, block-quantized tensors come dequantized in float32.

        Raises CheckpointError if it is missing or a float tensor holds NaN or infinity.
        """

    def linear(
        self, module: str, rows: slice = _ALL, cols: slice = _ALL
    ) -> QuantizedWeight | Tensor:
        """The weight of a linear (or embedding) module: quantized as on disk, else dense [out, in] as stored.

        rows, cols: the part of it that is wanted, on the boundaries of its groups (CheckpointError elsewhere).
        """
        weight = self._linear(module)
        if rows == _ALL and cols == _ALL:
            return weight
        try:
            return part(weight, rows, cols)
        except ValueError as error:
            raise CheckpointError(str(error), file=self.path, tensor=f"{module}.weight") from None

    @abstractmethod
    def _linear(self, module: str) -> QuantizedWeight | Tensor:
        """All of it."""

    @abstractmethod
    def is_quantized(self, module: str) -> bool:
        """Whether `linear` returns a QuantizedWeight."""

    @abstractmethod
    def modules(self) -> set[str]:
        """Names of the modules that have a weight, dense or quantized."""

    @abstractmethod
    def weight_names(self, module: str) -> list[str]:
        """The tensors that `linear` reads for a module; empty if it has no weight."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the memory that reading has mapped. Tensors read before stay valid."""

    def has(self, name: str) -> bool:
        return name in self.names()

    def loose_names(self) -> set[str]:
        """The tensors that are no module's weight: biases, scales of a KV cache."""
        return self.names() - {name for m in self.modules() for name in self.weight_names(m)}

    @property
    def stored_dtype(self) -> torch.dtype:
        """What config.json says that the weights are, bfloat16 where it names none of the three."""
        config = text_config(self.config)
        named = config.get("dtype") or config.get("torch_dtype")
        return _DTYPES.get(str(named).removeprefix("torch."), torch.bfloat16)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The 16 bits that what stays dense is written in, beside quantized weights."""
        return torch.float16 if self.stored_dtype == torch.float16 else torch.bfloat16

    def bias(self, module: str) -> Tensor | None:
        name = f"{module}.bias"
        return self.tensor(name) if self.has(name) else None

    def dense(self, module: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of a module as a dense matrix in the checkpoint's own order, dequantized where need be."""
        weight = self.dense_part(module, dtype=dtype)
        return weight if dtype is None else weight.to(dtype)

    def dense_part(
        self,
        module: str,
        rows: slice = _ALL,
        cols: slice = _ALL,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Some rows and columns of it, as stored or dequantized to dtype (None: float32)."""
        weight = self.linear(module, rows, cols)
        if isinstance(weight, QuantizedWeight):
            return weight.dequantize(dtype or torch.float32)
        return weight
