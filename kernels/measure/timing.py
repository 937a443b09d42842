"""How long a call takes on a CUDA device: captured graphs, rotated operands, medians. Importing this needs no GPU."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

CALLS = 64  # in one graph, so that its start weighs little,
GRAPH_MICROSECONDS = 4000.0  # or as many as take that long
REPLAYS = 9


@dataclass(frozen=True, slots=True)
class Card:
    """What planning a measurement must know of a device."""

    name: str
    cc: int
    num_sms: int
    l2_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> "Card":
        properties = torch.cuda.get_device_properties(device)
        return cls(
            properties.name,
            10 * properties.major + properties.minor,
            properties.multi_processor_count,
            properties.L2_cache_size,
        )


def rotations(nbytes: int, l2_bytes: int) -> int:
    """Copies of an operand of `nbytes` that calls must take in turn for none to find its own in the L2 cache: together
    more than twice what it holds."""
    return 2 * l2_bytes // max(nbytes, 1) + 1


def repeats(calls: int, estimate: float) -> int:
    """How often one graph goes through that many calls, each of `estimate` microseconds."""
    return max(1, min(-(-CALLS // calls), round(GRAPH_MICROSECONDS / (calls * max(estimate, 0.1)))))


def microseconds(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Median time of one call, launches included, on the current device.

    The calls are captured into one graph, again and again, in order: give one for each rotated operand. Replays are
    queued behind one another, so that the time between their events holds nothing of the host's.
    """
    for call in calls:  # compiles, and lets libraries choose, outside of the graph
        call()
    graph, rounds = torch.cuda.CUDAGraph(), repeats(len(calls), _estimate(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 3)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times: list[float] = [
        first.elapsed_time(second) for first, second in pairwise(events[1:])
    ]  # replay 0 warms up
    return statistics.median(times) * 1000 / (rounds * len(calls))


def _estimate(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call, roughly: the host's launches are in it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds * 1000 / len(calls)


def copy_bandwidth(device: torch.device, size: int = 1 << 29) -> float:
    """Bytes per second, read and written ones together, with which torch copies `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (microseconds([lambda: target.copy_(source)]) * 1e-6)
