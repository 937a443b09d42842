"""The block pool against a model of it that keeps whole token prefixes instead of hashes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.scheduling.block_pool import BlockPool

SIZE = 4


def fill(pool: BlockPool, token_ids: list[int], extra_keys: tuple[bytes, ...] = ()) -> list[int]:
    """Hold and commit blocks for all full blocks of token_ids."""
    table = pool.allocate(len(token_ids) // SIZE)
    for index in range(len(table)):
        pool.commit(table, index, token_ids[index * SIZE : (index + 1) * SIZE], extra_keys)
    return table


def test_allocate_and_free() -> None:
    pool = BlockPool(3, SIZE)
    table = pool.allocate(3)
    assert sorted(table) == [0, 1, 2]
    assert pool.num_free == 0
    with pytest.raises(ValueError, match="1 KV blocks asked for, 0 free"):
        pool.allocate(1)
    pool.free(table)
    pool.check_integrity()
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(table)


def test_prefix_is_found_after_free_and_never_whole() -> None:
    pool = BlockPool(8, SIZE)
    tokens = list(range(12))
    table = fill(pool, tokens)
    pool.free(table)
    assert pool.match_prefix(tokens) == table[:2]  # the last token is left to compute
    assert pool.match_prefix([*tokens, 99]) == table
    assert pool.match_prefix([*tokens[:6], 99, *tokens[7:]]) == table[:1]
    assert pool.match_prefix([99, *tokens[1:]]) == []
    assert pool.num_free == 8  # looking up takes nothing


@pytest.mark.parametrize(
    "others",
    [
        (),
        (b"",),
        (b"abc",),
        (b"a", b"bc"),
        (b"c", b"ab"),
        (b"ab",),
        (b"ab", b"c", b""),
        (b"b", b"c"),
    ],
)
def test_only_equal_extra_keys_share(others: tuple[bytes, ...]) -> None:
    pool = BlockPool(8, SIZE)
    table = fill(pool, list(range(8)), (b"ab", b"c"))
    assert pool.match_prefix(list(range(9)), (b"ab", b"c")) == table
    assert pool.match_prefix(list(range(9)), others) == []
    theirs = fill(pool, list(range(8)), others)
    assert pool.match_prefix(list(range(9)), others) == theirs
    assert pool.match_prefix(list(range(9)), (b"ab", b"c")) == table


def test_caching_off() -> None:
    pool = BlockPool(8, SIZE, enable_prefix_caching=False)
    fill(pool, list(range(8)))
    assert pool.match_prefix(list(range(9))) == []


def test_shared_blocks_are_freed_by_the_last_holder() -> None:
    pool = BlockPool(2, SIZE)
    table = fill(pool, list(range(8)))
    matched = pool.match_prefix(list(range(9)))
    assert pool.num_idle(matched) == 0
    pool.share(matched)
    pool.free(table)
    assert pool.num_free == 0
    pool.check_integrity([matched])
    pool.free(matched)
    assert pool.num_idle(matched) == 2
    pool.check_integrity()


def test_eviction_takes_empty_blocks_first_then_the_oldest_chain_from_its_tail() -> None:
    pool = BlockPool(6, SIZE)
    old, new = fill(pool, list(range(8))), fill(pool, list(range(100, 108)))
    pool.free(old)
    pool.free(new)
    empty = [block for block in range(6) if block not in old + new]
    assert sorted(pool.allocate(2)) == sorted(empty)
    assert pool.allocate(2) == [old[1], old[0]]
    assert pool.match_prefix(list(range(9))) == []
    assert pool.match_prefix(list(range(100, 109))) == new


def test_a_twin_takes_over_when_the_serving_block_is_gone() -> None:
    pool = BlockPool(2, SIZE)
    first, twin = fill(pool, [1, 2, 3, 4]), fill(pool, [1, 2, 3, 4])
    pool.free(first)
    evicted = pool.allocate(1)
    assert evicted == first
    pool.free(twin)
    assert pool.match_prefix([1, 2, 3, 4, 5]) == twin
    pool.check_integrity([evicted])


def test_commit_out_of_order_is_refused() -> None:
    pool = BlockPool(4, SIZE)
    table = pool.allocate(2)
    with pytest.raises(ValueError, match="out of order"):
        pool.commit(table, 1, [1, 2, 3, 4])


@pytest.mark.parametrize("table", [[[0, 1, 2]], [[0, 1], [1]], []])
def test_check_integrity_sees_wrong_tables(table: list[list[int]]) -> None:
    pool = BlockPool(4, SIZE)
    held = pool.allocate(2)
    pool.check_integrity([held])
    with pytest.raises(RuntimeError, match="KV block"):
        pool.check_integrity(table)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 5)), max_size=40))
def test_random_use_keeps_every_invariant(steps: list[tuple[int, int, int]]) -> None:
    """Prefixes from a tiny alphabet, so that they collide often; contents are tracked as whole prefixes."""
    pool = BlockPool(7, SIZE)
    contents: dict[int, tuple[int, ...]] = {}  # block -> every token up to its end
    tables: list[list[int]] = []
    for kind, branch, depth in steps:
        if kind == 0 and tables:
            pool.free(tables.pop(branch % len(tables)))
        else:
            tokens = [
                t
                for level in range(depth)
                for t in [level * (branch % 2 if level else branch)] * SIZE
            ]
            matched = pool.match_prefix([*tokens, 0])
            for index, block in enumerate(matched):
                assert contents[block] == tuple(tokens[: (index + 1) * SIZE])
            if depth - len(matched) + pool.num_idle(matched) > pool.num_free:
                continue
            pool.share(matched)
            table = matched + pool.allocate(depth - len(matched))
            for index in range(len(matched), depth):
                pool.commit(table, index, tokens[index * SIZE : (index + 1) * SIZE])
                contents[table[index]] = tuple(tokens[: (index + 1) * SIZE])
            tables.append(table)
        pool.check_integrity(tables)
