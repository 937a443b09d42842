"""GPTQ against the paper, column by column in float64, on layers wider than one block of the product's sweep.

The reference follows the product's codes: at each column they must be the nearest to what the reference holds there,
and its own error is then carried to every column still to come. A difference in the last bit changes nothing after it.
"""

import pytest
import torch

from nibble.quant.algorithms import gptq, search

OUT, WIDTH = 6, 384
DAMPING = 0.05


def hessian(even: bool) -> torch.Tensor:
    """float64 E[x x^T] [in, in] of correlated inputs; even: all columns equally important, so natural order is kept."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.eye(WIDTH, dtype=torch.float64)
    mix += 2 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    x = torch.randn(3 * WIDTH, WIDTH, generator=generator, dtype=torch.float64) @ mix
    products = x.T @ x / len(x)
    if even:
        spread = products.diagonal().sqrt()
        products = products / spread / spread[:, None]
    return products


def weight_of() -> torch.Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.05


def carried(weight: torch.Tensor, products: torch.Tensor, order: torch.Tensor, dense: torch.Tensor):
    """Yield (step, column, what is left of it [out], what is left of all [out, in]) in the order of quantization, and
    carry the error of each column of `dense`, what it became, to the columns after it."""
    damped = products + DAMPING * products.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left = weight.double().clone()
    for step, column in enumerate(order.tolist()):
        yield step, column, left[:, column].clone(), left
        error = (left[:, column] - dense[:, column]) / upper[step, step]
        for later in range(step + 1, WIDTH):
            left[:, order[later]] -= error * upper[step, later]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("group_size", [48, 64, 96, 192, 384])
def test_every_code_is_the_nearest_to_the_weight_that_the_errors_before_it_left(group_size, even):
    weight, products = weight_of(), hessian(even)
    q = gptq.quantize(weight, products.float(), 4, group_size, symmetric=True).weight
    order = gptq.group_order(products.diagonal().float(), group_size)
    assert (order.tolist() == list(range(WIDTH))) == even
    scales = q.scales.double().repeat_interleave(group_size, 1)
    dense = q.dequantize(torch.float64)
    moved = 0.0
    for _, column, left, _ in carried(weight, products, order, dense):
        wanted = (left / scales[:, column]).clamp(-8, 7)
        off = (q.codes[:, column].double() - 8 - wanted).abs()
        assert off.max() <= 0.5 + 1e-3, f"column {column}"
        moved = max(moved, ((left - weight[:, column]) / scales[:, column]).abs().max().item())
    assert moved > 0.5  # steps: what was carried decides about codes


@pytest.mark.parametrize("group_size", [48, 96, 192])
def test_a_group_is_fitted_to_the_weights_as_they_are_when_it_begins(group_size):
    weight, products = weight_of(), hessian(even=True)
    q = gptq.quantize(weight, products.float(), 3, group_size, symmetric=False).weight
    order, dense = torch.arange(WIDTH), q.dequantize(torch.float64)
    damped = products + DAMPING * products.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    cost = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal().square()
    importance = (1 / cost).reshape(-1, group_size)
    for step, column, _, left in carried(weight, products, order, dense):
        if step % group_size:
            continue
        group = column // group_size
        ahead = left[:, column : column + group_size]
        best = search.fit_grid(
            ahead.float().unsqueeze(1), importance[group : group + 1].float(), 3, False
        )
        grid = (q.scales[:, group].double(), q.zeros[:, group].double())
        for row in range(OUT):
            chosen = _rounding(ahead[row], *(part[row] for part in grid), importance[group])
            wanted = (part[row, 0].double() for part in best)
            assert chosen <= _rounding(ahead[row], *wanted, importance[group]) * (1 + 1e-3)


def _rounding(values, scale, zero, importance) -> float:
    """What rounding these values to a grid of 3 bits costs, weighted."""
    codes = ((values / scale).round() + zero).clamp(0, 7)
    return (((codes - zero) * scale - values).square() * importance).sum().item()
