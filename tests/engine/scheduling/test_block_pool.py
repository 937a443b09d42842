"""The block pool against a model of it that keeps whole token prefixes instead of names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.scheduling.block_pool import BlockPool


def fill(pool: BlockPool, *names: bytes) -> list[int]:
    """Hold and commit a block for each name."""
    table = pool.allocate(len(names))
    for block, name in zip(table, names, strict=True):
        pool.commit(block, name)
    return table


def test_allocate_and_free() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    assert sorted(table) == [0, 1, 2]
    assert pool.num_free == 0
    with pytest.raises(ValueError, match="1 KV blocks asked for, 0 free"):
        pool.allocate(1)
    pool.free(table)
    pool.check_integrity()
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(table)


def test_a_committed_block_is_found_while_held_and_after_it_is_freed() -> None:
    pool = BlockPool(8)
    table = fill(pool, b"a", b"b")
    assert [pool.cached(b"a"), pool.cached(b"b")] == table and b"c" not in pool
    pool.free(table)
    assert [pool.cached(b"a"), pool.cached(b"b")] == table
    assert pool.num_free == 8  # looking up takes nothing
    with pytest.raises(KeyError):
        pool.cached(b"c")


def test_shared_blocks_are_freed_by_the_last_holder() -> None:
    pool = BlockPool(2)
    table = fill(pool, b"a", b"b")
    assert pool.num_idle(table) == 0
    pool.share(table)
    pool.free(table)
    assert pool.num_free == 0
    pool.check_integrity([table])
    pool.free(table)
    assert pool.num_idle(table) == 2
    pool.check_integrity()


def test_eviction_takes_empty_blocks_first_then_the_oldest_chain_from_its_tail() -> None:
    pool = BlockPool(6)
    old, new = fill(pool, b"a", b"b"), fill(pool, b"x", b"y")
    pool.free(old)
    pool.free(new)
    empty = [block for block in range(6) if block not in old + new]
    assert sorted(pool.allocate(2)) == sorted(empty)
    assert pool.allocate(2) == [old[1], old[0]]
    assert b"a" not in pool and b"b" not in pool
    assert [pool.cached(b"x"), pool.cached(b"y")] == new


def test_a_twin_takes_over_when_the_serving_block_is_gone() -> None:
    pool = BlockPool(2)
    first, twin = fill(pool, b"a"), fill(pool, b"a")
    assert [pool.cached(b"a")] == first
    pool.free(first)
    evicted = pool.allocate(1)
    assert evicted == first
    pool.free(twin)
    assert [pool.cached(b"a")] == twin
    pool.check_integrity([evicted])


@pytest.mark.parametrize("table", [[[0, 1, 2]], [[0, 1], [1]], []])
def test_check_integrity_sees_wrong_tables(table: list[list[int]]) -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    pool.check_integrity([held])
    with pytest.raises(RuntimeError, match="KV block"):
        pool.check_integrity(table)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 5)), max_size=40))
def test_random_use_keeps_every_invariant(steps: list[tuple[int, int, int]]) -> None:
    """Prefixes that collide often; contents are tracked as whole prefixes."""
    pool = BlockPool(7)
    contents: dict[int, bytes] = {}  # block -> everything up to its end
    tables: list[list[int]] = []
    for kind, branch, depth in steps:
        if kind == 0 and tables:
            pool.free(tables.pop(branch % len(tables)))
        else:
            whole = bytes(level * (branch % 2 if level else branch) for level in range(depth))
            names = [whole[: length + 1] for length in range(depth)]
            known = next((i for i, name in enumerate(names) if name not in pool), depth)
            matched = [pool.cached(name) for name in names[:known]]
            for block, name in zip(matched, names, strict=False):
                assert contents[block] == name
            if depth - known + pool.num_idle(matched) > pool.num_free:
                continue
            pool.share(matched)
            table = matched + pool.allocate(depth - known)
            for block, name in list(zip(table, names, strict=True))[known:]:
                pool.commit(block, name)
                contents[block] = name
            tables.append(table)
        pool.check_integrity(tables)
