"""From logits to tokens. A pure function of (logits, the request's tokens, its parameters, its seed).

A draw is an exponential race: token i wins with probability p_i if it has the largest p_i / E_i, E_i independent and
exponential. E_i is a hash of (seed, position, i), not the state of a generator, so a request draws the same numbers
alone, in any batch, after a preemption and on any device; and as no sum over the vocabulary is compared with a
threshold, rounding in the last bits of the logits changes the winner only if two were that close anyway.

Candidates are cut down by top_k, top_p and min_p before anything is sorted, so the whole vocabulary is sorted only if
the nucleus is really that wide.

Order of operations, as vLLM has it: allowed_token_ids, logit bias, bad_words, min_tokens, penalties, DRY, grammar,
top_n_sigma, temperature, top_k, top_p, min_p, typical_p, XTC.
"""

import hashlib
import math
import struct

import numpy as np
import torch
from torch import Tensor

from . import dry, filters
from .grammar import masking
from .messages import TokenLogprobs
from .request import Request
from .sampling_params import NOTHING_LEFT, SamplingParams
from .scheduling.batch import StepResult

NOT_FINITE = "the model produced logits that are not numbers for this request"
_XTC = -1  # stands for a token's id in the hash that XTC draws its number from
_FIRST_CANDIDATES = 256


def sample(logits: Tensor, requests: list[Request], result: StepResult) -> None:
    """Choose one token per row of logits (float32 [B, vocab]; changed in place) and write it into `result`.

    A row that holds NaN fails its own request only.
    """
    raw_logprobs = {
        row: torch.log_softmax(logits[row], -1)
        for row, request in enumerate(requests)
        if request.params.logprobs is not None
    }
    for row, request in enumerate(requests):
        _adjust(logits[row], request)
    if any(request.grammar is not None for request in requests):
        _constrain(logits, requests, result)
    best_logits, best = logits.max(dim=-1)
    finite = torch.isfinite(best_logits).tolist()
    greedy = best.tolist()
    for row, request in enumerate(requests):
        if not finite[row]:
            nothing = best_logits[row] == float("-inf")
            result.errors.setdefault(request.request_id, NOTHING_LEFT if nothing else NOT_FINITE)
        if request.request_id in result.errors:
            continue
        token = greedy[row] if request.params.temperature == 0 else _draw(logits[row], request)
        result.tokens[request.request_id] = [token]
        masking.accept(request, token, request.num_output_tokens, result)
        if row in raw_logprobs:
            top = request.params.logprobs or 0
            result.logprobs[request.request_id] = [token_logprobs(raw_logprobs[row], token, top)]


def token_logprobs(logprobs: Tensor, token: int, top: int) -> TokenLogprobs:
    """logprobs float32 [vocab] -> those of `token` and of the `top` most probable."""
    chosen = logprobs[token]
    rank = int((logprobs > chosen).sum()) + 1
    values, ids = logprobs.topk(top) if top else (logprobs[:0], torch.empty(0, dtype=torch.int64))
    return TokenLogprobs(token, chosen.item(), rank, ids.tolist(), values.tolist())


def is_penalized(request: Request) -> bool:
    """Whether what it has said changes what it says next."""
    params = request.params
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def is_filtered(request: Request) -> bool:
    """Whether it asks for what only this module does, and no kernel."""
    params = request.params
    return bool(
        params.typical_p < 1.0
        or params.top_n_sigma > 0
        or params.xtc_probability
        or params.dry_multiplier
        or params.bad_words_token_ids
        or params.allowed_token_ids is not None
    )


def bad_word_ids(request: Request) -> set[int]:
    """The tokens that would complete one of its bad words."""
    said = request.output_token_ids
    return {
        last
        for *first, last in request.params.bad_words_token_ids or ()
        if not first or said[-len(first) :] == first
    }


def stop_ids_forbidden(request: Request) -> set[int]:
    """The tokens that would end it before min_tokens."""
    params = request.params
    if request.num_output_tokens >= params.min_tokens:
        return set()
    if (
        request.grammar is not None and request.grammar.is_accepting
    ):  # perhaps nothing else may follow
        return set(params.stop_token_ids)
    return set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))


def _constrain(logits: Tensor, requests: list[Request], result: StepResult) -> None:
    """What a grammar does not allow next becomes impossible."""
    found = masking.masks(requests, logits.shape[1], result)
    if found is not None:
        rows, bitmask = found
        allowed = np.unpackbits(bitmask.numpy().view(np.uint8), axis=1, bitorder="little")
        forbidden = torch.from_numpy(allowed[:, : logits.shape[1]] == 0).to(logits.device)
        for row, mask in zip(rows, forbidden, strict=True):
            logits[row].masked_fill_(mask, float("-inf"))


def _adjust(logits: Tensor, request: Request) -> None:
    """Bias, forbidden tokens and penalties, in place on one row."""
    params = request.params
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if forbidden := stop_ids_forbidden(request) | bad_word_ids(request):
        logits[torch.tensor(sorted(forbidden), device=logits.device)] = float("-inf")
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if request.num_output_tokens and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(request.output_token_ids, device=logits.device).unique(
            return_counts=True
        )
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts.float()
    if params.dry_multiplier and (lost := dry.penalties(request.token_ids, params)):
        ids = torch.tensor(list(lost), device=logits.device)
        logits[ids] -= torch.tensor(list(lost.values()), device=logits.device)


def _draw(logits: Tensor, request: Request) -> int:
    """Sample one row after all filters."""
    params = request.params
    if params.top_n_sigma > 0:
        logits = filters.top_n_sigma(logits, params.top_n_sigma)
    probs = torch.softmax(logits / params.temperature, -1)
    ids: Tensor | None = None
    if params.top_k > 0 or params.top_p < 1.0:
        probs, ids = _most_probable(probs, params)
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if params.typical_p < 1.0:
        probs = filters.typical(probs, params.typical_p)
    if params.xtc_probability and _uniform(request) < params.xtc_probability:
        probs = filters.exclude_top_choices(probs, params.xtc_threshold)
    if ids is None:
        ids = torch.arange(len(probs), device=probs.device)
    return int(ids[(probs / exponentials(request.seed, request.num_tokens, ids)).argmax()])


def _most_probable(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The candidates that top_k and top_p leave, most probable first: (probs [c], ids [c])."""
    limit = min(params.top_k, len(probs)) if params.top_k > 0 else len(probs)
    count = limit if params.top_k > 0 else min(_FIRST_CANDIDATES, limit)
    while True:
        top, ids = probs.topk(count)
        mass = top.double().cumsum(0)
        # top_p applies to what top_k left over, so with top_k it is relative to that mass.
        wanted = params.top_p * (float(mass[-1]) if params.top_k > 0 else 1.0)
        if count == limit or float(mass[-1]) >= wanted:
            break
        count = min(count * 8, limit)
    keep = int(torch.searchsorted(mass, wanted)) + 1
    return top[:keep], ids[:keep]


def exponentials(seed: int, position: int, ids: Tensor) -> Tensor:
    """Exponential random numbers float32, one for each of ids int64: a hash (murmur3's finalizer, twice, keyed) of
    (seed, position, id), turned from a uniform number by the inverse distribution function."""
    digest = hashlib.blake2b(
        struct.pack("<Qq", seed & 0xFFFFFFFFFFFFFFFF, position), digest_size=8
    ).digest()
    bits = _mix32(
        _mix32(ids + int.from_bytes(digest[:4], "little")) ^ int.from_bytes(digest[4:], "little")
    )
    return -torch.log1p(-(bits.float() + 0.5) * 2.0**-32)


def _uniform(request: Request) -> float:
    """A random number in (0, 1) of a request's seed and position, not those that tokens are drawn with."""
    return -math.expm1(-float(exponentials(request.seed, request.num_tokens, torch.tensor([_XTC]))))


def _mix32(x: Tensor) -> Tensor:
    """A bijection of the low 32 bits of int64 numbers; products wrap, and their low bits are what counts."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
