"""A runner driven by hand, as a scheduler would: tokens of requests, cut up however a test likes."""

import torch
from torch import Tensor

from nibble.engine.backends.batch import Batch
from nibble.engine.request import Request
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledBatch, ScheduledRequest


def prompt(length: int, seed: int = 0, first: int = 3) -> list[int]:
    """Tokens of the tiny models, `first` and above: none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, 199, (length,), generator=generator).tolist()


def make_request(ids: list[int], blocks: list[int], **params) -> Request:
    """A greedy request that holds these blocks, in each of at most two KV groups in another order, and a state slot of
    its own where no two share twenty blocks."""
    return Request(
        f"r{blocks[0]}",
        ids,
        SamplingParams(temperature=0, max_tokens=64, **params),
        frozenset(),
        seed=0,
        block_tables=[blocks, blocks[::-1]],
        state_slot=min(blocks) // 20,
    )


def run(runner: Runner, requests: list[Request], chunk: int, steps: int) -> None:
    """At most `chunk` tokens of each request a step; all of them again where it becomes long."""
    for _ in range(steps):
        for request in requests:
            if runner.rope_switch is not None and not request.is_long:
                request.is_long = request.num_tokens > runner.rope_switch
                request.num_computed_tokens *= not request.is_long
        items = _next(requests, chunk)
        result = runner.execute(ScheduledBatch(items))
        for item in items:
            item.request.num_computed_tokens = item.end
            if item.samples:
                item.request.token_ids += result.tokens[item.request.request_id]


@torch.inference_mode()
def logits(runner: Runner, requests: list[Request], chunk: int) -> list[Tensor]:
    """[T, vocab_size] of every token of each request; nothing is sampled. chunk: as in `run`."""
    rows: dict[str, list[Tensor]] = {request.request_id: [] for request in requests}
    while left := [r for r in requests if r.num_computed_tokens < r.num_tokens]:
        batch = Batch(_next(left, chunk), runner.block_size)
        hidden = runner.model.forward(batch, runner.cache)
        found = runner.model.logits(hidden).split([item.num_tokens for item in batch.items])
        for item, each in zip(batch.items, found, strict=True):
            item.request.num_computed_tokens = item.end
            rows[item.request.request_id].append(each.clone())
    return [torch.cat(rows[request.request_id]) for request in requests]


def _next(requests: list[Request], chunk: int) -> list[ScheduledRequest]:
    return [ScheduledRequest(r, r.num_computed_tokens, _count(r, chunk)) for r in requests]


def _count(request: Request, chunk: int) -> int:
    start = request.num_computed_tokens
    count = request.chunk_end(min(start + chunk, request.num_tokens)) - start
    assert count, "a chunk smaller than an image whose tokens see each other"
    return count
