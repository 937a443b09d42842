"""KVCacheManager: which blocks of the paged KV cache a request holds, in every group of layers.

Layers of one kind share a group: its own blocks (a BlockPool) and, for each request, its own block table.

    full attention   [ 7 | 2 | 11 | 4 ]    blocks for all the tokens that the request has
    window of W      [ - | - |  5 | 0 ]    blocks that the next token still sees, up to the end of the step's chunk;
                                           what has been passed is RELEASED, and its place in the table stays

The next token, at position c = num_computed_tokens, sees the keys of the last W positions, its own included: a block is
passed when it ends before c - W + 1. A prefix is found if every group has what the token behind it sees. Layers with a
recurrent state have no blocks but a slot for each request (state_slots.py): a prefix is found up to a snapshot only.

A full block is named by a hash that covers it and everything before it, in all groups the same:

    names[i] = sha256(names[i-1] | token ids of block i | digests of images)        names[-1] = sha256(extra keys)

so equal names mean equal tokens from the first on, and equal extra keys: what sets a request's cache apart, such as its
tenant's salt (prefix caching as in vLLM's kv_cache_utils). Tokens of images are alike whatever is to be seen, so the
block in which an image begins has its digest in the name, and all blocks behind it through that.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from ..request import Request
from .batch import ScheduledRequest
from .block_pool import BlockPool
from .state_slots import StateSlots

RELEASED = -1  # in a block table: behind the window


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables. window: the positions that a query sees, its own included; None: all."""

    num_blocks: int
    window: int | None = None


class KVCacheManager:
    """The pools of all groups. Not thread-safe: the engine loop owns it."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        block_size: int,
        enable_prefix_caching: bool = True,
        num_states: int = 0,
    ):
        """num_states: slots for the states of requests and snapshots; 0: no layer has one."""
        self.groups = tuple(groups)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pools = [BlockPool(group.num_blocks) for group in groups]
        self.states = StateSlots(num_states, block_size) if num_states else None

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for pool in self.pools)

    def max_tokens(self, limit: int, chunk: int) -> int:
        """What a request may grow to, `limit` at most, and still fit when it holds every block. `chunk`: the most
        tokens that one step computes."""
        return min(self._max_tokens(group, limit, chunk) for group in self.groups)

    def find_prefix(self, request: Request) -> int:
        """How many of its tokens every group still has, in full blocks, and the states of. Never all: the last one's
        logits are wanted."""
        if not self.enable_prefix_caching:
            return 0
        names = self._names(request)[: (request.num_tokens - 1) // self.block_size]
        count = self._num_shared(names)
        if self.states is None:
            return count * self.block_size
        request.fork = count * self.block_size
        while (with_state := self.states.longest(names[:count])) < count:
            count = self._num_shared(names[:with_state])
        return count * self.block_size

    def admit(self, request: Request, num_cached: int, end: int) -> bool:
        """Give a request that holds nothing its prefix of `num_cached` tokens and blocks for a first step up to `end`.
        False, and nothing is taken: some group has too few left."""
        count = num_cached // self.block_size
        firsts = [self._first_block(group, num_cached) for group in self.groups]
        shared = [
            [pool.cached(name) for name in request.block_hashes[first:count]]
            for pool, first in zip(self.pools, firsts, strict=True)
        ]
        with_state = self.states is not None and count > 0
        snapshot = request.block_hashes[count - 1] if with_state else None
        if self.states is not None and not self.states.can_admit(snapshot):
            return False
        missing = [self._blocks_for(group, request, end) - count for group in self.groups]
        for pool, blocks, number in zip(self.pools, shared, missing, strict=True):
            if number + pool.num_idle(blocks) > pool.num_free:
                return False
        request.block_tables = []
        for pool, first, blocks, number in zip(self.pools, firsts, shared, missing, strict=True):
            pool.share(blocks)
            request.block_tables.append([RELEASED] * first + blocks + pool.allocate(number))
        if self.states is not None:
            self.states.admit(request, snapshot)
        return True

    def grow(self, request: Request, end: int) -> bool:
        """Release what it has passed, and give it blocks for a step up to `end`. False: some group has too few left."""
        missing: list[tuple[BlockPool, list[int], int]] = []
        for group, pool, table in zip(self.groups, self.pools, request.block_tables, strict=True):
            if group.window is not None:
                self._release_passed(group, pool, table, request.num_computed_tokens)
            number = self._blocks_for(group, request, end) - len(table)
            if number > 0:
                if number > pool.num_free:
                    return False
                missing.append((pool, table, number))
        for pool, table, number in missing:
            table += pool.allocate(number)
        return True

    def begin_step(self) -> None:
        """Another step is scheduled from here on."""
        if self.states is not None:
            self.states.begin_step()

    def place_states(self, items: Sequence[ScheduledRequest]) -> None:
        """Say where the states of a step's items are read, and where snapshots of them are written."""
        if self.states is not None:
            for item in items:
                names = self._names(item.request) if self.enable_prefix_caching else []
                self.states.place(item, names, self.enable_prefix_caching)

    def settle_states(self, item: ScheduledRequest, whole: bool) -> None:
        """A step is over, its tokens are known: keep an item's snapshots if it was computed as a whole."""
        if self.states is not None and item.snapshots:
            self.states.settle(item, self._names(item.request) if whole else None)

    def commit(self, request: Request, start: int, end: int) -> None:
        """Its tokens [start, end) are known and computed: blocks that are full now may be shared."""
        full = range(start // self.block_size, end // self.block_size)
        if not full or not self.enable_prefix_caching:
            return
        names = self._names(request)
        for pool, table in zip(self.pools, request.block_tables, strict=True):
            for index in full:
                if table[index] != RELEASED:
                    pool.commit(table[index], names[index])

    def free(self, request: Request) -> None:
        """Give back all that it holds."""
        for pool, table in zip(self.pools, request.block_tables, strict=False):
            pool.free(_held(table))
        request.block_tables = []
        if self.states is not None:
            self.states.free(request)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """RuntimeError if a pool's books and these requests' block tables and slots disagree."""
        requests = list(requests)
        if self.states is not None:
            self.states.check_integrity(requests)
        tables = [request.block_tables for request in requests if request.block_tables]
        for index, pool in enumerate(self.pools):
            pool.check_integrity([_held(of_all[index]) for of_all in tables])

    def _num_shared(self, names: Sequence[bytes]) -> int:
        """The longest prefix, in blocks, of which every group has what the token behind it sees."""
        while True:
            count = min(
                self._num_cached(group, pool, names)
                for group, pool in zip(self.groups, self.pools, strict=True)
            )
            if count == len(names):
                return count
            names = names[:count]

    def _blocks_for(self, group: KVGroup, request: Request, end: int) -> int:
        tokens = request.num_tokens if group.window is None else end
        return -(-tokens // self.block_size)

    def _first_block(self, group: KVGroup, num_computed: int) -> int:
        """The first that the token behind num_computed sees something of."""
        if group.window is None:
            return 0
        return max(0, num_computed - group.window + 1) // self.block_size

    def _max_tokens(self, group: KVGroup, limit: int, chunk: int) -> int:
        capacity = group.num_blocks * self.block_size
        if group.window is None:
            return min(limit, capacity)
        # The window and the chunk begin anywhere in a block.
        needed = -(-(group.window - 1 + chunk) // self.block_size) + 1
        return limit if needed <= group.num_blocks else min(limit, capacity)

    def _num_cached(self, group: KVGroup, pool: BlockPool, names: Sequence[bytes]) -> int:
        """The longest prefix, in blocks, of which this group has all that the token behind it sees."""
        if group.window is None:
            return next((i for i, name in enumerate(names) if name not in pool), len(names))
        count = len(names)
        while True:
            first = self._first_block(group, count * self.block_size)
            seen = range(count - 1, first - 1, -1)
            gap = next((index for index in seen if names[index] not in pool), None)
            if gap is None:
                return count
            count = gap

    def _release_passed(
        self, group: KVGroup, pool: BlockPool, table: list[int], num_computed: int
    ) -> None:
        start = end = self._first_block(group, num_computed)
        while start > 0 and table[start - 1] != RELEASED:
            start -= 1
        if start < end:
            pool.free(table[start:end])
            table[start:end] = [RELEASED] * (end - start)

    def _names(self, request: Request) -> list[bytes]:
        """Of all blocks that its known tokens fill."""
        names, size = request.block_hashes, self.block_size
        for index in range(len(names), request.num_known_tokens // size):
            parent = names[-1] if names else _root(request.extra_keys)
            tokens = array("I", request.token_ids[index * size : (index + 1) * size])
            images = _beginning(request, index * size, (index + 1) * size)
            names.append(sha256(parent + tokens.tobytes() + images).digest())
        return names


def _held(table: Sequence[int]) -> list[int]:
    return [block for block in table if block != RELEASED]


def _beginning(request: Request, start: int, end: int) -> bytes:
    """Digests of the images that begin at one of these positions."""
    return b"".join(image.digest for image in request.images if start <= image.positions[0] < end)


def _root(extra_keys: Sequence[bytes]) -> bytes:
    """Each key behind its length: ("ab", "c") is not ("a", "bc")."""
    return sha256(b"".join(len(key).to_bytes(8, "little") + key for key in extra_keys)).digest()
