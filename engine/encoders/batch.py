"""EncoderBatch: texts of any lengths as rows of tokens, without padding.

    texts   a b c | d e | f g | h i j        as they came
    rows    d e  f g | a b c  h i j          those of one length lie together: groups (2, 2), (3, 2)

All that looks at one token at a time computes the rows as they are; attention takes a group as [count, length].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]: within each text
    types: Tensor  # int64 [T]: 1 for those of the second text of a pair
    groups: tuple[tuple[int, int], ...]  # (length, count) of consecutive texts
    order: tuple[int, ...]  # which of the given texts each one is

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[int]],
        second_parts: Sequence[int],
        device: torch.device,
    ) -> "EncoderBatch":
        """second_parts: where in each text its second part begins; 0: nowhere."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        tokens: list[int] = []
        positions: list[int] = []
        types: list[int] = []
        counts: dict[int, int] = {}
        for i in order:
            length = len(texts[i])
            first = second_parts[i] or length
            counts[length] = counts.get(length, 0) + 1
            tokens += texts[i]
            positions += range(length)
            types += [0] * first + [1] * (length - first)
        rows = torch.tensor([tokens, positions, types], dtype=torch.int64).to(device)
        return cls(rows[0], rows[1], rows[2], tuple(counts.items()), tuple(order))

    def grouped(self, rows: Tensor) -> list[Tensor]:
        """[T, ...] -> one view [count, length, ...] for each group."""
        sizes = [length * count for length, count in self.groups]
        parts = rows.split(sizes)
        return [
            part.unflatten(0, (count, length))
            for part, (length, count) in zip(parts, self.groups, strict=True)
        ]
