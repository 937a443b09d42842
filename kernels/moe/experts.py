"""The sum of the experts that each token chose, from stacked weights: checked launches, and the path by the number of
tokens. Importing this imports Triton.

    x [T, in] -> align -> up: activation(gate) * up [T * top_k, inner]
                       -> down, times the pair's weight [T * top_k, out] -> sum over top_k [T, out]

There are no atomic additions, so a result does not depend on timing; nothing is read back, so a CUDA graph can hold it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..dequant_gemm.tiles import Tile
from ..fused.activation import ACTIVATIONS
from ..fused.rows import need, need_rows
from .align import Alignment, align
from .products import grouped_gemm, grouped_gemv
from .tiles import GEMV_BLOCK_N, GEMV_WARPS, card, gemv_tokens, tile
from .weight import ExpertWeight

_NAME = "experts"


@dataclass(frozen=True, slots=True)
class Gating:
    """What is done to the outputs of the up product: activation(gate) * up, or of up alone."""

    activation: str
    gated: bool = True
    # (alpha, limit): instead of that, (u + 1) g sigmoid(alpha g), g up to the limit, u within it
    clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        known = self.activation in ACTIVATIONS
        need(known, _NAME, f"activation is {self.activation!r}, want one of {list(ACTIVATIONS)}")
        need(self.gated or self.clamp is None, _NAME, "a clamp is for gates")

    @property
    def name(self) -> str:
        """As epilogue.py calls it."""
        return self.activation if self.clamp is None else "clamped"


@dataclass(slots=True)
class ExpertMlps:
    """The weights of every expert: up's outputs are gate and up in turns, or up alone."""

    up: ExpertWeight
    down: ExpertWeight
    gating: Gating

    def __post_init__(self) -> None:
        inner = self.up.out_features // (2 if self.gating.gated else 1)
        need(
            self.down.in_features == inner and self.down.num_experts == self.up.num_experts,
            _NAME,
            f"up gives {inner} features of {self.up.num_experts} experts, "
            f"down takes {self.down.in_features} of {self.down.num_experts}",
        )


@dataclass(frozen=True, slots=True)
class _Product:
    """How the rows of one product are read and written."""

    weight: ExpertWeight
    top_k: int  # rows of y for one of x
    gating: Gating | None
    pair_weights: Tensor | None  # float32 [pairs]

    @property
    def width(self) -> int:
        """Of a row that is written."""
        return self.weight.out_features // (2 if self.gating and self.gating.gated else 1)


def experts(x: Tensor, weights: Tensor, chosen: Tensor, mlps: ExpertMlps) -> Tensor:
    """x [T, in] float16 or bfloat16, contiguous; weights float32 and chosen int32 [T, top_k], as `route` gives them.

    Returns the weighted sums [T, out] in x's dtype. Raises KernelArgumentError naming the argument that does not fit.
    """
    tokens, top_k = chosen.shape
    need_rows(_NAME, "x", x, (torch.float16, torch.bfloat16), tokens, mlps.up.in_features)
    need(x.is_contiguous(), _NAME, "x is not contiguous")
    need_rows(_NAME, "weights", weights, (torch.float32,), tokens, top_k)
    need(
        weights.is_contiguous() and chosen.is_contiguous(),
        _NAME,
        "weights or chosen are not contiguous",
    )
    need(x.device == mlps.up.words.device, _NAME, f"x is on {x.device}, the experts are not")
    if tokens == 0:
        return x.new_empty(0, mlps.down.out_features)
    up = _Product(mlps.up, top_k, mlps.gating, None)
    down = _Product(mlps.down, 1, None, weights)
    cc = card(x.device)
    if tokens <= gemv_tokens(cc):
        added = gemv(gemv(x, up, chosen), down, chosen)
    else:
        rows = -(-chosen.numel() // mlps.up.num_experts)
        tiles = [tile(cc, rows, each.bits, each.group) for each in (mlps.up, mlps.down)]
        plan = align(chosen, mlps.up.num_experts, tiles[0].block_m)
        inner = gemm(x, up, plan, chosen.numel(), tiles[0])
        added = gemm(inner, down, plan, chosen.numel(), tiles[1])
    return added.view(tokens, top_k, -1).sum(1)


def gemm(x: Tensor, product: _Product, plan: Alignment, num_pairs: int, tile: Tile) -> Tensor:
    """x [rows, in] -> [pairs, width], in tiles of the plan's rows, whose number is the tile's."""
    y = x.new_empty(num_pairs, product.width)
    grid = (len(plan.experts), triton.cdiv(product.weight.out_features, tile.block_n))
    grouped_gemm[grid](
        x,
        *_weight(product.weight),
        y,
        product.pair_weights,
        plan.pairs,
        plan.experts,
        plan.num_tiles,
        num_pairs,
        *_numbers(product),
        **_constants(product),
        BLOCK_M=plan.block_m,
        BLOCK_N=tile.block_n,
        SWAP=tile.swap,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def gemv(x: Tensor, product: _Product, chosen: Tensor) -> Tensor:
    """x [rows, in] -> [pairs, width], a program for each pair."""
    y = x.new_empty(chosen.numel(), product.width)
    grid = (chosen.numel(), triton.cdiv(product.weight.out_features, GEMV_BLOCK_N))
    grouped_gemv[grid](
        x,
        *_weight(product.weight),
        y,
        product.pair_weights,
        chosen,
        *_numbers(product),
        **_constants(product),
        BLOCK_N=GEMV_BLOCK_N,
        num_warps=GEMV_WARPS,
        num_stages=1,
    )
    return y


def _weight(weight: ExpertWeight) -> tuple[Tensor | None, ...]:
    return weight.words, weight.scales, weight.perm, weight.bias


def _numbers(product: _Product) -> tuple[int | float, ...]:
    weight, gating = product.weight, product.gating
    alpha, limit = (gating and gating.clamp) or (0.0, 0.0)
    sizes = (weight.out_features, weight.in_features)
    if weight.scales is None:
        return *sizes, 0, 0, 0, weight.words[0].numel(), 0, alpha, limit
    k_tiles, padded_out, _ = weight.words.shape[1:]
    strides = weight.words[0].numel(), weight.scales[0].numel()
    return *sizes, padded_out, k_tiles, weight.scales.shape[-2], *strides, alpha, limit


def _constants(product: _Product) -> dict[str, Any]:
    weight, gating, decode = product.weight, product.gating, product.weight.decode
    return {
        "TOP_K": product.top_k,
        "ACTIVATION": "" if gating is None else gating.name,
        "GATED": gating is not None and gating.gated,
        "CODE": None if decode is None else decode.code,
        "SCALE": None if decode is None else decode.scale,
        "HAS_MINIMUM": decode is not None and decode.has_minimum,
        "BITS": weight.bits,
        "GROUP": weight.group,
        "EVEN_K": weight.in_features % weight.step == 0,
    }
