"""A step's integers on their way to the device, without the host ever waiting for it.

Decode tokens lie first, one a request, then the chunks; `tables` has a row for each request:

    token_ids, positions, slots   [T]    int64   slot: block * block_size + offset, -1: nothing is cached
    starts                        [S+1]  int32   where each request's tokens begin
    lengths                       [S]    int32   tokens it has then, these included
    tables                        [S, W] int32   its KV blocks

`upload` makes new tensors, for any step. `StaticBatch` keeps one set of them for steps of decodes only, so that a CUDA
graph finds every step in the same place; rows behind the last request are padded with what reads and writes nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import ScheduledRequest
from .request import UNKNOWN, Request


@dataclass(slots=True)
class SampledTokens:
    """What the step before sampled, and the host may not know yet."""

    tokens: Tensor  # int64 [B], on the device, all valid ids
    rows: dict[str, int]  # request_id -> row of `tokens`


@dataclass(slots=True)
class DeviceBatch:
    """As the module's docstring has it, on the device."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    num_decodes: int


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers (a list or an array) as a tensor there. From pinned memory, so that the stream is not waited for."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def upload(items: list[ScheduledRequest], block_size: int, previous: SampledTokens | None,
           device: torch.device) -> DeviceBatch:
    """A step of any shape; its decodes must come first."""
    positions = [np.arange(item.start, item.end) for item in items]
    slots = [_slots(item, where, block_size) for item, where in zip(items, positions, strict=True)]
    ids = [token for item in items for token in item.request.token_ids[item.start:item.end]]
    tables = np.zeros((len(items), max(len(item.request.block_table) for item in items)), dtype=np.int32)
    for row, item in zip(tables, items, strict=True):
        row[:len(item.request.block_table)] = item.request.block_table
    starts = np.cumsum([0, *(item.num_tokens for item in items)])
    token_ids = to_device(ids, torch.int64, device)
    num_decodes = sum(item.num_tokens == 1 for item in items)
    fill_in(token_ids[:num_decodes], items[:num_decodes], previous)
    return DeviceBatch(
        token_ids, to_device(np.concatenate(positions), torch.int64, device),
        to_device(np.concatenate(slots), torch.int64, device), to_device(starts, torch.int32, device),
        to_device([item.end for item in items], torch.int32, device), to_device(tables, torch.int32, device),
        num_decodes)


def fill_in(token_ids: Tensor, decodes: list[ScheduledRequest], previous: SampledTokens | None) -> None:
    """Write the tokens that the host does not know yet into token_ids [len(decodes)]."""
    rows = [previous.rows[item.request.request_id] if item.request.token_ids[item.start] == UNKNOWN else -1
            for item in decodes] if previous is not None else []
    unknown = [index for index, row in enumerate(rows) if row >= 0]
    if previous is not None and unknown:
        device = token_ids.device
        sampled = previous.tokens[to_device([rows[index] for index in unknown], torch.int64, device)]
        token_ids[to_device(unknown, torch.int64, device)] = sampled


def _slots(item: ScheduledRequest, positions: np.ndarray, block_size: int) -> np.ndarray:
    blocks = np.asarray(item.request.block_table, dtype=np.int64)
    return blocks[positions // block_size] * block_size + positions % block_size


class StaticBatch:
    """One decode token each of up to `capacity` requests."""

    def __init__(self, capacity: int, max_blocks: int, block_size: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.capacity, self.block_size, self.device = capacity, block_size, device
        self._longs = [zeros(capacity) for _ in range(3)]  # token ids, positions, slots
        self._longs[2].fill_(-1)
        self._starts = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._lengths = zeros(capacity, dtype=torch.int32)
        self._tables = zeros(capacity, max_blocks, dtype=torch.int32)
        self._held: list[tuple[Request | None, int, int]] = [(None, 0, 0)] * capacity  # of each row: whose blocks

    def view(self, size: int) -> DeviceBatch:
        """The first `size` rows: the same memory at every call."""
        ids, positions, slots = (tensor[:size] for tensor in self._longs)
        return DeviceBatch(ids, positions, slots, self._starts[:size + 1], self._lengths[:size], self._tables[:size],
                           size)

    def load(self, items: list[ScheduledRequest], size: int, previous: SampledTokens | None) -> None:
        """Overwrite the first `size` rows with these decodes and padding."""
        padding = size - len(items)
        starts = [item.start for item in items]
        tables = [item.request.block_table for item in items]
        slots = [table[start // self.block_size] * self.block_size + start % self.block_size
                 for table, start in zip(tables, starts, strict=True)]
        ids = [max(0, item.request.token_ids[item.start]) for item in items]
        for target, values, pad in zip(self._longs, (ids, starts, slots), (0, 0, -1), strict=True):
            target[:size].copy_(to_device([*values, *[pad] * padding], torch.int64, self.device))
        lengths = [start + 1 for start in starts] + [0] * padding
        self._lengths[:size].copy_(to_device(lengths, torch.int32, self.device))
        fill_in(self._longs[0], items, previous)
        self._update_tables(items)

    def _update_tables(self, items: list[ScheduledRequest]) -> None:
        """Only what is new: a block for every block_size tokens of a request that keeps its row."""
        width = self._tables.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for row, item in enumerate(items):
            request = item.request
            holder, preemptions, known = self._held[row]
            first = known if holder is request and preemptions == request.num_preemptions else 0
            count = len(request.block_table)
            places += range(row * width + first, row * width + count)
            blocks += request.block_table[first:]
            self._held[row] = request, request.num_preemptions, count
        if places:
            self._tables.view(-1)[to_device(places, torch.int64, self.device)] = to_device(blocks, torch.int32,
                                                                                          self.device)
