"""A model whose layers no one backend takes: runs of consecutive layers, each a decoder of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Cache, Decoder, HostSampling, KernelReport
from .batch import Batch


@dataclass(frozen=True, slots=True)
class ChainedCache:
    """Each decoder's own, over the same blocks and slots."""

    caches: list[Cache]

    def clear(self, blocks: Sequence[list[int]], state_slot: int | None) -> None:
        for cache in self.caches:
            cache.clear(blocks, state_slot)


class ChainedDecoder(HostSampling):
    """Hands hidden states from one decoder to the next. The host samples: a decoder that samples on its device keeps
    the tokens to itself, and the first of the chain has to embed them."""

    def __init__(self, decoders: list[Decoder]):
        self.decoders = decoders
        self.looks_ahead = all(decoder.looks_ahead for decoder in decoders)
        self.report = KernelReport()
        for decoder in decoders:
            self.report.merge(decoder.report)

    @property
    def weight_bytes(self) -> int:
        return sum(decoder.weight_bytes for decoder in self.decoders)

    def new_cache(self, num_blocks: Sequence[int], num_states: int = 1) -> ChainedCache:
        return ChainedCache([each.new_cache(num_blocks, num_states) for each in self.decoders])

    def forward(self, batch: Batch, cache: ChainedCache, hidden: Tensor | None = None) -> Tensor:
        for decoder, own in zip(self.decoders, cache.caches, strict=True):
            hidden = decoder.forward(batch, own, hidden)
        if hidden is None:
            raise ValueError("a chain of no decoders")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoders[-1].logits(hidden)
