"""CUDA graphs of decode steps: one for each of a few batch sizes, the next larger one serving what lies between.

The largest is captured when the engine starts, so that the memory which all of them share is known then; the others
when a step first needs them. A size that cannot be captured is launched as it comes, and the log says why.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
Record = Callable[
    [Callable[[], Tensor]], tuple[Replay, Tensor]
]  # makes a replay of a call, and the tensor it fills


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 8 up to 64, of 16 up to 256, of 32 on: few rows are padding."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """`replay(size)` computes what `compute(size)` would, in one launch."""

    def __init__(self, max_num_seqs: int, record: Record, compute: Callable[[int], Tensor]):
        """Captures the largest size. The others are computed once, as far as the kernels differ: each power of two has
        its own number of attention splits."""
        self.sizes = graph_sizes(max_num_seqs)
        self._record, self._compute = record, compute
        self._recorded: dict[int, tuple[Replay, Tensor]] = {}
        self.record(max_num_seqs)
        for size in (
            2**power for power in range(max_num_seqs.bit_length()) if 2**power < max_num_seqs
        ):
            compute(size)

    def size_for(self, rows: int) -> int | None:
        """The graph for so many rows; None: there is none."""
        return next((size for size in self.sizes if rows <= size), None)

    def is_recorded(self, size: int) -> bool:
        return size in self._recorded

    def record(self, size: int) -> bool:
        """Make the graph of this size, which computes it once or twice. False: it cannot be captured."""
        try:
            self._recorded[size] = self._record(lambda: self._compute(size))
        except RuntimeError as error:  # memory, or an operator that cannot be captured
            logger.warning("no CUDA graph for decode steps of %d requests: %s", size, error)
            self.sizes.remove(size)
        return size in self._recorded

    def replay(self, size: int) -> Tensor:
        """What the recorded graph of this size gives now; overwritten by its next replay."""
        replay, output = self._recorded[size]
        replay()
        return output


class CudaRecorder:
    """Captures calls into graphs that share one pool of memory: one at a time is replayed."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        call()  # compiles what has not been compiled, which a capture may not
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = call()
        return graph.replay, output
