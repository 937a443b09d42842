"""Batch: a step's tokens side by side, as every backend takes them. Plain lists; each backend moves what it needs.

Decodes (one token a request) lie first, then the chunks:

    token_ids, positions                 [T]
    slot_mapping(group)                  [T]     slot: block * block_size + offset in a KV group's cache
    query_start_loc                      [S+1]   where each request's tokens begin
    seq_lens                             [S]     tokens it has then, these included
    block_tables(group)                  [S][*]  its blocks there; instead of one behind the window, one of its others
    states                               [S][4]  slots that its recurrent state is read from (-1: zeros) and written to;
                                                 its first of snapshots, and how many there are
    snapshots                            [*][2]  tokens of the request's in this step, and the slot for the state then
    last_seen                            [T]     the last position that each token attends to
    given                                [*]     tokens that are not embedded: tensors of images hold what they are
"""

import itertools
from bisect import bisect_left
from functools import cached_property
from typing import Any

from ..request import Request
from ..sampling_params import SamplingParams
from ..scheduling.batch import ScheduledRequest
from ..scheduling.kv_cache_manager import RELEASED


class Batch:
    """What one step computes. Lists are made when a backend first asks for them."""

    def __init__(self, items: list[ScheduledRequest], block_size: int):
        """items: those of a ScheduledBatch, in any order."""
        self.items = sorted(items, key=lambda item: item.num_tokens > 1)  # decodes first; stable
        self.block_size = block_size

    def __len__(self) -> int:
        """Requests."""
        return len(self.items)

    @classmethod
    def of_one(
        cls, token_ids: list[int], block_size: int, start: int = 0, num_tokens: int | None = None
    ) -> "Batch":
        """Tokens start .. start + num_tokens (None: to the end) of a sequence that has the first blocks of a cache, and
        its first state slot."""
        blocks = list(range(-(-len(token_ids) // block_size)))
        request = Request(
            "scratch",
            token_ids,
            SamplingParams(),
            frozenset(),
            seed=0,
            block_tables=[blocks],
            state_slot=0,
        )
        count = len(token_ids) - start if num_tokens is None else num_tokens
        return cls([ScheduledRequest(request, start, count)], block_size)

    @property
    def num_blocks(self) -> int:
        """Of all requests, of the first KV group."""
        return sum(map(len, self.block_tables(0)))

    @cached_property
    def num_decodes(self) -> int:
        return sum(item.num_tokens == 1 for item in self.items)

    @cached_property
    def token_ids(self) -> list[int]:
        return [token for item in self.items for token in item.token_ids]

    @cached_property
    def positions(self) -> list[int]:
        return [position for item in self.items for position in range(item.start, item.end)]

    def slot_mapping(self, group: int) -> list[int]:
        return [slot for item in self.items for slot in item.slots(self.block_size, group)]

    @cached_property
    def query_start_loc(self) -> list[int]:
        return [0, *itertools.accumulate(item.num_tokens for item in self.items)]

    @cached_property
    def seq_lens(self) -> list[int]:
        return [item.end for item in self.items]

    def longer(self, length: int) -> list[bool]:
        """Whether a request has more tokens than that: all of its own, not only those up to this step's."""
        return [item.request.num_tokens > length for item in self.items]

    def long_rows(self, length: int) -> list[bool]:
        """The same for each of this step's tokens."""
        return [
            long
            for long, item in zip(self.longer(length), self.items, strict=True)
            for _ in range(item.num_tokens)
        ]

    @cached_property
    def states(self) -> list[tuple[int, int, int, int]]:
        found, first = [], 0
        for item in self.items:
            own, source = item.request.state_slot, item.state_from
            if own is None:
                raise ValueError(f"request {item.request.request_id} has no slot for its state")
            read = -1 if item.start == 0 else own if source is None else source
            found.append((read, own, first, len(item.snapshots)))
            first += len(item.snapshots)
        return found

    @cached_property
    def snapshots(self) -> list[tuple[int, int]]:
        return [(at - item.start, slot) for item in self.items for at, slot in item.snapshots]

    @cached_property
    def given(self) -> tuple[list[int], list[Any]]:
        """Which of the tokens have embeddings of images, and these in order, in tensors [*, hidden_size]."""
        rows: list[int] = []
        parts: list[Any] = []
        for item, row in zip(self.items, self.query_start_loc, strict=False):
            for image in item.request.images:
                first = bisect_left(image.positions, item.start)
                last = bisect_left(image.positions, item.end)
                if first < last:
                    rows += [row + place - item.start for place in image.positions[first:last]]
                    parts.append(image.embeddings[first:last])
        return rows, parts

    @cached_property
    def last_seen(self) -> list[int] | None:
        """The last position that each token attends to; None where it is its own for all."""
        if not any(item.looks_ahead for item in self.items):
            return None
        return [position for item in self.items for position in item.last_seen]

    def block_tables(self, group: int) -> list[list[int]]:
        """A kernel may look at what lies behind a window, and must leave it out then."""
        return [_all_held(item.request.block_tables[group]) for item in self.items]


def _all_held(table: list[int]) -> list[int]:
    """With the first block that is held in place of those that were released, which lie before it."""
    if not table or table[0] != RELEASED:
        return table
    count = next(i for i, block in enumerate(table) if block != RELEASED)
    return [table[count]] * count + table[count:]
