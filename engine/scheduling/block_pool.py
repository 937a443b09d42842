"""BlockPool: who holds which block of the paged KV cache, and which blocks still hold a prefix worth keeping.

A block is block_size consecutive tokens' keys and values, named by its index. At any moment it is in one of two places:

    held    refs[b] >= 1   in the block tables of `refs[b]` requests; a shared prefix is held by several
    free    refs[b] == 0   in the free list, taken from the left:

              oldest                                                newest
            [ no content | no content | cached, evicted first | ... | cached, evicted last ]

A block filled with computed tokens is named by a hash that covers it and everything before it:

    hashes[b_i] = sha256(hashes[b_i-1] | token ids of block i)        hashes[b_-1] = sha256(extra keys)

so equal hashes mean equal tokens from the first on, and equal extra keys: what sets a request's cache apart, such as
its tenant's salt. `cached` maps a hash to the one block that serves it; that block may be held or free, and a free
one can be taken back without computing anything. Two requests that computed the same prefix at the same time have two
blocks of one hash: the first serves, the second loses its content when it is freed. A table is freed from its tail,
so that a chain is evicted before the prefix it hangs on.

Every operation is O(1) for each block it touches (prefix caching as in vLLM's kv_cache_utils).
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


class BlockPool:
    """The blocks 0 .. num_blocks - 1 of block_size tokens each. Not thread-safe: the engine loop owns it."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when one request holds every block."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

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

    def match_prefix(self, token_ids: Sequence[int], extra_keys: Sequence[bytes] = ()) -> list[int]:
        """The cached blocks of the longest known prefix, none of them referenced yet (see `share`).

        Never the whole of `token_ids`: the last token is left to compute, for its logits are wanted.
        """
        matched: list[int] = []
        if not self.enable_prefix_caching:
            return matched
        parent = _root(extra_keys)
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            parent = _chain(parent, token_ids[start : start + self.block_size])
            block = self._cached.get(parent)
            if block is None:
                break
            matched.append(block)
        return matched

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `share` would take out of the free list."""
        return sum(self._refs[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of these blocks, as returned by `match_prefix`."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def commit(
        self,
        block_table: Sequence[int],
        index: int,
        token_ids: Sequence[int],
        extra_keys: Sequence[bytes] = (),
    ) -> None:
        """Block `index` of this table is now full and computed; `token_ids` are its own block_size tokens.

        The blocks before it must have been committed (or matched) already: they carry the hash to chain from.
        """
        if not self.enable_prefix_caching:
            return
        parent = self._hashes[block_table[index - 1]] if index else _root(extra_keys)
        if parent is None or len(token_ids) != self.block_size:
            raise ValueError(f"block {index} of the table is committed out of order or not full")
        block = block_table[index]
        if self._hashes[block] is None:
            self._hashes[block] = name = _chain(parent, token_ids)
            self._cached.setdefault(name, block)

    def check_integrity(self, block_tables: Iterable[Sequence[int]] = ()) -> None:
        """Verify every invariant above, given all block tables in use (none: the pool must be wholly free).

        RuntimeError names the first block that breaks one.
        """
        expected = Counter(block for table in block_tables for block in table)
        for block, refs in enumerate(self._refs):
            name = self._hashes[block]
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
                    f"KV block {block}: free, and keeps a hash that another block serves"
                )
        if len(self._free) + sum(refs > 0 for refs in self._refs) != self.num_blocks:
            raise RuntimeError("the free list names a block that does not exist")
        for name, block in self._cached.items():
            if self._hashes[block] != name:
                raise RuntimeError(f"KV block {block}: served under a hash it does not have")

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        name = self._hashes[block]
        if name is not None:
            del self._cached[name]
            self._hashes[block] = None
        self._refs[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._free[block] = None
        name = self._hashes[block]
        if name is None or self._cached.setdefault(name, block) != block:
            self._hashes[block] = None
            self._free.move_to_end(block, last=False)


def _root(extra_keys: Sequence[bytes]) -> bytes:
    """Each key behind its length: ("ab", "c") is not ("a", "bc")."""
    return sha256(b"".join(len(key).to_bytes(8, "little") + key for key in extra_keys)).digest()


def _chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return sha256(parent + array("I", token_ids).tobytes()).digest()
