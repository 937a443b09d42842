"""A step's integers on their way to the device, without the host ever waiting for it.

Decode tokens lie first, one a request, then the chunks; `tables` has a row for each request:

    token_ids, positions, slots   [T]    int64   slot: block * block_size + offset, -1: nothing is cached
    rope_rows                     [T]    int64   of the ropes' tables (mixers.py): positions, or those of long factors
    starts                        [S+1]  int32   where each request's tokens begin
    lengths                       [S]    int32   tokens it has then, these included
    tables                        [S, W] int32   its KV blocks
    states                                       its recurrent state (states.py), where layers have any

`upload` makes new tensors, for any step. `StaticBatch` keeps one set of them for steps of decodes only, so that a CUDA
graph finds every step in the same place; rows behind the last request are padded with what reads and writes nothing.
"""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ....kernels.recurrent.batch import StateBatch
from ...request import UNKNOWN, Request
from ...scheduling.batch import ScheduledRequest
from ..batch import Batch
from .states import StaticStates, upload_states
from .transfer import to_device


@dataclass(slots=True)
class SampledTokens:
    """What the step before sampled, and the host may not know yet."""

    tokens: Tensor  # int64 [B], on the device, all valid ids
    rows: dict[str, int]  # request_id -> row of `tokens`


@dataclass(frozen=True, slots=True)
class LongRows:
    """Where ropes' long factors lie in the tables: so many rows behind the others."""

    switch: int  # tokens beyond which a request has them
    behind: int

    def of(self, batch: Batch) -> list[int]:
        """The row of each token."""
        long = batch.long_rows(self.switch)
        return [p + self.behind * is_long for p, is_long in zip(batch.positions, long, strict=True)]


@dataclass(frozen=True, slots=True)
class BatchForm:
    """What steps carry beside tokens and blocks, as a decoder's layers need it."""

    has_states: bool
    long: LongRows | None  # None: all requests have one set of factors, and rows are positions


@dataclass(slots=True)
class DeviceBatch:
    """As the module's docstring has it, on the device."""

    token_ids: Tensor
    positions: Tensor
    rope_rows: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    num_decodes: int
    states: StateBatch | None


def upload(
    batch: Batch, previous: SampledTokens | None, device: torch.device, form: BatchForm
) -> DeviceBatch:
    """A step of any shape."""
    of_all = batch.block_tables(0)
    tables = np.zeros((len(batch), max(map(len, of_all))), dtype=np.int32)
    for row, table in zip(tables, of_all, strict=True):
        row[: len(table)] = table
    token_ids = to_device(batch.token_ids, torch.int64, device)
    fill_in(token_ids, batch, previous)
    starts = to_device(batch.query_start_loc, torch.int32, device)
    positions = rope_rows = to_device(batch.positions, torch.int64, device)
    if form.long is not None:
        rope_rows = to_device(form.long.of(batch), torch.int64, device)
    return DeviceBatch(
        token_ids,
        positions,
        rope_rows,
        to_device(batch.slot_mapping(0), torch.int64, device),
        starts,
        to_device(batch.seq_lens, torch.int32, device),
        to_device(tables, torch.int32, device),
        batch.num_decodes,
        upload_states(batch, starts) if form.has_states else None,
    )


def fill_in(token_ids: Tensor, batch: Batch, previous: SampledTokens | None) -> None:
    """Write the decodes' tokens that the host does not know yet into the first of token_ids."""
    if previous is None:
        return
    decodes = batch.items[: batch.num_decodes]
    unknown = [row for row, item in enumerate(decodes) if item.token_ids == [UNKNOWN]]
    if unknown:
        sampled = [previous.rows[decodes[row].request.request_id] for row in unknown]
        device = token_ids.device
        token_ids[to_device(unknown, torch.int64, device)] = previous.tokens[
            to_device(sampled, torch.int64, device)
        ]


class StaticBatch:
    """One decode token each of up to `capacity` requests."""

    def __init__(
        self,
        capacity: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        form: BatchForm,
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_size, self.device, self.form = block_size, device, form
        self._longs = [zeros(capacity) for _ in range(3)]  # token ids, positions, slots
        self._longs[2].fill_(-1)
        self._rope_rows = self._longs[1] if form.long is None else zeros(capacity)
        self._starts = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._lengths = zeros(capacity, dtype=torch.int32)
        self._tables = zeros(capacity, max_blocks, dtype=torch.int32)
        self._states = StaticStates(capacity, device) if form.has_states else None
        # Of each row: whose blocks, after how many preemptions, how many.
        self._held: list[tuple[weakref.ref[Request] | None, int, int]] = [(None, 0, 0)] * capacity

    def view(self, size: int) -> DeviceBatch:
        """The first `size` rows: the same memory at every call."""
        ids, positions, slots = (tensor[:size] for tensor in self._longs)
        starts = self._starts[: size + 1]
        return DeviceBatch(
            ids,
            positions,
            self._rope_rows[:size],
            slots,
            starts,
            self._lengths[:size],
            self._tables[:size],
            size,
            None if self._states is None else self._states.view(starts),
        )

    def clear(self) -> None:
        """Padding in all rows."""
        self._longs[2].fill_(-1)
        self._lengths.zero_()
        if self._states is not None:
            self._states.clear()

    def load(self, batch: Batch, size: int, previous: SampledTokens | None) -> None:
        """Overwrite the first `size` rows with a batch of decodes and padding."""
        padding = size - len(batch)
        values = (batch.token_ids, batch.positions, batch.slot_mapping(0))
        for target, numbers, pad in zip(self._longs, values, (0, 0, -1), strict=True):
            padded = [*numbers, *[pad] * padding]
            target[:size].copy_(to_device(padded, torch.int64, self.device))
        lengths = batch.seq_lens + [0] * padding
        self._lengths[:size].copy_(to_device(lengths, torch.int32, self.device))
        if self.form.long is not None:
            rows = to_device(self.form.long.of(batch), torch.int64, self.device)
            self._rope_rows[: len(batch)].copy_(rows)
        if self._states is not None:
            self._states.load(batch, size)
        fill_in(self._longs[0], batch, previous)
        self._update_tables(batch.items)

    def _update_tables(self, items: list[ScheduledRequest]) -> None:
        """Only what is new: a block for every block_size tokens of a request that keeps its row."""
        width = self._tables.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for row, item in enumerate(items):
            request = item.request
            holder, preemptions, known = self._held[row]
            stays = holder is not None and holder() is request
            first = known if stays and preemptions == request.num_preemptions else 0
            count = len(request.block_tables[0])
            places += range(row * width + first, row * width + count)
            blocks += request.block_tables[0][first:]
            self._held[row] = weakref.ref(request), request.num_preemptions, count
        if places:
            self._tables.view(-1)[to_device(places, torch.int64, self.device)] = to_device(
                blocks, torch.int32, self.device
            )
