"""Which tokens remain to be drawn from, beyond top_k, top_p and min_p. Pure functions of one row.

    logits --top_n_sigma--> logits        probs --typical--> probs --exclude_top_choices--> probs

What is removed is -inf, or 0; at least one token remains. Probabilities need not sum to 1: what earlier filters left
over counts as all there is.
"""

import torch
from torch import Tensor


def top_n_sigma(logits: Tensor, n: float) -> Tensor:
    """Without what is more than n standard deviations below the best (arXiv 2411.07641). Logits that are -inf already
    do not count; the temperature changes nothing about who remains."""
    possible = logits[torch.isfinite(logits)].double()
    least = possible.max() - n * possible.std(correction=0)
    return logits.masked_fill(logits < least, float("-inf"))


def typical(probs: Tensor, mass: float) -> Tensor:
    """The tokens whose information is nearest to the distribution's entropy, as few as have `mass` together
    (arXiv 2202.00666)."""
    p = probs.double() / probs.double().sum()
    information = -p.log()  # infinite for what is gone
    entropy = torch.special.entr(p).sum()
    order = (information - entropy).abs().argsort(stable=True)
    before = p[order].cumsum(0) - p[order]
    return probs.index_fill(0, order[before >= mass], 0.0)


def exclude_top_choices(probs: Tensor, threshold: float) -> Tensor:
    """Without all tokens of at least the threshold but the least probable of them (XTC; as llama.cpp has it)."""
    above = (probs >= threshold * probs.sum()).nonzero()[:, 0]
    if len(above) < 2:
        return probs
    least = int(probs[above].argmin())
    return probs.index_fill(0, above[torch.arange(len(above)) != least], 0.0)
