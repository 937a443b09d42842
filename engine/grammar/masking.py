"""Which tokens may come next, for the rows of a batch that have a grammar; and what the chosen ones lead to.

requests --masks--> bitmask int32 [R, ceil(V / 32)], R rows that have one    while a GPU computes the step's layers
token chosen --accept--> the grammar moves on; tokens that must follow       StepResult.forced
"""

import os
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..request import Request
from ..scheduling.batch import StepResult
from .state import GrammarState

if TYPE_CHECKING:
    from llguidance import LLExecutor

_WORD = 4  # bytes


def masks(
    requests: list[Request], vocab_size: int, result: StepResult
) -> tuple[list[int], Tensor] | None:
    """Rows that have a grammar, and the tokens it allows them next; None where there are no such rows. A grammar that
    has run into its limits fails its own request."""
    rows, states = [], []
    for row, request in enumerate(requests):
        if request.grammar is not None and request.grammar.is_asked(request.num_output_tokens):
            rows.append(row)
            states.append(request.grammar)
    if not rows:
        return None
    bitmask = torch.zeros((len(rows), states[0].num_words), dtype=torch.int32)
    _fill(states, bitmask)
    for i, (row, state) in enumerate(zip(rows, states, strict=True)):
        if error := state.look():
            result.errors[requests[row].request_id] = error
            bitmask[i] = -1
    return rows, bitmask[:, : -(-vocab_size // 32)].contiguous()


def accept(request: Request, token: int, position: int, result: StepResult) -> None:
    """Output token `position` of a request is `token`. What must follow goes into `result`, but for those who want
    the log-probability of each token, which only a step gives."""
    if request.grammar is not None:
        forced = request.grammar.accept(token, position, jump=request.params.logprobs is None)
        if forced:
            result.forced[request.request_id] = forced


def _fill(states: list[GrammarState], bitmask: Tensor) -> None:
    address, nbytes = bitmask.data_ptr(), bitmask.shape[1] * _WORD
    if len(states) == 1:
        states[0].matcher.unsafe_compute_mask_ptr(address, nbytes)
    else:
        matchers = [(state.matcher, row) for row, state in enumerate(states)]
        _executor().unsafe_compute_mask_ptr(matchers, address, nbytes, len(states))


@lru_cache(maxsize=1)
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor(num_threads=min(os.cpu_count() or 1, 8))
