"""Which tokens of a step go through which states.

Each request's tokens go through the state of one slot. After some of them it is written: to the request's own slot
after the last, to a snapshot's before that.

    tokens     | a a a a a a a | b | c |
    starts     0               7   8   9
    reads      2                 0   -1            a goes on from slot 2, b from its own, c from zeros
    stops      (4, 5) (7, 1)     (8, 0)  (9, 3)    (tokens so far, slot): a leaves a snapshot in slot 5
    stop_starts 0              2       3       4
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelArgumentError


@dataclass(frozen=True, slots=True)
class StateBatch:
    """Made once a step and shared by all layers. All int32, on the device. The stops of a request ascend, the last is
    its end; a slot below 0 is not read (zeros are) and not written."""

    starts: Tensor  # [S + 1], the first 0
    reads: Tensor  # [S]
    stop_starts: Tensor  # [S + 1], the first 0
    stop_rows: Tensor  # [P]
    stop_slots: Tensor  # [P]
    one_token_each: bool  # a request

    def __post_init__(self) -> None:
        tensors = self.tensors
        if any(each.dtype != torch.int32 or each.stride() != (1,) for each in tensors):
            raise KernelArgumentError("a batch of states: its tensors are not contiguous int32")
        if (
            not len(self.starts) == len(self.stop_starts) == len(self.reads) + 1
            or self.stop_rows.shape != self.stop_slots.shape
        ):
            shapes = [list(each.shape) for each in tensors]
            raise KernelArgumentError(f"a batch of states: shapes {shapes} do not fit together")

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the kernels take them."""
        return self.starts, self.reads, self.stop_starts, self.stop_rows, self.stop_slots
