"""Checkpoint -> NativeDecoder: as `loader.py`, with every weight in the C++ kernels' layout.

Nothing is fused here: the linears of a site lie side by side in one call whatever their formats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..kernels.cpu.arena import Arena
from ..kernels.cpu.library import Pool
from ..kernels.cpu.prepared import Site, prepare, quantize_head
from ..quant.weight import QuantizedWeight
from .loader import Loader
from .models.native import NativeDecoder, NativeLayer


@dataclass(slots=True, kw_only=True)
class NativeLoader(Loader):
    """Builds a NativeDecoder from a checkpoint."""

    pool: Pool
    int8: bool  # activations of integer weights
    block_size: int
    head_bits: int | None  # 8: a dense output head is quantized
    arena: Arena = field(default_factory=Arena)

    def load(self, progress: Callable[[int, int], None] | None = None) -> Any:
        """As Loader.load, but a NativeDecoder."""
        layers = self._layers(NativeLayer, progress)
        embedding = self._embedding().contiguous()
        norm = self._norm(f"{self.config.prefix}norm", self.config.hidden_size)
        return NativeDecoder(self.config, self.pool, embedding, layers, norm, self._lm_head(embedding), self.block_size)

    def _build(self, weights: list[QuantizedWeight | Tensor], biases: list[Tensor | None]) -> Site:
        site = Site([prepare(w, b).move(self.arena) for w, b in zip(weights, biases, strict=True)], self.int8)
        for linear in site.linears:
            self.report.used[f"cpu-{self.pool.isa} {linear.describe(self.int8)}"] += 1
        return site

    def _head_weight(self, weight: QuantizedWeight | Tensor) -> QuantizedWeight | Tensor:
        return quantize_head(weight) if self.head_bits == 8 and isinstance(weight, Tensor) else weight

    def _norm(self, name: str, width: int) -> Tensor:
        return self._norm_weight(name, width)
