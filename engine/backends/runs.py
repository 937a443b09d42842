"""A model whose layers no one backend takes: runs of consecutive layers, each a decoder of its own."""

from dataclasses import dataclass

from torch import Tensor

from ..request import Request
from ..scheduling.batch import PendingStep, StepResult
from .base import Cache, Decoder, KernelReport
from .batch import Batch


@dataclass(frozen=True, slots=True)
class ChainedCache:
    """Each decoder's own, over the same blocks."""

    caches: list[Cache]

    def clear(self, blocks: list[int]) -> None:
        for cache in self.caches:
            cache.clear(blocks)


class ChainedDecoder:
    """Hands hidden states from one decoder to the next."""

    def __init__(self, decoders: list[Decoder]):
        self.decoders = decoders
        self.report = KernelReport()
        self.overlaps = any(decoder.overlaps for decoder in decoders)
        for decoder in decoders:
            self.report.merge(decoder.report)

    @property
    def weight_bytes(self) -> int:
        return sum(decoder.weight_bytes for decoder in self.decoders)

    def new_cache(self, num_blocks: int) -> ChainedCache:
        return ChainedCache([decoder.new_cache(num_blocks) for decoder in self.decoders])

    def forward(self, batch: Batch, cache: ChainedCache, hidden: Tensor | None = None) -> Tensor:
        for decoder, own in zip(self.decoders, cache.caches, strict=True):
            hidden = decoder.forward(batch, own, hidden)
        if hidden is None:
            raise ValueError("a chain of no decoders")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoders[-1].logits(hidden)

    def sample(
        self, logits: Tensor, requests: list[Request], result: StepResult
    ) -> StepResult | PendingStep:
        return self.decoders[-1].sample(logits, requests, result)

    def warm_up(self, cache: ChainedCache, max_model_len: int) -> None:
        for decoder, own in zip(self.decoders, cache.caches, strict=True):
            decoder.warm_up(own, max_model_len)
