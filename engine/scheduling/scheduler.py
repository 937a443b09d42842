"""Scheduler: which tokens of which requests the next step computes.

There are no phases. Every request has tokens and computed tokens; a step lets the second number catch up with the
first, under a budget of tokens and of blocks. A request that catches up gets one more token.

    running    [ r1 r2 r3 ]   admitted; each holds the blocks that its next tokens see
    waiting    [ r4 r5 ... ]  holds no blocks

Both are always in order of priority and, among equals, of arrival: a request is admitted from the left of `waiting`,
and preempted from the right of `running`. So the first that runs is never preempted, and since no request may need more
blocks than there are, it always finishes: there is no deadlock and no livelock. Nobody is preempted for one that waits.

A step is `schedule`, `launched`, `update`. The next `schedule` may come before this step's `update`, then with tokens
that are UNKNOWN; at most one step is open so. Meanwhile a request may have been finished or preempted: `update` leaves
the first alone, and gives the second its tokens and no more. A step may give a request more tokens than the one that
was sure to come, or a grammar may leave no choice of what follows; then the step that is open samples at a position
that is known by now, and that token is not new.

Where a model has a `rope_switch`, all positions of a request turn otherwise once it has more tokens than that
(LongRoPE). It is then "long": it keeps its place, gives back its blocks and computes all of its tokens again, once. A
prompt may be long from the start. Names of blocks tell long requests from others (Request.become_long).
"""

import itertools
import logging
from bisect import insort

import msgspec

from ..messages import EngineStats, RequestOutput
from ..request import UNKNOWN, FinishReason, Request, Status
from .batch import ScheduledBatch, ScheduledRequest, StepResult
from .kv_cache_manager import KVCacheManager

logger = logging.getLogger(__name__)


class Scheduler:
    """Owns every request in the engine from `add` until it is finished, and the KV cache's blocks with them."""

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        rope_switch: int | None = None,
    ):
        """max_model_len: tokens of prompt and output together; lowered here to what the KV cache can hold."""
        self.rope_switch = rope_switch
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = kv_cache.max_tokens(max_model_len, max_num_batched_tokens)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self._stats = EngineStats(num_blocks=kv_cache.num_blocks)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it is empty, already here, or leaves no room for one output token."""
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        if not request.prompt_token_ids:
            raise ValueError("the prompt is empty")
        if request.num_tokens + 1 > self.max_model_len:
            raise ValueError(
                f"the prompt has {request.num_tokens} tokens; the context of {self.max_model_len} "
                "tokens has no room for it and an answer"
            )
        widest = max((len(run) for image in request.images for run in image.whole), default=0)
        room = self.max_num_batched_tokens - self.max_num_seqs
        if widest and widest > room:  # else there may be no step that has room for it
            raise ValueError(
                f"an image is {widest} tokens that one step computes; {room} fit beside the other requests'. Raise "
                "--max-num-batched-tokens, or lower --max-num-seqs"
            )
        self._requests[request.request_id] = request
        request.rank = request.params.priority, next(self._arrivals)
        insort(self.waiting, request, key=_rank)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks. One that is unknown or already finished is ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.ABORT)

    def schedule(self) -> ScheduledBatch | None:
        """What to compute next, its blocks allocated. None: nothing to do."""
        self.kv_cache.begin_step()
        items, budget, preempted = self._schedule_running(self.max_num_batched_tokens)
        if not preempted:
            items += self._admit_waiting(budget)
        self.kv_cache.place_states(items)
        self._stats.step_tokens = sum(item.num_tokens for item in items)
        return ScheduledBatch(items) if items else None

    def launched(self, batch: ScheduledBatch) -> None:
        """The runner has `batch`: its tokens count as computed, and whoever samples has one more, still UNKNOWN."""
        for item in batch.items:
            item.request.num_computed_tokens = item.end
            if item.samples:
                item.request.token_ids.append(UNKNOWN)

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[RequestOutput]:
        """Take in what the runner computed for `batch`; finish requests that are done. The news, one per request."""
        outputs = []
        for item in batch.items:
            request = item.request
            error = result.errors.get(request.request_id)
            if request.is_finished or error is not None:
                self.kv_cache.settle_states(item, whole=False)
            if request.is_finished:
                continue
            if error is not None:
                self._finish(request, FinishReason.ERROR)
                outputs.append(
                    RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)
                )
                continue
            if item.samples and request.params.pooling is not None:
                self.kv_cache.settle_states(item, whole=False)
                self._finish(request, FinishReason.STOP)
                outputs.append(_pooled(request, result))
                continue
            tokens = result.tokens[request.request_id] if item.samples else []
            end = item.end + len(tokens)
            tokens = tokens + result.forced.get(request.request_id, [])
            known = request.num_known_tokens
            request.token_ids[known : item.end + len(tokens)] = tokens[known - item.end :]
            if request.prompt_logprobs is not None:
                request.prompt_logprobs += result.prompt_logprobs.get(request.request_id, [])
            still = item.is_long == request.is_long  # else its blocks are others by now
            if still and request.status is Status.RUNNING:
                self._commit(item, end)
            self.kv_cache.settle_states(item, whole=still)
            if item.end + len(tokens) > known:
                outputs.append(self._output(item, known, item.end + len(tokens), result))
        return outputs

    def stats(self) -> EngineStats:
        """The gauges now and the totals since the start."""
        return msgspec.structs.replace(
            self._stats,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_free_blocks=self.kv_cache.num_free,
        )

    def check_integrity(self) -> None:
        """RuntimeError if the KV cache's books and the requests' block tables disagree."""
        self.kv_cache.check_integrity(self._requests.values())

    def _schedule_running(self, budget: int) -> tuple[list[ScheduledRequest], int, bool]:
        items: list[ScheduledRequest] = []
        preempted, index = False, 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            if self._awaits_token(request):
                index += 1
                continue
            if self._outgrows(request):
                self._set_back(request)
            if not self._give_blocks(request, budget):
                self._preempt_last()
                preempted = True
                continue
            chunk = _next_chunk(request, budget)
            items += [chunk] if chunk.num_tokens else []  # an image waits for a step with room
            budget -= chunk.num_tokens
            index += 1
        return items, budget, preempted

    def _admit_waiting(self, budget: int) -> list[ScheduledRequest]:
        items = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self._hold_blocks(request, budget):
                break
            self.waiting.pop(0)
            insort(self.running, request, key=_rank)
            request.status = Status.RUNNING
            chunk = _next_chunk(request, budget)
            items += [chunk] if chunk.num_tokens else []
            budget -= chunk.num_tokens
        return items

    def _awaits_token(self, request: Request) -> bool:
        """Whether its last token is on its way, or the one with which it becomes long: that is taken in before."""
        if self._is_full(request, request.num_tokens):
            return True
        return self._outgrows(request) and request.num_known_tokens < request.num_tokens

    def _outgrows(self, request: Request) -> bool:
        """Whether it is about to become long."""
        switch = self.rope_switch
        return switch is not None and not request.is_long and request.num_tokens > switch

    def _give_blocks(self, request: Request, budget: int) -> bool:
        """For the next step of a request that runs. False: not enough are free."""
        if not request.block_tables:  # it has just been set back
            return self._hold_blocks(request, budget)
        return self.kv_cache.grow(request, _next_chunk(request, budget).end)

    def _hold_blocks(self, request: Request, budget: int) -> bool:
        """Give a request blocks to begin with, known prefixes first. False: not enough are free."""
        if self._outgrows(request):
            request.become_long()
        num_cached = 0
        # For these every prompt position is computed, again after a preemption
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = []
        elif request.params.pooling is None:
            num_cached = self.kv_cache.find_prefix(request)
        end = min(request.num_tokens, num_cached + budget)
        if not self.kv_cache.admit(request, num_cached, end):
            return False
        request.num_computed_tokens = num_cached
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self._stats.prefix_queries += request.num_tokens
            self._stats.prefix_hits += request.num_computed_tokens
        return True

    def _preempt_last(self) -> None:
        """Its blocks are wanted by a request before it. It keeps its tokens and computes them again later."""
        request = self.running.pop()
        self._set_back(request)
        request.status = Status.WAITING
        insort(self.waiting, request, key=_rank)
        self._stats.num_preemptions += 1
        if self._stats.num_preemptions == 1:
            logger.warning(
                "the KV cache is full: a request was set back and will be computed again. If this happens "
                "often, raise --kv-cache-memory or lower --max-num-seqs"
            )

    def _set_back(self, request: Request) -> None:
        """Its tokens are kept; all of them are to be computed again."""
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1

    def _commit(self, item: ScheduledRequest, end: int) -> None:
        """What was computed for a running request, all before `end` but the last that was sampled: its full blocks may
        be shared from now on."""
        request = item.request
        end = max(item.end, end - 1)
        if end > item.end:
            request.num_computed_tokens = max(request.num_computed_tokens, end)
        self.kv_cache.commit(request, item.start, end)

    def _output(
        self, item: ScheduledRequest, known: int, end: int, result: StepResult
    ) -> RequestOutput:
        """The new tokens: those from position `known` to `end`, or up to the one that ends the request."""
        request = item.request
        reason = None
        for position in range(known, end):
            reason = self._finish_reason(request, request.token_ids[position], position + 1)
            if reason is not None:
                end = position + 1
                break
        output = RequestOutput(
            request.request_id,
            request.token_ids[known:end],
            num_cached_tokens=request.num_cached_tokens,
        )
        if request.params.logprobs is not None:
            entries = result.logprobs[request.request_id]
            output.logprobs = entries[known - item.end : end - item.end]
        if request.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *request.prompt_logprobs]
            request.prompt_logprobs = None
        if reason is not None:
            del request.token_ids[end:]
            self._finish(request, reason)
            output.finish_reason, output.stop_reason = reason, request.stop_reason
        return output

    def _finish_reason(self, request: Request, token: int, num_tokens: int) -> FinishReason | None:
        """num_tokens: up to `token`, the last that is known."""
        params = request.params
        num_output = num_tokens - request.num_prompt_tokens
        if request.grammar is not None and request.grammar.is_over(num_output):
            return FinishReason.STOP
        if num_output >= params.min_tokens:
            if token in request.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP
            if token in params.stop_token_ids:
                request.stop_reason = token
                return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(request, num_tokens) else None

    def _is_full(self, request: Request, num_tokens: int) -> bool:
        return (
            num_tokens - request.num_prompt_tokens >= request.params.max_tokens
            or num_tokens >= self.max_model_len
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.kv_cache.free(request)
        request.status, request.finish_reason = Status.FINISHED, reason
        del self._requests[request.request_id]


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _next_chunk(request: Request, budget: int) -> ScheduledRequest:
    """What a step computes of a request. No tokens at all where an image comes next that the budget would cut."""
    start = request.num_computed_tokens
    end = request.chunk_end(min(request.num_tokens, start + budget))
    return ScheduledRequest(request, start, max(0, end - start))


def _pooled(request: Request, result: StepResult) -> RequestOutput:
    """The only news of a request that wanted no tokens."""
    return RequestOutput(
        request.request_id,
        finish_reason=FinishReason.STOP,
        embedding=result.embeddings[request.request_id],
    )
