"""GPTQ: quantize column by column, each time moving the columns still to come so that the layer's output stays put.

For inputs x with H = E[x x^T], quantizing column j of W with error e_j is best made up for by moving the columns k > j
by -e_j U[j, k] / U[j, j], where U is the upper Cholesky factor of H^-1 (Frantar et al. 2022, arXiv:2210.17323).

    columns ->   | done | this block of ~128: updated at once | the rest: updated once per block |

Three departures from the reference code. A group's grid is fitted on the *compensated* weights at the moment the group
begins, also in the middle of a block, and by importance-weighted search. Columns go in order of falling importance, but
whole groups at a time and then within each group, so groups stay contiguous and the stored g_idx is the plain one
(GPTQModel's group-aware reordering). Damping grows until the factorisation works; if none does, the caller gets
round-to-nearest with a reason, never an exception.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weight import QuantizedWeight
from . import search
from .rtn import encode, to_weight

BLOCK = 128
# (damping as a fraction of mean(diag H), dtype of the factorisation), tried in turn
ATTEMPTS = (
    (0.05, torch.float32),
    (0.05, torch.float64),
    (0.2, torch.float64),
    (1.0, torch.float64),
)


@dataclass(frozen=True, slots=True)
class Result:
    """A quantized weight and how it came about."""

    weight: QuantizedWeight
    damping: float | None  # None: fell back
    fallback: str | None  # why GPTQ could not be used, in words; None: it was


def quantize(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, symmetric: bool, min_zero: int = 0
) -> Result:
    """Quantize a float32 weight [out, in] given hessian [in, in] = E[x x^T] (any positive multiple).

    Rows are independent, so layers that share their inputs (q, k, v) may be stacked and split afterwards. min_zero: see
    `rtn.make_grid`. Raises ValueError if the group size does not divide the width.
    """
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    importance = hessian.diagonal().float()
    factor, damping, reason = _factorise(hessian, order := group_order(importance, size))
    if factor is None:
        fallback = search.quantize(weight, None, bits, size, symmetric, min_zero)
        return Result(fallback, None, reason)
    codes, scales, zeros = _sweep(weight.float()[:, order], factor, size, bits, symmetric, min_zero)
    undo = torch.argsort(order)
    undo_groups = torch.argsort(order[::size] // size)
    codes = codes[:, undo].reshape(weight.shape[0], -1, size)
    packed = to_weight(codes, scales[:, undo_groups], zeros[:, undo_groups], bits, symmetric)
    return Result(packed, damping, None)


def unexplained_variance(hessian: Tensor) -> Tensor:
    """The part of each input's E[x^2] [in] that the inputs after it cannot make up for: 1 / U[j, j]^2."""
    lower, _, _ = _cholesky(hessian.flip(0, 1))
    return hessian.diagonal() if lower is None else lower.diagonal().flip(0).float().square()


def group_order(importance: Tensor, group_size: int) -> Tensor:
    """A permutation of columns: groups by falling total importance, columns by falling importance within each."""
    groups = importance.reshape(-1, group_size)
    within = groups.argsort(dim=1, descending=True, stable=True)
    within += torch.arange(len(groups), device=groups.device).unsqueeze(1) * group_size
    return within[groups.sum(1).argsort(dim=0, descending=True, stable=True)].flatten()


def _factorise(hessian: Tensor, order: Tensor) -> tuple[Tensor | None, float | None, str | None]:
    """The upper Cholesky factor of the damped inverse in the given order, the damping used, or why there is none.

    With J the reversal, chol(J H J) = L gives H^-1 = (J L^-1 J)^T (J L^-1 J): one factorisation, no explicit inverse.
    """
    backwards = order.flip(0)
    lower, damping, problem = _cholesky(hessian[backwards][:, backwards])
    if lower is None:
        return None, None, problem
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    factor = torch.linalg.solve_triangular(lower, eye, upper=False, out=eye).flip(0, 1).float()
    if not torch.isfinite(factor).all():
        return None, None, "the Hessian's inverse overflows; use more samples"
    return factor, damping, None


def _cholesky(hessian: Tensor) -> tuple[Tensor | None, float | None, str | None]:
    """The lower factor of the hessian, which is overwritten, with as little damping as it takes; the damping, or why
    there is none."""
    if not torch.isfinite(hessian).all():
        return None, None, "activations are not finite"
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean().item()
    if mean <= 0:
        return None, None, "no activations reached the layer"
    for damping, dtype in ATTEMPTS:
        damped = hessian.to(dtype)
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            return lower, damping, None
    return (
        None,
        None,
        f"Hessian not positive definite even with damping {ATTEMPTS[-1][0]}; use more samples",
    )


def _sweep(
    weight: Tensor, factor: Tensor, size: int, bits: int, symmetric: bool, min_zero: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and zeros [out, n_groups], all in the order of the columns of weight."""
    out_features, in_features = weight.shape
    weight = weight.clone()
    codes = torch.empty_like(weight)
    scales = weight.new_empty(out_features, in_features // size)
    zeros = torch.empty_like(scales)
    # The damage of an error in column j, compensation included, is its square over U[j, j]^2.
    importance = factor.diagonal().square().reciprocal()  # as unexplained_variance, in this order
    block = size * max(1, BLOCK // size) if size <= BLOCK else _largest_divisor(size, BLOCK)
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        inner, local = weight[:, start:stop].t().contiguous(), factor[start:stop, start:stop]
        errors = torch.empty_like(inner)
        for j in range(stop - start):
            column, group = start + j, (start + j) // size
            if column % size == 0:
                ahead = (
                    inner[j : j + size].t()
                    if j + size <= len(inner)
                    else weight[:, column : column + size]
                )
                grid = search.fit_grid(
                    ahead.unsqueeze(1).contiguous(),
                    importance[column : column + size].unsqueeze(0),
                    bits,
                    symmetric,
                    min_zero,
                )
                scales[:, group], zeros[:, group] = grid[0].squeeze(1), grid[1].squeeze(1)
                scale, zero = scales[:, group].contiguous(), zeros[:, group].contiguous()
            code = encode(inner[j].unsqueeze(1), scale, zero, bits).squeeze(1)
            codes[:, column] = code
            errors[j] = (inner[j] - (code - zero) * scale) / local[j, j]
            inner[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        weight[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
    return codes, scales, zeros


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)
