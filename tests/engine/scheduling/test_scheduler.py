"""The scheduler with a runner that sees only the blocks it is given: however a request is batched, chunked, preempted
or found in the prefix cache, its tokens are those of a plain loop over the whole history."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.messages import RequestOutput
from nibble.engine.request import UNKNOWN, Request, Status
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.kv_cache_manager import KVCacheManager, KVGroup
from nibble.engine.scheduling.scheduler import Scheduler

from ..fakes import EOS, FakeRunner, OverlappingRunner, next_token


class Bench:
    """A scheduler, a runner, and everything that came out."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        caching: bool = True,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 64,
        overlap: bool = False,
        max_new_tokens: int = 1,
        windows: Sequence[KVGroup] = (),
        num_states: int = 0,
        rope_switch: int | None = None,
    ):
        self.runner = (OverlappingRunner if overlap else FakeRunner)(
            num_blocks,
            block_size,
            max_model_len,
            max_new_tokens=max_new_tokens,
            windows=windows,
            num_states=num_states,
            rope_switch=rope_switch,
        )
        self.pending = None  # with overlap: the batch before, and its result
        self.kv_cache = KVCacheManager(self.runner.kv_groups, block_size, caching, num_states)
        self.scheduler = Scheduler(
            self.kv_cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            rope_switch=rope_switch,
        )
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.requests: dict[str, Request] = {}

    def add(
        self, request_id: str, prompt: list[int], extra_keys: tuple[bytes, ...] = (), **params
    ) -> Request:
        params = SamplingParams(**{"ignore_eos": True, **params})
        request = Request(
            request_id, prompt, params, frozenset({EOS}), seed=0, extra_keys=extra_keys
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self) -> bool:
        batch, before = self.scheduler.schedule(), self.pending
        if batch is None and before is None:
            return False
        self.pending = None
        if batch is not None:
            assert 0 < batch.num_tokens <= self.scheduler.max_num_batched_tokens
            assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
            result = self.runner.execute(batch)
            self.scheduler.launched(batch)
            if isinstance(self.runner, OverlappingRunner):
                self.pending = batch, result.result()
            else:
                before = batch, result
        for output in self.scheduler.update(*before) if before else []:
            assert output.token_ids or output.finish_reason
            self.outputs.setdefault(output.request_id, []).append(output)
        self.scheduler.check_integrity()
        return True

    def run(self) -> None:
        for _ in range(5000):
            if not self.step():
                assert not self.scheduler.has_work
                self.kv_cache.check_integrity([])  # every block is free
                return
        raise AssertionError("livelock")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def logprobs(self, request_id: str) -> list[int]:
        """The tokens that they are of, for a request that asked for them."""
        outputs = self.outputs[request_id]
        return [entry.token_id for output in outputs for entry in output.logprobs or []]

    def prompt_logprobs(self, request_id: str) -> list[list[int | None]]:
        """Each time that they were sent: the tokens that they are of."""
        sent = [output.prompt_logprobs for output in self.outputs[request_id]]
        return [[entry and entry.token_id for entry in entries] for entries in sent if entries]

    def finish_reason(self, request_id: str) -> str | None:
        return self.outputs[request_id][-1].finish_reason


def solo(prompt: list[int], n: int) -> list[int]:
    """What a plain loop without any engine generates."""
    history = list(prompt)
    for _ in range(n):
        history.append(next_token(history))
    return history[len(prompt) :]


def test_long_prompt_is_chunked_and_decodes_go_on_meanwhile() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", [1, 2, 3], max_tokens=8)
    bench.step()
    bench.add("b", list(range(20)), max_tokens=4)
    bench.run()
    assert bench.runner.batches[1] == [("a", 3, 4), ("b", 0, 7)]
    assert bench.runner.batches[2] == [("a", 4, 5), ("b", 7, 14)]
    assert bench.runner.batches[3] == [("a", 5, 6), ("b", 14, 20)]
    assert bench.tokens("a") == solo([1, 2, 3], 8)
    assert bench.tokens("b") == solo(list(range(20)), 4)


def test_first_come_first_served_under_max_num_seqs() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, [ord(name)], max_tokens=3)
    bench.step()
    assert [r.request_id for r in bench.scheduler.running] == ["a", "b"]
    bench.run()
    assert {name: bench.tokens(name) for name in "abc"} == {n: solo([ord(n)], 3) for n in "abc"}


def test_the_least_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    bench = Bench(max_num_seqs=2)
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5), ("f", -1)):
        bench.add(name, [ord(name)], max_tokens=3, priority=priority)
    order: list[str] = []
    while bench.step():
        order += [r.request_id for r in bench.scheduler.running if r.request_id not in order]
    assert order == ["d", "f", "a", "c", "b", "e"]


def test_nobody_is_preempted_for_one_that_waits_but_for_one_before_it_that_runs() -> None:
    bench = Bench(num_blocks=6, caching=False)
    bench.add("old", [1, 2, 3], max_tokens=12, priority=3)
    bench.step()
    for name in ("urgent", "other"):
        bench.add(name, [7, 8, 9], max_tokens=12, priority=-3)
    bench.step()
    assert [r.request_id for r in bench.scheduler.running] == ["urgent", "other", "old"]
    bench.run()
    assert [bench.requests[name].num_preemptions > 0 for name in ("urgent", "old")] == [False, True]
    assert bench.tokens("old") == solo([1, 2, 3], 12)
    assert bench.tokens("urgent") == bench.tokens("other") == solo([7, 8, 9], 12)


def test_preemption_takes_the_youngest_and_changes_no_token() -> None:
    bench = Bench(num_blocks=6, caching=False)
    for i in range(4):
        bench.add(str(i), [i, i + 1, i + 2], max_tokens=12)
    bench.run()
    assert bench.scheduler.stats().num_preemptions > 0
    assert bench.requests["0"].num_preemptions == 0
    for i in range(4):
        assert bench.tokens(str(i)) == solo([i, i + 1, i + 2], 12)


def test_what_a_preempted_request_finds_again_is_not_counted_as_cached() -> None:
    bench = Bench(num_blocks=6)
    for i in range(3):
        bench.add(str(i), [i, i + 1, i + 2], max_tokens=8)
    bench.run()
    stats = bench.scheduler.stats()
    assert stats.num_preemptions > 0
    assert (stats.prefix_queries, stats.prefix_hits) == (9, 0)
    assert {output.num_cached_tokens for i in range(3) for output in bench.outputs[str(i)]} == {0}


def test_prefix_is_computed_once() -> None:
    bench = Bench()
    prompt = list(range(14))
    bench.add("a", prompt, max_tokens=2)
    bench.run()
    bench.add("b", prompt, max_tokens=2)
    bench.add("other tenant", prompt, extra_keys=(b"x",), max_tokens=2)
    bench.run()
    assert [bench.requests[r].num_cached_tokens for r in ("a", "b", "other tenant")] == [0, 12, 0]
    assert bench.outputs["b"][0].num_cached_tokens == 12
    assert bench.tokens("a") == bench.tokens("b") == bench.tokens("other tenant") == solo(prompt, 2)
    stats = bench.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (42, 12)


def test_prompt_logprobs_cover_the_prompt_in_spite_of_chunks_cache_and_preemption() -> None:
    bench = Bench(num_blocks=8, max_num_batched_tokens=5)
    prompt = list(range(12))
    bench.add("warm", prompt, max_tokens=1)
    bench.run()
    bench.add("old", [50], max_tokens=24)
    bench.step()
    bench.add("scored", prompt, max_tokens=16, prompt_logprobs=0, logprobs=0)
    bench.run()
    assert bench.prompt_logprobs("scored") == [[None, *prompt[1:]]]
    assert bench.logprobs("scored") == bench.tokens("scored") == solo(prompt, 16)
    assert bench.requests["scored"].num_preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_window_needs_blocks_for_itself_and_a_chunk_only(overlap: bool) -> None:
    bench = Bench(max_num_batched_tokens=8, windows=[KVGroup(5, window=6)], overlap=overlap)
    prompts = [list(range(40)), list(range(100, 130))]
    for i, prompt in enumerate(prompts):
        bench.add(str(i), prompt, max_tokens=10)
    bench.run()
    for i, prompt in enumerate(prompts):
        assert bench.tokens(str(i)) == solo(prompt, 10)


def turns(bench: Bench, count: int, ask: int, answer: int) -> list[Request]:
    """A conversation: each prompt is the last one, its answer, and `ask` more tokens."""
    history, requests = [], []
    for turn in range(count):
        prompt = history + [100 + turn] * ask
        requests.append(bench.add(str(turn), prompt, max_tokens=answer))
        bench.run()
        assert bench.tokens(str(turn)) == solo(prompt, answer)
        history = requests[-1].token_ids
    return requests


@pytest.mark.parametrize("overlap", [False, True])
def test_turns_of_a_conversation_go_on_from_snapshots(overlap: bool) -> None:
    bench = Bench(128, max_model_len=400, num_states=4, max_num_batched_tokens=64, overlap=overlap)
    for before, turn in itertools.pairwise(turns(bench, 10, ask=5, answer=30)):
        assert turn.num_cached_tokens == (before.num_tokens - 1) // 4 * 4


def test_a_prompt_goes_on_where_another_parted_from_it_once_it_has_been_there() -> None:
    """The state where they part is not kept by the first; the second computes all, and leaves it to the third."""
    bench = Bench(num_states=8, max_num_batched_tokens=40)
    for name in "abc":
        prompt = list(range(18)) + [ord(name)] * 9
        bench.add(name, prompt, max_tokens=1)
        bench.run()
        assert bench.tokens(name) == solo(prompt, 1)
    assert [bench.requests[name].num_cached_tokens for name in "abc"] == [0, 0, 16]


def test_a_prompt_that_is_repeated_computes_its_last_block_only() -> None:
    bench = Bench(num_states=3, max_num_batched_tokens=40)
    for name in "ab":
        bench.add(name, list(range(20)), max_tokens=9)  # an answer of more than a block
        bench.run()
    assert bench.requests["b"].num_cached_tokens == 16


@pytest.mark.parametrize(("again", "new", "found"), [("x", "", "y"), ("y", "z", "y")])
def test_what_is_computed_again_has_one_snapshot_and_it_is_new(
    again: str, new: str, found: str
) -> None:
    """Prompts that are scored are computed whole."""
    bench = Bench(256, num_states=3, max_num_batched_tokens=40)  # one to compute in, two are kept
    for name in ("y", "x", again + again, *new):
        scored = {"prompt_logprobs": 0} if name == again + again else {}
        bench.add(name, [ord(name[0])] * 20, max_tokens=1, **scored)
        bench.run()
    bench.add("probe", [ord(found)] * 20, max_tokens=1)
    bench.run()
    assert bench.requests["probe"].num_cached_tokens == 16


def test_a_long_answer_does_not_push_out_the_snapshots_of_prompts() -> None:
    bench = Bench(256, num_states=4, max_model_len=400, max_num_batched_tokens=40)
    bench.add("first", list(range(20)), max_tokens=1)
    bench.run()
    bench.add("talks", list(range(100, 120)), max_tokens=300)
    bench.run()
    bench.add("again", list(range(20)), max_tokens=1)
    bench.run()
    assert bench.requests["again"].num_cached_tokens == 16


def test_snapshots_go_least_recently_used_first() -> None:
    bench = Bench(256, num_states=4, max_num_batched_tokens=40)  # one to compute in, three are kept
    prompts = [[i] * 20 for i in range(4)]
    for i in (0, 1, 2, 0, 3):
        bench.add(f"{i}", prompts[i], max_tokens=1)
        bench.run()
    for i, found in ((1, 0), (3, 16), (0, 16)):
        bench.add(f"again {i}", prompts[i], max_tokens=1)
        bench.run()
        assert bench.requests[f"again {i}"].num_cached_tokens == found


@pytest.mark.parametrize("overlap", [False, True])
def test_what_failed_leaves_no_snapshot(overlap: bool) -> None:
    bench = Bench(num_states=4, max_num_batched_tokens=40, overlap=overlap)
    bench.runner.nan_ids.add("bad")
    for name in ("bad", "good"):
        bench.add(name, list(range(20)), max_tokens=3)
        bench.run()
    assert bench.requests["good"].num_cached_tokens == 0
    assert bench.tokens("good") == solo(list(range(20)), 3)


def test_no_more_run_than_there_are_states() -> None:
    bench = Bench(num_states=3)
    for i in range(5):
        bench.add(str(i), [i], max_tokens=4)
    bench.step()
    assert len(bench.scheduler.running) == 3
    bench.run()
    assert all(bench.tokens(str(i)) == solo([i], 4) for i in range(5))


def test_what_can_never_fit_is_refused_at_once() -> None:
    bench = Bench(num_blocks=3, max_model_len=1000)
    with pytest.raises(ValueError, match="12 tokens has no room"):
        bench.add("a", list(range(12)))
    with pytest.raises(ValueError, match="empty"):
        bench.add("b", [])
    bench.add("c", list(range(11)), max_tokens=50)
    with pytest.raises(ValueError, match="already in use"):
        bench.add("c", [1])
    bench.run()
    assert bench.finish_reason("c") == "length"
    assert len(bench.tokens("c")) == 1


def test_context_end_stops_a_request() -> None:
    bench = Bench(max_model_len=10)
    bench.add("a", [1, 2, 3, 4], max_tokens=50)
    bench.run()
    assert bench.finish_reason("a") == "length"
    assert bench.tokens("a") == solo([1, 2, 3, 4], 6)


def prompt_that_ends_in_eos(after: int) -> list[int]:
    """A prompt whose solo run produces EOS as output number `after`, and not before."""
    return next(
        [start, 0]
        for start in range(10**6)
        if EOS in (run := solo([start, 0], after)) and run.index(EOS) == after - 1
    )


@pytest.mark.parametrize(("budget", "overlap"), [(5, False), (5, True), (16, True)])
def test_prompt_logprobs_of_a_request_preempted_in_the_middle(budget: int, overlap: bool) -> None:
    """Of its prompt, or where its last chunk is computed but not taken in."""
    bench = Bench(num_blocks=5, max_num_batched_tokens=budget, overlap=overlap)
    bench.add("old", [50, 51, 52], max_tokens=8)
    bench.add("scored", list(range(16)), max_tokens=1, prompt_logprobs=0)
    bench.step()
    bench.step()  # then "old" needs a second block
    bench.run()
    assert bench.requests["scored"].num_preemptions == 1
    assert bench.prompt_logprobs("scored") == [[None, *range(1, 16)]]
    assert bench.tokens("scored") == solo(list(range(16)), 1)


def test_a_step_may_give_several_tokens() -> None:
    """Their keys are computed but for the last one's: blocks that they fill are cached, and they are computed once."""
    bench = Bench(block_size=16, max_new_tokens=6)
    request = bench.add("a", [3, 1, 2], max_tokens=40, logprobs=0)
    while bench.step():
        if not request.is_finished:
            assert request.num_tokens - request.num_computed_tokens == 1
            assert UNKNOWN not in request.token_ids
    assert bench.tokens("a") == bench.logprobs("a") == solo([3, 1, 2], 40)
    assert max(len(output.token_ids) for output in bench.outputs["a"]) > 1
    assert sum(end - start for ((_, start, end),) in bench.runner.batches) < 43
    again = bench.add("again", request.token_ids, max_tokens=1)
    bench.step()
    assert again.num_cached_tokens == 32


@pytest.mark.parametrize("max_new_tokens", [1, 6])
@pytest.mark.parametrize("overlap", [False, True])
def test_eos_stop_ids_and_min_tokens(overlap: bool, max_new_tokens: int) -> None:
    prompt = prompt_that_ends_in_eos(3)
    run = solo(prompt, 6)
    cases = {
        "eos": ({"ignore_eos": False}, run[:3], "stop", None),
        "ignored": ({"ignore_eos": True}, run, "length", None),
        "min": ({"ignore_eos": False, "min_tokens": 4}, run, "length", None),
        "min met": ({"ignore_eos": False, "min_tokens": 3}, run[:3], "stop", None),
        "stop id": ({"stop_token_ids": (run[1],)}, run[:2], "stop", run[1]),
    }
    bench = Bench(block_size=16, overlap=overlap, max_new_tokens=max_new_tokens)
    for name, (params, *_) in cases.items():
        bench.add(name, prompt, max_tokens=6, logprobs=0, **params)
    bench.run()
    for name, (_, tokens, reason, stop_reason) in cases.items():
        assert (bench.tokens(name), bench.finish_reason(name)) == (tokens, reason), name
        assert bench.outputs[name][-1].stop_reason == stop_reason
        assert bench.requests[name].output_token_ids == bench.logprobs(name) == tokens


def test_abort_frees_at_once_wherever_the_request_is() -> None:
    bench = Bench(max_num_seqs=1, max_num_batched_tokens=4)
    running = bench.add("running", list(range(10)), max_tokens=5)
    bench.add("waiting", [1], max_tokens=5)
    bench.step()
    bench.scheduler.abort("waiting")
    bench.scheduler.abort("running")
    bench.scheduler.abort("unknown")
    assert running.status is Status.FINISHED
    assert not bench.scheduler.has_work
    bench.kv_cache.check_integrity([])
    assert bench.scheduler.schedule() is None


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_request_does_not_touch_its_batch_mates(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    bench.add("bad", [1, 2], max_tokens=5)
    bench.add("good", [3, 4], max_tokens=5)
    bench.step()
    bench.runner.nan_ids.add("bad")
    bench.run()
    assert bench.outputs["bad"][-1].finish_reason == "error"
    assert bench.outputs["bad"][-1].error == "the logits are not finite"
    assert bench.tokens("good") == solo([3, 4], 5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("neighbours", [0, 2])
def test_all_is_computed_again_once_where_a_request_becomes_long(
    overlap: bool, neighbours: int
) -> None:
    """Of a switch of 10 tokens: with the 11th, which is the third of the answer, in the steps that others go on in."""
    bench = Bench(overlap=overlap, rope_switch=10)
    for i in range(neighbours):
        bench.add(f"neighbour {i}", [i], max_tokens=8)
    request = bench.add("a", list(range(8)), max_tokens=20, prompt_logprobs=0)
    bench.run()
    own = [(start, end) for batch in bench.runner.batches for n, start, end in batch if n == "a"]
    decoded = [(n, n + 1) for n in range(11, 27)]
    assert own == [(0, 8), (8, 9), (9, 10), (0, 11), *decoded]
    assert bench.tokens("a") == solo(list(range(8)), 20)
    assert bench.prompt_logprobs("a") == [[None, *range(1, 8)]]
    assert (request.num_preemptions, bench.scheduler.stats().num_preemptions) == (1, 0)


def test_what_is_full_with_its_last_token_does_not_become_long() -> None:
    bench = Bench(rope_switch=10)
    request = bench.add("a", list(range(8)), max_tokens=3)
    bench.run()
    assert request.num_tokens == 11 and not request.is_long


def test_long_prompts_are_long_from_the_start_and_share_prefixes_among_themselves() -> None:
    bench = Bench(rope_switch=10, max_num_batched_tokens=5)
    prompt = list(range(16))
    for name, length in (("short", 10), ("long", 16), ("longer", 14), ("short again", 10)):
        bench.add(name, prompt[:length], max_tokens=1)
        bench.run()
    cached = {name: request.num_cached_tokens for name, request in bench.requests.items()}
    assert cached == {"short": 0, "long": 0, "longer": 12, "short again": 8}
    assert not any(request.num_preemptions for request in bench.requests.values())


def test_who_becomes_long_finds_the_prefix_of_who_was_it_before() -> None:
    bench = Bench(rope_switch=10)
    for name in "ab":
        bench.add(name, list(range(8)), max_tokens=6)
        bench.run()
    own = [(start, end) for batch in bench.runner.batches for n, start, end in batch if n == "b"]
    assert own == [(4, 8), (8, 9), (9, 10), (8, 11), (11, 12), (12, 13)]


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_where_the_first_token_of_the_answer_makes_it_long(overlap: bool) -> None:
    bench = Bench(rope_switch=10, max_num_batched_tokens=4, overlap=overlap)
    bench.add("a", list(range(10)), max_tokens=5, prompt_logprobs=0)
    bench.run()
    assert bench.prompt_logprobs("a") == [[None, *range(1, 10)]]
    assert bench.tokens("a") == solo(list(range(10)), 5)


@st.composite
def workloads(draw) -> tuple[dict, list[tuple[int, list[int], int, bool, bool, int]]]:
    windowed = st.builds(KVGroup, st.integers(4, 24), st.integers(1, 12))
    options = {
        "num_blocks": draw(st.integers(6, 24)),
        "block_size": draw(st.sampled_from([1, 3, 4])),
        "caching": draw(st.booleans()),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(1, 20)),
        "max_model_len": 40,
        "overlap": draw(st.booleans()),
        "max_new_tokens": draw(st.sampled_from([1, 2, 5])),
        "windows": draw(st.lists(windowed, max_size=2)),
        "num_states": draw(st.one_of(st.just(0), st.integers(2, 9))),
        "rope_switch": draw(st.one_of(st.none(), st.integers(1, 30))),
    }
    if options["overlap"] and options["max_new_tokens"] > 1:
        options["num_states"] = 0  # the step that is open would go through a token twice
    capacity = KVCacheManager(
        [KVGroup(options["num_blocks"]), *options["windows"]], options["block_size"]
    ).max_tokens(40, options["max_num_batched_tokens"])
    prompt = st.lists(
        st.integers(0, 1), min_size=1, max_size=capacity - 1
    )  # two tokens: prefixes collide
    length, priority = st.integers(1, 12), st.integers(-1, 1)
    request = st.tuples(st.integers(0, 8), prompt, length, st.booleans(), st.booleans(), priority)
    return options, draw(st.lists(request, min_size=1, max_size=8))


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_any_workload_gives_the_tokens_of_solo_runs(workload) -> None:
    options, arrivals = workload
    bench = Bench(**options)
    capacity = bench.scheduler.max_model_len
    for i, (steps_before, prompt, max_tokens, leaves, scored, priority) in enumerate(arrivals):
        asked = {"logprobs": 0, "prompt_logprobs": 0} if scored else {}
        bench.add(str(i), prompt, max_tokens=max_tokens, priority=priority, **asked)
        for _ in range(steps_before):
            bench.step()
        if leaves:
            bench.scheduler.abort(str(i))
            bench.scheduler.check_integrity()
    bench.run()
    for i, (_, prompt, max_tokens, leaves, scored, _) in enumerate(arrivals):
        expected = solo(prompt, min(max_tokens, capacity - len(prompt)))
        got = bench.tokens(str(i)) if str(i) in bench.outputs else []
        assert got == (expected[: len(got)] if leaves else expected)
        if scored and got:
            assert bench.logprobs(str(i)) == got
            assert bench.prompt_logprobs(str(i)) == [[None, *prompt[1:]]]
