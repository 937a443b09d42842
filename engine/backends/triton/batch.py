"""A step's integers on their way to the device, without the host ever waiting for it.

Decode tokens lie first, one a request, then the chunks; tables have a row for each request. Of each KV group there are
its own slots and its own table, whose entries behind a window name no block:

    token_ids, positions          [T]    int64
    slots                         [T]    int64   block * block_size + offset, -1: nothing is cached
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
    slots: tuple[Tensor, ...]
    starts: Tensor
    lengths: Tensor
    tables: tuple[Tensor, ...]
    num_decodes: int
    states: StateBatch | None


def upload(
    batch: Batch,
    previous: SampledTokens | None,
    device: torch.device,
    form: BatchForm,
    num_groups: int,
) -> DeviceBatch:
    """A step of any shape. num_groups: of the KV cache."""
    groups = range(num_groups)
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
        tuple(to_device(batch.slot_mapping(group), torch.int64, device) for group in groups),
        starts,
        to_device(batch.seq_lens, torch.int32, device),
        tuple(_upload_tables(batch.block_tables(group), device) for group in groups),
        batch.num_decodes,
        upload_states(batch, starts) if form.has_states else None,
    )


def _upload_tables(of_all: list[list[int]], device: torch.device) -> Tensor:
    tables = np.zeros((len(of_all), max(map(len, of_all))), dtype=np.int32)
    for row, table in zip(tables, of_all, strict=True):
        row[: len(table)] = table
    return to_device(tables, torch.int32, device)


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


class StaticTables:
    """The block tables of one KV group."""

    def __init__(self, group: int, capacity: int, max_blocks: int, device: torch.device):
        self.group, self.device = group, device
        self.tables = torch.zeros(capacity, max_blocks, dtype=torch.int32, device=device)
        # Of each row: whose blocks, after how many preemptions, how many.
        self._held: list[tuple[weakref.ref[Request] | None, int, int]] = [(None, 0, 0)] * capacity

    def update(self, items: list[ScheduledRequest]) -> None:
        """Only what is new: a block for every block_size tokens of a request that keeps its row. What it has released
        stays written."""
        width = self.tables.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for row, item in enumerate(items):
            request = item.request
            holder, preemptions, known = self._held[row]
            stays = holder is not None and holder() is request
            first = known if stays and preemptions == request.num_preemptions else 0
            table = request.block_tables[self.group]
            places += range(row * width + first, row * width + len(table))
            blocks += table[first:]
            self._held[row] = weakref.ref(request), request.num_preemptions, len(table)
        if places:
            self.tables.view(-1)[to_device(places, torch.int64, self.device)] = to_device(
                blocks, torch.int32, self.device
            )


class StaticBatch:
    """One decode token each of up to `capacity` requests."""

    def __init__(
        self,
        capacity: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        form: BatchForm,
        num_groups: int,
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_size, self.device, self.form = block_size, device, form
        groups = range(num_groups)
        self._ids, self._positions = zeros(capacity), zeros(capacity)
        self._slots = [zeros(capacity).fill_(-1) for _ in groups]
        self._rope_rows = self._positions if form.long is None else zeros(capacity)
        self._starts = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._lengths = zeros(capacity, dtype=torch.int32)
        self._tables = [StaticTables(group, capacity, max_blocks, device) for group in groups]
        self._states = StaticStates(capacity, device) if form.has_states else None

    def view(self, size: int) -> DeviceBatch:
        """The first `size` rows: the same memory at every call."""
        starts = self._starts[: size + 1]
        return DeviceBatch(
            self._ids[:size],
            self._positions[:size],
            self._rope_rows[:size],
            tuple(slots[:size] for slots in self._slots),
            starts,
            self._lengths[:size],
            tuple(each.tables[:size] for each in self._tables),
            size,
            None if self._states is None else self._states.view(starts),
        )

    def clear(self) -> None:
        """Padding in all rows."""
        for slots in self._slots:
            slots.fill_(-1)
        self._lengths.zero_()
        if self._states is not None:
            self._states.clear()

    def load(self, batch: Batch, size: int, previous: SampledTokens | None) -> None:
        """Overwrite the first `size` rows with a batch of decodes and padding."""
        padding = size - len(batch)
        numbers = [(self._ids, batch.token_ids, 0), (self._positions, batch.positions, 0)]
        numbers += [(each, batch.slot_mapping(i), -1) for i, each in enumerate(self._slots)]
        for target, values, pad in numbers:
            padded = [*values, *[pad] * padding]
            target[:size].copy_(to_device(padded, torch.int64, self.device))
        lengths = batch.seq_lens + [0] * padding
        self._lengths[:size].copy_(to_device(lengths, torch.int32, self.device))
        if self.form.long is not None:
            rows = to_device(self.form.long.of(batch), torch.int64, self.device)
            self._rope_rows[: len(batch)].copy_(rows)
        if self._states is not None:
            self._states.load(batch, size)
        fill_in(self._ids, batch, previous)
        for tables in self._tables:
            tables.update(batch.items)
