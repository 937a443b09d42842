"""Which recurrent states a step reads and writes, on the device (kernels/recurrent/batch.py draws it).

`upload_states` makes new tensors, for any step. `StaticStates` keeps one set of them for steps of decodes only: each
request has two stops after its one token, a snapshot's slot (-1 for most) and its own. Padding reads and writes none.
"""

import torch
from torch import Tensor

from ....kernels.recurrent.batch import StateBatch
from ..batch import Batch
from .transfer import to_device


def upload_states(batch: Batch, starts: Tensor) -> StateBatch:
    """starts: int32 [S + 1], where each request's tokens begin, on the device."""
    stop_starts, rows, slots = [0], [], []
    bounds = zip(batch.query_start_loc, batch.query_start_loc[1:], batch.states, strict=False)
    for first, end, (_, own, snapshot, count) in bounds:
        for tokens, slot in batch.snapshots[snapshot : snapshot + count]:
            rows.append(first + tokens)
            slots.append(slot)
        rows.append(end)
        slots.append(own)
        stop_starts.append(len(rows))
    reads = [read for read, *_ in batch.states]

    def there(values: list[int]) -> Tensor:
        return to_device(values, torch.int32, starts.device)

    alone = batch.num_decodes == len(batch)
    return StateBatch(
        starts, there(reads), there(stop_starts), there(rows), there(slots), one_token_each=alone
    )


class StaticStates:
    """Of up to `capacity` requests with one token each."""

    def __init__(self, capacity: int, device: torch.device):
        self._reads = torch.full((capacity,), -1, dtype=torch.int32, device=device)
        self._stop_starts = 2 * torch.arange(capacity + 1, dtype=torch.int32, device=device)
        ends = torch.arange(1, capacity + 1, dtype=torch.int32, device=device)
        self._stop_rows = ends.repeat_interleave(2)
        self._stop_slots = torch.full((2 * capacity,), -1, dtype=torch.int32, device=device)

    def view(self, starts: Tensor) -> StateBatch:
        """The first requests, as many as `starts` is for: the same memory at every call."""
        size = len(starts) - 1
        return StateBatch(
            starts,
            self._reads[:size],
            self._stop_starts[: size + 1],
            self._stop_rows[: 2 * size],
            self._stop_slots[: 2 * size],
            one_token_each=True,
        )

    def clear(self) -> None:
        """Padding everywhere."""
        self._reads.fill_(-1)
        self._stop_slots.fill_(-1)

    def load(self, batch: Batch, size: int) -> None:
        """Overwrite the first `size` requests with a batch of decodes and padding."""
        reads, slots = [-1] * size, [-1] * (2 * size)
        for row, (read, own, snapshot, count) in enumerate(batch.states):
            reads[row] = read
            slots[2 * row + 1] = own
            if count:  # one at most: there is one token to take it after
                slots[2 * row] = batch.snapshots[snapshot][1]
        device = self._reads.device
        self._reads[:size].copy_(to_device(reads, torch.int32, device))
        self._stop_slots[: 2 * size].copy_(to_device(slots, torch.int32, device))
