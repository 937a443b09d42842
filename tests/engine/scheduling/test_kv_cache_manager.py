"""Block tables of several groups: what a window keeps, when a prefix is found, who is told apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.request import Request
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.kv_cache_manager import RELEASED, KVCacheManager, KVGroup

SIZE = 4


def make(*groups: KVGroup, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(groups or (KVGroup(32),), SIZE, caching)


def request(tokens: list[int], *extra_keys: bytes) -> Request:
    return Request("r", tokens, SamplingParams(), frozenset(), seed=0, extra_keys=extra_keys)


def compute(kv_cache: KVCacheManager, r: Request, chunk: int = 1000) -> Request:
    """All of its tokens, at most `chunk` a step. It holds its blocks then."""
    start = kv_cache.find_prefix(r)
    assert kv_cache.admit(r, start, min(start + chunk, r.num_tokens))
    while start < r.num_tokens:
        end = min(start + chunk, r.num_tokens)
        r.num_computed_tokens = start
        assert kv_cache.grow(r, end)
        kv_cache.commit(r, start, end)
        start = end
    r.num_computed_tokens = start
    return r


def test_a_prefix_is_found_after_free_and_never_whole() -> None:
    kv_cache = make()
    tokens = list(range(12))
    kv_cache.free(compute(kv_cache, request(tokens)))
    assert kv_cache.find_prefix(request(tokens)) == 8  # the last token is left to compute
    assert kv_cache.find_prefix(request([*tokens, 99])) == 12
    assert kv_cache.find_prefix(request([*tokens[:6], 99, *tokens[7:]])) == 4
    assert kv_cache.find_prefix(request([99, *tokens[1:]])) == 0
    assert kv_cache.num_free == 32  # looking up takes nothing


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
    kv_cache = make()
    tokens = list(range(9))
    ours = compute(kv_cache, request(tokens, b"ab", b"c"))
    assert kv_cache.find_prefix(request(tokens, b"ab", b"c")) == 8
    assert kv_cache.find_prefix(request(tokens, *others)) == 0
    theirs = compute(kv_cache, request(tokens, *others))
    assert kv_cache.find_prefix(request(tokens, *others)) == 8
    assert not set(ours.block_tables[0]) & set(theirs.block_tables[0])


def test_caching_off() -> None:
    kv_cache = make(caching=False)
    compute(kv_cache, request(list(range(9))))
    assert kv_cache.find_prefix(request(list(range(9)))) == 0


def test_a_window_keeps_what_the_next_token_sees() -> None:
    """Window 6: the token at position 12 sees 7 to 12, the one at 13 sees 8 to 13."""
    kv_cache = make(KVGroup(8), KVGroup(8, window=6))
    r = request(list(range(13)))
    assert kv_cache.admit(r, 0, 12)
    r.num_computed_tokens = 12
    assert kv_cache.grow(r, 13)
    full, windowed = r.block_tables
    assert windowed[0] == RELEASED and RELEASED not in windowed[1:] + full
    assert (len(full), len(windowed), kv_cache.num_free) == (4, 4, 4 + 5)
    r.num_computed_tokens = 13
    r.token_ids.append(1)
    assert kv_cache.grow(r, 14)
    assert windowed[:2] == [RELEASED, RELEASED] and kv_cache.num_free == 4 + 6
    kv_cache.check_integrity([r])
    kv_cache.free(r)
    kv_cache.check_integrity([])


def test_a_chunk_may_pass_many_blocks_at_once() -> None:
    kv_cache = make(KVGroup(8, window=6))
    r = request(list(range(24)))
    assert kv_cache.admit(r, 0, 20)
    r.num_computed_tokens = 20
    assert kv_cache.grow(r, 21)
    assert r.block_tables[0][:3] == [RELEASED] * 3 and kv_cache.num_free == 5
    kv_cache.check_integrity([r])


def test_nothing_is_taken_unless_every_group_has_room() -> None:
    kv_cache = make(KVGroup(8), KVGroup(3, window=4))
    long, short = request(list(range(16))), request([1])
    assert not kv_cache.admit(long, 0, 16)
    assert kv_cache.num_free == 11
    assert kv_cache.admit(
        long, 0, 12
    )  # a full group has blocks for all tokens, a window for the chunk
    assert kv_cache.num_free == 4
    assert not kv_cache.admit(short, 0, 1)
    assert kv_cache.num_free == 4
    assert not kv_cache.grow(long, 16)
    kv_cache.check_integrity([long])


def test_a_prefix_ends_where_every_window_is_whole() -> None:
    """The window's blocks were released while the prompt was computed in chunks, and taken by others."""
    kv_cache = make(KVGroup(32), KVGroup(5, window=5))
    tokens = list(range(24))
    kv_cache.free(compute(kv_cache, request(tokens), chunk=4))
    assert kv_cache.find_prefix(request([*tokens, 99])) == 24
    kv_cache.free(compute(kv_cache, request([50] * 4)))  # evicts the window's oldest block
    assert kv_cache.find_prefix(request([*tokens, 99])) == 24
    assert kv_cache.find_prefix(request([*tokens[:8], 99])) == 0
    again = request([*tokens, 99])
    assert kv_cache.admit(again, 24, 25)
    assert again.block_tables[1][:5] == [RELEASED] * 5
    kv_cache.check_integrity([again])


def test_a_prefix_that_one_group_shortens_is_looked_for_again_in_the_others() -> None:
    kv_cache = make(KVGroup(6), KVGroup(3, window=5))
    tokens = list(range(24))
    kv_cache.free(compute(kv_cache, request(tokens), chunk=4))
    other = request([50] * 16)
    assert kv_cache.admit(
        other, 0, 4
    )  # takes 4 of the 6 blocks, and one that the window does not need
    assert kv_cache.find_prefix(request([*tokens, 99])) == 0


def test_what_a_request_may_grow_to() -> None:
    assert make(KVGroup(5)).max_tokens(100, 8) == 20
    assert make(KVGroup(50)).max_tokens(100, 8) == 100
    # 5 keys before the chunk, 8 in it, wherever they begin in a block: at most 5 blocks.
    assert make(KVGroup(50), KVGroup(5, window=6)).max_tokens(100, 8) == 100
    assert make(KVGroup(50), KVGroup(4, window=6)).max_tokens(100, 8) == 16


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(KVGroup, st.integers(8, 14), st.none() | st.integers(1, 14)),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), min_size=2, max_size=6),
    st.integers(1, 12),
)
def test_a_prefix_that_is_found_is_all_there(
    groups: list[KVGroup], prompts: list[list[int]], chunk: int
) -> None:
    """Every block that the token behind it sees is the one that was committed for these tokens, and no longer prefix
    would do."""
    kv_cache = make(*groups)
    contents: list[dict[int, list[int]]] = [{} for _ in groups]  # block -> all tokens up to its end
    for prompt in prompts:
        r = request(prompt)
        names = [prompt[:end] for end in range(SIZE, len(prompt), SIZE)]
        held = [[n in of.values() for n in names] for of in _served(kv_cache, contents)]
        usable = [
            length
            for length in range(len(names) + 1)
            if all(
                all(have[_first(group, length * SIZE) : length])
                for have, group in zip(held, groups, strict=True)
            )
        ]
        found = kv_cache.find_prefix(r)
        assert found == max(usable) * SIZE
        if not kv_cache.admit(r, found, min(len(prompt), found + chunk)):
            continue
        for group, table in enumerate(r.block_tables):
            for index in range(_first(groups[group], found), found // SIZE):
                assert contents[group][table[index]] == prompt[: (index + 1) * SIZE]
        start = found
        while start < len(prompt):
            end = min(len(prompt), start + chunk)
            r.num_computed_tokens = start
            if not kv_cache.grow(r, end):
                break
            for group, table in enumerate(r.block_tables):
                for index in range(start // SIZE, end // SIZE):
                    contents[group][table[index]] = prompt[: (index + 1) * SIZE]
                for index in range(end // SIZE, len(table)):
                    contents[group].pop(table[index], None)
            kv_cache.commit(r, start, end)
            kv_cache.check_integrity([r])
            start = end
        kv_cache.free(r)
        kv_cache.check_integrity([])


def _first(group: KVGroup, num_computed: int) -> int:
    """The block of the first position that the token at num_computed sees."""
    window = group.window or num_computed + 1
    return next(p for p in range(num_computed + 1) if num_computed - p < window) // SIZE


def _served(
    kv_cache: KVCacheManager, contents: list[dict[int, list[int]]]
) -> list[dict[int, list[int]]]:
    """What of it the pools still find, by asking for each content alone."""
    found = []
    for pool, of in zip(kv_cache.pools, contents, strict=True):
        kept = {}
        for block, tokens in of.items():
            name = kv_cache._names(request(tokens))[-1]
            if name in pool:
                kept[block] = tokens
        found.append(kept)
    return found


@pytest.mark.parametrize(("states", "found"), [([4], 0), ([3, 4], 12), ([1, 10], 40), ([], 0)])
def test_a_prefix_ends_where_blocks_and_a_state_are(states: list[int], found: int) -> None:
    """Blocks of a window at 1, 2, 8 and 9 are whole for 3 blocks and for 10, not for 4, whose last is gone."""
    kv_cache = KVCacheManager([KVGroup(64), KVGroup(64, window=6)], 4, num_states=8)
    first = request(list(range(40)))
    assert kv_cache.find_prefix(first) == 0 and kv_cache.admit(first, 0, 40)
    full, windowed = first.block_tables
    names = kv_cache._names(first)
    for index, name in enumerate(names):
        kv_cache.pools[0].commit(full[index], name)
        if index in (1, 2, 8, 9):
            kv_cache.pools[1].commit(windowed[index], name)
    for count in states:
        [slot] = kv_cache.states.pool.allocate(1)
        kv_cache.states.pool.commit(slot, names[count - 1])
        kv_cache.states.pool.free([slot])
    again = request([*range(40), 99])
    assert kv_cache.find_prefix(again) == found
    assert kv_cache.admit(again, found, 41)
    kv_cache.check_integrity([first, again])
