"""BlockPool: who holds which block of one group's KV cache, and which blocks still hold a prefix worth keeping.

A block is block_size consecutive tokens' keys and values, named by its index. At any moment it is in one of two places:

    held    refs[b] >= 1   in the block tables of `refs[b]` requests; a shared prefix is held by several
    free    refs[b] == 0   in the free list, taken from the left:

              oldest                                                newest
            [ no content | no content | cached, evicted first | ... | cached, evicted last ]

A block filled with computed tokens has a name, which covers it and everything before it (see kv_cache_manager.py). The
pool maps a name to the one block that serves it; that block may be held or free, and a free one can be taken back
without computing anything. Two requests that computed the same prefix at the same time have two blocks of one name: the
first serves, the second loses its content when it is freed. A table is freed from its tail, so that a chain is evicted
before the prefix it hangs on.

Every operation is O(1) for each block it touches.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks 0 .. num_blocks - 1. Not thread-safe: the engine loop owns it."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take n blocks, evicting cached prefixes, least recently used first. ValueError if fewer are free."""
        if n > len(self._free):
            raise ValueError(f"{n} KV blocks asked for, {len(self._free)} free")
        return [self._take_oldest() for _ in range(n)]

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a block table, given in table order."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"KV block {block} freed twice")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._release(block)

    def __contains__(self, name: bytes) -> bool:
        return name in self._cached

    def cached(self, name: bytes) -> int:
        """The block that serves this name. KeyError if none does. It is not referenced yet: see `share`."""
        return self._cached[name]

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `share` would take out of the free list."""
        return sum(self._refs[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of these blocks, all of them cached or held."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def commit(self, block: int, name: bytes) -> None:
        """This block is full and computed now: it may be found by its name. One that has a name keeps it."""
        if self._names[block] is None:
            self._names[block] = name
            self._cached.setdefault(name, block)

    def demote(self, block: int) -> None:
        """Its content is worth less than any other's: where it is free, it is taken next."""
        if self._refs[block] == 0:
            self._free.move_to_end(block, last=False)

    def check_integrity(self, block_tables: Iterable[Sequence[int]] = ()) -> None:
        """Verify every invariant above, given all block tables in use (none: the pool must be wholly free).

        RuntimeError names the first block that breaks one.
        """
        expected = Counter(block for table in block_tables for block in table)
        for block, refs in enumerate(self._refs):
            name = self._names[block]
            serves = name is not None and self._cached.get(name) == block
            if refs != expected[block]:
                raise RuntimeError(
                    f"KV block {block}: {refs} references, but it is in {expected[block]} block tables"
                )
            if (refs == 0) != (block in self._free):
                raise RuntimeError(
                    f"KV block {block}: {refs} references and {'' if refs else 'not '}in the free list"
                )
            if refs == 0 and name is not None and not serves:
                raise RuntimeError(
                    f"KV block {block}: free, and keeps a name that another block serves"
                )
        if len(self._free) + sum(refs > 0 for refs in self._refs) != self.num_blocks:
            raise RuntimeError("the free list names a block that does not exist")
        for name, block in self._cached.items():
            if self._names[block] != name:
                raise RuntimeError(f"KV block {block}: served under a name it does not have")

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        name = self._names[block]
        if name is not None:
            del self._cached[name]
            self._names[block] = None
        self._refs[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._free[block] = None
        name = self._names[block]
        if name is None or self._cached.setdefault(name, block) != block:
            self._names[block] = None
            self._free.move_to_end(block, last=False)
