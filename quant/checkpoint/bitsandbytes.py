"""A folder that bitsandbytes quantized, as a checkpoint whose weights come in 16 bits."""

import logging
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..formats import bitsandbytes
from ..formats.base import BadTensor
from .folder import FolderCheckpoint

logger = logging.getLogger(__name__)


class BitsAndBytesCheckpoint(FolderCheckpoint):
    """A folder that bitsandbytes quantized. Its weights come dense: a table of values has no canonical form."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._states = {
            name.removesuffix(suffix) + "weight": self._state(name, suffix)
            for name in self._entries
            for suffix in bitsandbytes.STATES
            if name.endswith(f".{suffix}")
        }
        logger.warning(
            "%s: bitsandbytes weights are dequantized as they are read: %.1f GB",
            path,
            self.nbytes / 1e9,
        )

    def names(self) -> set[str]:
        sides = tuple(f".{suffix}" for suffix in bitsandbytes.SUFFIXES)
        return {name for name in self._entries if not name.endswith(sides)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._states[name].shape if name in self._states else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._states:
            return self._states[name].dtype
        stored = super().dtype(name)
        return torch.bfloat16 if stored == torch.int8 else stored

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if name not in self._states and not self.has(f"{module}.SCB"):
            return super().tensor(name, dtype)
        suffixes = ("weight", *bitsandbytes.SUFFIXES)
        tensors = {s: self._raw(f"{module}.{s}") for s in suffixes if self.has(f"{module}.{s}")}
        try:
            if name in self._states:
                weight = bitsandbytes.dequantize_4bit(tensors, self._states[name])
            else:
                weight = bitsandbytes.dequantize_8bit(tensors, self.dtype(name))
        except BadTensor as error:
            raise self._error(f"{module}.{error.suffix}", error.problem) from None
        return weight if dtype is None else weight.to(dtype)

    def is_quantized(self, module: str) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return sum(prod(self.shape(name)) * self.dtype(name).itemsize for name in self.names())

    def _state(self, name: str, suffix: str) -> bitsandbytes.State:
        try:
            return bitsandbytes.read_state(suffix, self._raw(name))
        except BadTensor as error:
            raise self._error(name, error.problem) from None

    def _read_scheme(self) -> None:
        return None
