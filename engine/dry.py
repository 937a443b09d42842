"""DRY, "don't repeat yourself": the penalty of tokens that would go on with a repetition. As llama.cpp has it.

    tokens     a b c | x a b c d ...  a b c      the last three have been said before, and d came after them
                                          ^ d    loses multiplier * base ** (3 - allowed_length)

Of several earlier places the longest match counts. No match reaches back over a sequence breaker.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .sampling_params import SamplingParams, TokenSequences

Breaker = list[NDArray[np.int64]]  # the ids that may stand at each of its positions
_LOG_MAX = math.log(float(np.finfo(np.float32).max))  # longer matches cost no more


def penalties(token_ids: Sequence[int], params: SamplingParams) -> dict[int, float]:
    """What the logits of tokens lose, by id, after a text of `token_ids`."""
    last = params.dry_penalty_last_n
    if last == 0:
        return {}
    tokens = np.asarray(token_ids if last < 0 else token_ids[-last:], dtype=np.int64)
    single, several = _breakers(params.dry_breaker_ids or ())
    reach = min(_reach(tokens, sequence) for sequence in several)
    if reach < params.dry_allowed_length:
        return {}
    longest = _longest_matches(tokens, min(reach, _longest_that_counts(params)))
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in longest.items()
        if length >= params.dry_allowed_length and token not in single
    }


def _longest_that_counts(params: SamplingParams) -> int:
    if params.dry_base == 1.0:
        return params.dry_allowed_length
    return params.dry_allowed_length + int(_LOG_MAX / math.log(params.dry_base))


@lru_cache(maxsize=16)
def _breakers(sequences: TokenSequences) -> tuple[frozenset[int], list[Breaker]]:
    """Tokens that are breakers by themselves; and all breakers as what may stand at each of their positions."""
    single = frozenset(sequence[0] for sequence in sequences if len(sequence) == 1)
    several = [[np.array([i]) for i in sequence] for sequence in sequences if len(sequence) > 1]
    return single, [[np.array(sorted(single), dtype=np.int64)], *several]


def _reach(tokens: NDArray[np.int64], breaker: Breaker) -> int:
    """How many tokens lie behind the last of these breakers."""
    size = len(breaker)
    found = np.arange(len(tokens) - size + 1)
    for offset, ids in enumerate(breaker):
        found = found[np.isin(tokens[found + offset], ids)]
    return len(tokens) if not len(found) else len(tokens) - int(found[-1]) - size


def _longest_matches(tokens: NDArray[np.int64], limit: int) -> dict[int, int]:
    """Of each token that once followed what the text ends with: how long that was, at most `limit`."""
    places = np.flatnonzero(tokens[:-1] == tokens[-1])  # where it may have ended before
    longest: dict[int, int] = {}
    length = 1
    while len(places):
        longest |= dict.fromkeys(tokens[places + 1].tolist(), length)
        if length == limit:
            break
        places = places[places >= length]
        places = places[tokens[places - length] == tokens[-1 - length]]
        length += 1
    return longest
