"""The recurrent states of requests, in slots, and which of them a step reads and writes.

    cache.layers[l]   one tensor for each of the mixer's state_shapes, float32 [num_slots, *shape]

A request that starts at token 0 reads zeros, whatever another has left in its slot. One that goes on from a snapshot
reads that and writes its own slot. A chunk is cut where a snapshot is taken of the state within it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ....architectures.base import LayerSpec
from ..batch import Batch
from .attention import zero_pages


@dataclass(frozen=True, slots=True)
class StateCache:
    """Of the layers that have a state; on a CPU a slot costs memory from its first use on."""

    layers: dict[int, tuple[Tensor, ...]]

    @classmethod
    def allocate(
        cls, layers: list[LayerSpec], num_slots: int, device: torch.device
    ) -> "StateCache":
        def zeros(shape: tuple[int, ...]) -> Tensor:
            if device.type != "cpu":
                return torch.zeros((num_slots, *shape), device=device)
            pages = zero_pages(max(4, math.prod(shape) * num_slots * 4))
            flat = torch.frombuffer(pages, dtype=torch.float32)
            return flat[: math.prod(shape) * num_slots].view(num_slots, *shape)

        return cls(
            {
                index: tuple(map(zeros, layer.state_shapes))
                for index, layer in enumerate(layers)
                if layer.state_shapes
            }
        )

    def clear(self, slot: int) -> None:
        """Zero what a failed request may have left NaN in."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor[slot] = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one request."""

    rows: slice
    read: int | None  # slot; None: zeros
    writes: list[int]


@dataclass(frozen=True, slots=True)
class StateStep:
    """A step's tokens, by the states that they read and write: decodes side by side, chunks in pieces."""

    num_decodes: int
    reads: Tensor  # int64 [num_decodes]
    fresh: Tensor  # bool [num_decodes]: zeros instead
    written: Tensor  # int64 [W]: decodes whose states go
    writes: Tensor  # int64 [W]: to these slots
    pieces: list[Piece]

    @classmethod
    def build(cls, batch: Batch, device: torch.device) -> "StateStep":
        pieces = [
            _pieces(batch, index, row)
            for index, row in enumerate(batch.query_start_loc[: len(batch)])
        ]
        decodes = [of_item[0] for of_item in pieces[: batch.num_decodes]]
        writes = [(row, slot) for row, piece in enumerate(decodes) for slot in piece.writes]

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            batch.num_decodes,
            integers([piece.read or 0 for piece in decodes]),
            torch.tensor([piece.read is None for piece in decodes], device=device),
            integers([row for row, _ in writes]),
            integers([slot for _, slot in writes]),
            [piece for of_item in pieces[batch.num_decodes :] for piece in of_item],
        )


def _pieces(batch: Batch, index: int, row: int) -> list[Piece]:
    """Of an item whose first token is this row."""
    read, own, snapshot, count = batch.states[index]
    pieces, first = [], 0
    ends = [*batch.snapshots[snapshot : snapshot + count], (batch.items[index].num_tokens, own)]
    for end, slot in ends:
        if end > first:
            rows = slice(row + first, row + end)
            pieces.append(Piece(rows, None if read < 0 else read, [own]))
            first, read = end, own
        if slot != own:
            pieces[-1].writes.append(slot)
    return pieces


def convolve(x: Tensor, taps: Tensor, step: StateStep, states: Tensor) -> Tensor:
    """x [T, channels] through filters [taps, channels], oldest first, each request from the inputs [taps - 1, channels]
    in its slot of `states` on. Returns [T, channels]; the slots go on."""
    outputs, count, before = [], step.num_decodes, len(taps) - 1
    if count:
        earlier = states[step.reads].masked_fill_(step.fresh.view(-1, 1, 1), 0)
        seen = torch.cat((earlier, x[:count, None]), 1)
        outputs.append((seen * taps).sum(1))
        states[step.writes] = seen[step.written, 1:]
    for piece in step.pieces:
        seen = torch.cat((read(states, piece), x[piece.rows]))
        length = len(seen) - before
        outputs.append(sum(seen[i : i + length] * tap for i, tap in enumerate(taps)))
        for slot in piece.writes:
            states[slot] = seen[length:]
    return torch.cat(outputs)


def carry(
    one: Callable[..., tuple[Tensor, Tensor]],
    several: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    step: StateStep,
    states: Tensor,
) -> Tensor:
    """inputs [T, ...] each, through a recurrence over the tokens of each request: `one` of (inputs of decodes, their
    states) or `several` of (inputs of one request, its state), each to outputs and new states. Returns outputs
    [T, ...]; the slots go on."""
    outputs, count = [], step.num_decodes
    if count:
        fresh = step.fresh.view(-1, *[1] * (states.dim() - 1))
        state = states[step.reads].masked_fill_(fresh, 0)
        output, state = one(*(each[:count] for each in inputs), state)
        states[step.writes] = state[step.written]
        outputs.append(output)
    for piece in step.pieces:
        output, state = several(*(each[piece.rows] for each in inputs), read(states, piece))
        for slot in piece.writes:
            states[slot] = state
        outputs.append(output)
    return torch.cat(outputs)


def read(states: Tensor, piece: Piece) -> Tensor:
    """The state that a piece goes on from."""
    return states.new_zeros(states.shape[1:]) if piece.read is None else states[piece.read]
