"""StateSlots: who holds which slot of recurrent state, and which slots keep a snapshot that a prompt may go on from.

A slot has the state of all recurrent layers after some prefix of a request. It is one of a pool's blocks
(block_pool.py), so a free one may still be found by its name, least recently used out:

    a running request   one slot, overwritten with every step
    a snapshot          written once, inside a step, at a block boundary: named by the hash of the blocks up to there;
                        free from then on, until a request reads it or another takes the slot

A state cannot be cut back, so snapshots stand where prompts may part or go on: at the last boundary before the end of a
prompt (a repeated one needs its last token's logits), at the last of each chunk, at each of an answer (a step goes
through the whole state anyway, so one copy in so many steps is cheap), and where a prompt leaves one whose keys and
values are still there though no state is. The newest of a chunk or an answer takes the slot of the one before, so that
a long text pushes out none of the others.
"""

from collections.abc import Iterable, Sequence

from ..request import Request
from .batch import ScheduledRequest
from .block_pool import BlockPool


class StateSlots:
    """The slots 0 .. num_slots - 1. Not thread-safe: the engine loop owns it."""

    def __init__(self, num_slots: int, block_size: int):
        """num_slots: at least 2, for a request and the snapshot that it goes on from."""
        if num_slots < 2:
            raise ValueError(f"{num_slots} slots for states, at least 2 are needed")
        self.block_size = block_size
        self.pool = BlockPool(num_slots)
        self._read: list[int] = []  # snapshots that the last scheduled step goes on from
        self._written: list[int] = []  # slots of snapshots that steps under way write

    def longest(self, names: Sequence[bytes]) -> int:
        """The most blocks after which there is a snapshot."""
        return next((i for i in range(len(names), 0, -1) if names[i - 1] in self.pool), 0)

    def can_admit(self, snapshot: bytes | None) -> bool:
        """Whether there is a slot for a request that goes on from this snapshot, or from nothing."""
        source = [] if snapshot is None else [self.pool.cached(snapshot)]
        return self.pool.num_free > self.pool.num_idle(source)

    def admit(self, request: Request, snapshot: bytes | None) -> None:
        """Give it a slot. What it goes on from is held until the step that reads it has been scheduled."""
        if snapshot is not None:
            request.state_from = self.pool.cached(snapshot)
            self.pool.share([request.state_from])
            self._read.append(request.state_from)
        [request.state_slot] = self.pool.allocate(1)

    def begin_step(self) -> None:
        """What the last step reads may be overwritten by the next."""
        self.pool.free(self._read)
        self._read = []

    def place(self, item: ScheduledRequest, names: Sequence[bytes], snapshots: bool) -> None:
        """Say where a scheduled item's state comes from and where snapshots of it go, as far as slots are free. names:
        of the blocks that the request's known tokens fill."""
        request = item.request
        item.state_from, request.state_from = request.state_from, None
        for position in self._positions(item) if snapshots else ():
            index = position // self.block_size - 1
            if index < len(names) and names[index] in self.pool:
                self._refresh(names[index])
                continue
            self._give_up_passing(request)
            if self.pool.num_free:
                [slot] = self.pool.allocate(1)
                self._written.append(slot)
                item.snapshots.append((position, slot))

    def settle(self, item: ScheduledRequest, names: Sequence[bytes] | None) -> None:
        """A step is over: name its snapshots, or forget them where names is None."""
        for position, slot in item.snapshots:
            if names is not None:
                name = names[position // self.block_size - 1]
                self.pool.commit(slot, name)
                if not self._stays(item.request, position):
                    item.request.passing_snapshot = name
            self._written.remove(slot)
            self.pool.free([slot])
        item.snapshots = []

    def free(self, request: Request) -> None:
        """Take its slot back."""
        if request.state_slot is not None:
            self.pool.free([request.state_slot])
        request.state_slot = None

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """RuntimeError if the pool's books and these requests' slots disagree."""
        held = [[r.state_slot] for r in requests if r.state_slot is not None]
        self.pool.check_integrity([*held, self._read, self._written])

    def _positions(self, item: ScheduledRequest) -> list[int]:
        """Where snapshots of an item's states are wanted, in order."""
        request, last = item.request, item.end
        if last == request.num_prompt_tokens:
            last -= 1
        last -= last % self.block_size
        return sorted({p for p in (request.fork, last) if item.start < p <= item.end})

    def _stays(self, request: Request, position: int) -> bool:
        end_of_prompt = (request.num_prompt_tokens - 1) // self.block_size * self.block_size
        return position in (request.fork, end_of_prompt)

    def _give_up_passing(self, request: Request) -> None:
        """Its newest within a chunk or an answer is the next that is overwritten, unless somebody reads it."""
        name, request.passing_snapshot = request.passing_snapshot, None
        if name is not None and name in self.pool:
            self.pool.demote(self.pool.cached(name))

    def _refresh(self, name: bytes) -> None:
        slot = [self.pool.cached(name)]
        self.pool.share(slot)
        self.pool.free(slot)
