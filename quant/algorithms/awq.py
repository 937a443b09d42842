"""AWQ: scale up the input channels that matter before rounding, and scale what feeds them down to match.

Multiplying column j of W by s_j and dividing its input by s_j changes nothing in exact arithmetic, but the rounding
error of that column then reaches the output divided by s_j (Lin et al. 2023, arXiv:2306.00978). Channels with large
activations deserve a large s; how large is searched, judged by the output's squared error after rounding with error
compensation, which is estimated and not carried out: rounding alone is three times as far off, and its favourites do
harm where GPTQ follows.

The candidates are AutoAWQ's (`awq/quantize/quantizer.py`): s = x^r / w^(1-r) and s = x^r ("duo") for 20 ratios r, with
x the mean |activation| and w the mean relative |weight| of each channel, and s = 1, so a fold never does harm. The
loss is smooth in r, so the grid is searched from coarse to fine.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rtn import extent, make_grid, to_groups

COARSE = (0.0, 0.2, 0.4, 0.6, 0.8)
FINER = (0.1, 0.05)  # steps to either side of the best so far: the 20 ratios 0, 0.05 ... 0.95
SCALE_MIN = 1e-4


@dataclass(frozen=True, slots=True)
class Search:
    """The scales that were found, their loss, and the loss of leaving the layer alone."""

    scales: Tensor  # float32 [in]
    loss: float
    identity_loss: float


def search_scales(mean_abs: Tensor, weight_mean: Tensor, loss: Callable[[Tensor], float]) -> Search:
    """The candidate [in] of least loss. mean_abs [in]: mean |activation|; weight_mean [in]: `relative_magnitude`."""
    best = torch.ones_like(mean_abs)
    identity_loss = best_loss = loss(best)
    best_ratio, best_duo = 0.0, True
    points = [(ratio, duo) for duo in (True, False) for ratio in COARSE]
    for step in (*FINER, None):
        for ratio, duo in points:
            scales = candidate(mean_abs, weight_mean, ratio, duo)
            if scales is not None and (value := loss(scales)) < best_loss:
                best, best_loss, best_ratio, best_duo = scales, value, ratio, duo
        if step is not None:
            points = [
                (ratio, best_duo)
                for ratio in (best_ratio - step, best_ratio + step)
                if 0 <= ratio < 1
            ]
    return Search(best, best_loss, identity_loss)


def candidate(mean_abs: Tensor, weight_mean: Tensor, ratio: float, duo: bool) -> Tensor | None:
    """Scales [in], normalised so that the least and the greatest have a geometric mean of 1; None if not finite."""
    scales = mean_abs.pow(ratio)
    if not duo:
        scales = scales / (weight_mean.pow(1 - ratio) + SCALE_MIN)
    scales = scales.clamp(min=SCALE_MIN)
    scales = scales / (scales.max().sqrt() * scales.min().sqrt())
    return scales if torch.isfinite(scales).all() else None


def relative_magnitude(weights: list[Tensor], group_size: int) -> Tensor:
    """Mean over all rows of |w| relative to the greatest in its group: [in]. weights share their input: [out_i, in]."""
    groups = to_groups(torch.cat(weights), group_size).abs()
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).mean(0).flatten()


def expected_loss(
    weight: Tensor, variance: Tensor, bits: int, group_size: int, symmetric: bool
) -> Callable[[Tensor], float]:
    """The loss of scales [in]: what rounding weight [out, in] times them will cost, up to a factor, nothing rounded.

    On a grid of step d a weight errs by d^2 / 12 on average; with error compensation that costs the variance [in] of
    its input that the inputs after it cannot make up for (`gptq.unexplained_variance`), over the square of its scale.
    """

    def loss(scales: Tensor) -> float:
        steps, _ = make_grid(*extent(to_groups(weight * scales, group_size)), bits, symmetric)
        cost = (variance / scales.square()).reshape(steps.shape[1], -1).sum(1)
        return (steps.square().sum(0) * cost).sum().item()

    return loss


def hessian_loss(error: Tensor, hessian: Tensor) -> float:
    """E|error x|^2 for a weight error [out, in] and hessian E[x x^T] [in, in]."""
    return torch.sum((error @ hessian) * error).item()


def divide_norm(
    weight: Tensor, scales: Tensor, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fold scales into a norm that multiplies by weight + offset.

    Returns the new stored weight, already rounded to dtype, and the scales it really amounts to, so that multiplying
    the consumers' columns by those is exact whatever the rounding did (an offset norm in bfloat16 is coarse near -1).
    """
    multiplier = weight.float() + offset
    stored = (multiplier / scales - offset).to(dtype).float()
    usable = (
        (multiplier != 0) & (stored + offset != 0) & ((stored + offset).sign() == multiplier.sign())
    )
    stored = torch.where(usable, stored, weight.float())
    return stored, torch.where(usable, multiplier / (stored + offset), torch.ones_like(scales))


def share_over_heads(per_query: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Mean of a statistic [q_heads * head_dim] over the query heads that read one kv channel: [kv_heads * head_dim]."""
    return per_query.reshape(kv_heads, -1, head_dim).mean(1).flatten()


def repeat_over_heads(per_kv: Tensor, query_heads: int, head_dim: int) -> Tensor:
    """[kv_heads * head_dim] -> [query_heads * head_dim]: each query head gets the channels of the kv head it reads."""
    per_head = per_kv.reshape(-1, head_dim)
    return per_head.repeat_interleave(query_heads // len(per_head), 0).flatten()
