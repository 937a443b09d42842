"""Checkpoint -> NativeDecoder: as `loader.py`, with every weight in the C++ kernels' layout.

Nothing is fused here: the linears of a site lie side by side in one call whatever their formats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ....kernels.cpu.arena import Arena
from ....kernels.cpu.library import DENSE, Pool
from ....kernels.cpu.prepared import Prepared, Site, prepare, quantize_head
from ....quant.weight import QuantizedWeight
from ..torch.loader import Loader
from .decoder import NativeDecoder, NativeLayer
from .prepared_cache import PreparedCache


@dataclass(slots=True, kw_only=True)
class NativeLoader(Loader):
    """Builds a NativeDecoder from a checkpoint."""

    pool: Pool
    int8: bool  # activations of integer weights
    block_size: int
    head_bits: int | None  # 8: a dense output head is quantized
    cache: PreparedCache | None = None
    arena: Arena = field(default_factory=Arena)

    def load(self, progress: Callable[[int, int], None] | None = None) -> Any:
        """As Loader.load, but a NativeDecoder."""
        layers = self._layers(NativeLayer, progress)
        embedding = self._embedding().contiguous()
        norm = self._norm(f"{self.config.prefix}norm", self.config.hidden_size)
        head = self._cached("lm_head", lambda: Loader._lm_head(self, embedding))
        if self.cache is not None:
            self.cache.save()
        return NativeDecoder(self.config, self.pool, embedding, layers, norm, head, self.block_size)

    def _linear(self, *modules: str) -> Site:
        return self._cached(modules[0], lambda: Loader._linear(self, *modules))

    def _cached(self, name: str, make: Callable[[], Site]) -> Site:
        """The site from the cache; else made, and kept there unless it is dense, which is a copy and no more."""
        if self.cache is None:
            return make()
        if (linears := self.cache.site(name)) is not None:
            return self._site(linears)
        site = make()
        if any(linear.format != DENSE for linear in site.linears):
            self.cache.add(name, site.linears)
        return site

    def _build(self, weights: list[QuantizedWeight | Tensor], biases: list[Tensor | None]) -> Site:
        return self._site([prepare(w, b) for w, b in zip(weights, biases, strict=True)])

    def _site(self, linears: list[Prepared]) -> Site:
        for linear in linears:
            linear.move(self.arena)
            self.report.used[f"cpu-{self.pool.isa} {linear.describe(self.int8)}"] += 1
        return Site(linears, self.int8)

    def _head_weight(self, weight: QuantizedWeight | Tensor) -> QuantizedWeight | Tensor:
        return (
            quantize_head(weight) if self.head_bits == 8 and isinstance(weight, Tensor) else weight
        )

    def _norm(self, name: str, width: int) -> Tensor:
        return self._norm_weight(name, width)
