"""The sum of chosen experts in the interpreter, for every kind of weights, against float64 on the dequantized ones."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DEVICE,
    activations,
    make_fp4_weight,
    make_fp8_weight,
    make_weight,
    on_device,  # noqa: F401  (a fixture)
)
from torch import Tensor

from nibble.kernels.dequant_gemm.tiles import Tile
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.moe import experts as module
from nibble.kernels.moe.experts import ExpertMlps, Gating, experts
from nibble.kernels.moe.tiles import gemv_tokens, tile, tokens_of_tiles
from nibble.kernels.moe.weight import Weight, stack, why_not_stacked
from nibble.quant.weight import QuantizedWeight

COUNT, HIDDEN, INNER, TOP_K = 5, 96, 48, 2
HALF, BF16 = torch.float16, torch.bfloat16
TILES = {
    "swapped": Tile(16, 16, 64, 4, 2, True),
    "plain": Tile(16, 16, 64, 4, 2),
    "wide": Tile(16, 32, 128, 4, 2, True),
}


def dense(out: int, inner: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(out, inner, generator=generator, device="cpu") * 0.2).to(DEVICE, HALF)


def integer(bits: int, zero: str, group: int):
    """Codes of each expert are others; scales of about the size that keeps numbers near 1."""

    def make(out: int, inner: int, seed: int) -> QuantizedWeight:
        weight = make_weight(bits, zero, out, inner, group)
        weight.codes = weight.codes.roll(seed, 0)
        weight.scales = weight.scales.roll(seed, 0) * 0.5
        return weight

    return make


def fp8(block: tuple[int, int]):
    def make(out: int, inner: int, seed: int) -> QuantizedWeight:
        weight = make_fp8_weight(out, inner, block)
        codes = weight.codes.view(torch.uint8).roll(seed, 0).view(torch.float8_e4m3fn)
        return replace(weight, codes=codes, scales=weight.scales * 0.1)

    return make


def fp4(group: int):
    def make(out: int, inner: int, seed: int) -> QuantizedWeight:
        weight = make_fp4_weight(out, inner, group)
        weight.codes = weight.codes.roll(seed, 0)
        return weight

    return make


def act_order(out: int, inner: int, seed: int) -> QuantizedWeight:
    """Gate and up of an expert share an order: it follows from the expert's number alone."""
    weight = integer(4, "mid", 32)(out, inner, seed)
    generator = torch.Generator("cpu").manual_seed(seed // 3 * 7 + inner)
    weight.perm = torch.randperm(inner, generator=generator, device="cpu").to(DEVICE)
    return weight


KINDS = {
    "dense": dense,
    "awq": integer(4, "zeros", 32),
    "gptq-2": integer(2, "zeros", 16),
    "gptq-3": integer(3, "mid", 48),
    "gptq-8": integer(8, "mid", 32),
    "mins": integer(4, "mins", 16),
    "5 bits": integer(5, "mins", 32),
    "6 bits": integer(6, "mid", 16),
    "act-order": act_order,
    "fp8 rows": fp8((1, 48)),
    "fp8 blocks": fp8((32, 32)),
    "mxfp4": fp4(32),
    "nvfp4": fp4(16),
}


def made(kind: str, gated: bool = True, inner: int = INNER) -> tuple[list[list[Weight]], list]:
    """[gate, up] or [up], and [down], of each expert."""
    make = KINDS[kind]
    ups = [
        [make(inner, HIDDEN, 3 * number + turn) for turn in range(2 if gated else 1)]
        for number in range(COUNT)
    ]
    return ups, [[make(HIDDEN, inner, 3 * number + 2)] for number in range(COUNT)]


def biases(count: int, width: int, dtype: torch.dtype) -> list[list[Tensor | None]]:
    return [[torch.randn(width).to(dtype) for _ in range(count)] for _ in range(COUNT)]


def none(matrices: list) -> list[list[None]]:
    return [[None] * len(each) for each in matrices]


def mlps(ups, downs, gating: Gating, dtype: torch.dtype, up_bias=None, down_bias=None):
    up = stack(ups, up_bias or none(ups), dtype, DEVICE)
    return ExpertMlps(up, stack(downs, down_bias or none(downs), dtype, DEVICE), gating)


def full(weight: Weight) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()


def expected(x, weights, chosen, ups, downs, act, up_bias=None, down_bias=None) -> Tensor:
    """A loop over tokens, in float64. act: of the outputs of the up matrices."""
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token in range(len(x)):
        for place, expert in enumerate(chosen[token].tolist()):
            parts = [full(weight) @ x[token].double() for weight in ups[expert]]
            if up_bias is not None:
                parts = [p + b.double() for p, b in zip(parts, up_bias[expert], strict=True)]
            added = full(downs[expert][0]) @ act(*parts)
            if down_bias is not None:
                added = added + down_bias[expert][0].double()
            out[token] += weights[token, place].double() * added
    return out


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def chosen_of(tokens: int, top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(tokens)
    how = {"generator": generator, "device": "cpu"}
    rows = [torch.randperm(COUNT - 1, **how)[:top_k] for _ in range(tokens)]
    weights = torch.rand(tokens, top_k, **how) + 0.1
    return weights.to(DEVICE), torch.stack(rows).int().to(DEVICE)


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Of the size of the result: what is between the products is rounded, and so is what is added."""
    assert got.dtype == dtype and got.shape == want.shape
    error = float((got.double() - want).norm() / want.norm())
    assert error < (1.5e-3 if dtype == HALF else 1.5e-2), error


@pytest.fixture(params=TILES)
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gemv_tokens", lambda cc: 0)
    monkeypatch.setattr(module, "tile", lambda *given: TILES[request.param])


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gemv_tokens", lambda cc: 1000)


def check(kind: str, tokens: int, dtype: torch.dtype) -> None:
    ups, downs = made(kind)
    weights, chosen = chosen_of(tokens)
    x = activations(tokens, HIDDEN, dtype)
    got = experts(x, weights, chosen, mlps(ups, downs, Gating("silu"), dtype))
    near(got, expected(x, weights, chosen, ups, downs, silu), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weights_in_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tile", lambda *given: TILES["swapped"])
    check(kind, 3, HALF)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weights_by_rows(kind: str, by_rows: None) -> None:
    check(kind, 2, HALF)


@pytest.mark.parametrize("kind", ["dense", "awq", "mxfp4", "fp8 blocks"])
def test_bfloat16(kind: str) -> None:
    check(kind, 2, BF16)


@pytest.mark.parametrize("kind", ["dense", "awq"])
def test_experts_with_several_tiles(kind: str, tiled: None) -> None:
    """23 tokens on 4 of 5 experts: some have more pairs than a tile has rows, one has none."""
    check(kind, 23, HALF)


@pytest.mark.parametrize("path", [0, 1000])
@pytest.mark.parametrize(
    ("gating", "act"),
    [
        (Gating("gelu_tanh"), lambda g, u: F.gelu(g, approximate="tanh") * u),
        (Gating("relu2"), lambda g, u: F.relu(g).square() * u),
        (Gating("relu2", gated=False), lambda u: F.relu(u).square()),
        (Gating("silu", gated=False), F.silu),
        (
            Gating("silu", clamp=(1.7, 0.6)),
            lambda g, u: (
                (u.clamp(-0.6, 0.6) + 1) * g.clamp(max=0.6) * (1.7 * g.clamp(max=0.6)).sigmoid()
            ),
        ),
    ],
)
def test_activations_and_biases(
    gating: Gating, act, path: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gemv_tokens", lambda cc: path)
    ups, downs = made("dense", gating.gated, inner=33)
    up_bias, down_bias = biases(len(ups[0]), 33, HALF), biases(1, HIDDEN, HALF)
    weights, chosen = chosen_of(2)
    x = activations(2, HIDDEN, HALF)
    got = experts(x, weights, chosen, mlps(ups, downs, gating, HALF, up_bias, down_bias))
    near(got, expected(x, weights, chosen, ups, downs, act, up_bias, down_bias), HALF)


def test_what_a_token_gets_is_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gemv_tokens", lambda cc: 0)
    ups, downs = made("awq")
    found = mlps(ups, downs, Gating("silu"), HALF)
    weights, chosen = chosen_of(9)
    x = activations(9, HIDDEN, HALF)
    together = experts(x, weights, chosen, found)
    alone = [experts(x[i : i + 1], weights[i : i + 1], chosen[i : i + 1], found) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_no_tokens_and_one_expert_a_token() -> None:
    ups, downs = made("dense")
    found = mlps(ups, downs, Gating("silu"), HALF)
    weights, chosen = chosen_of(3, top_k=1)
    x = activations(3, HIDDEN, HALF)
    near(experts(x, weights, chosen, found), expected(x, weights, chosen, ups, downs, silu), HALF)
    assert experts(x[:0], weights[:0], chosen[:0], found).shape == (0, HIDDEN)


def test_scales_of_all_experts_have_one_form() -> None:
    """One expert's scales are below float16: then all are bfloat16, or float32 where neither holds them."""
    ups, _ = made("awq")
    for weight in ups[2]:
        weight.scales = (weight.scales.float() * 2.0**-20).to(BF16)
    for each in (*ups[0], *ups[1], *ups[3], *ups[4]):
        each.scales = each.scales.to(BF16)
    assert stack(ups, none(ups), HALF, DEVICE).decode.scale.__name__ == "bfloat16_scale_and_zero"
    ups[1][0].scales = ups[1][0].scales.float() * 1.0001
    assert stack(ups, none(ups), HALF, DEVICE).decode.scale.__name__ == "scale_and_minimum"


def test_a_bias_that_some_experts_have() -> None:
    ups, _ = made("dense")
    some = none(ups)
    some[3][1] = torch.ones(INNER)
    bias = stack(ups, some, HALF, DEVICE).bias
    assert bias.shape == (COUNT, 2 * INNER) and bias.sum() == bias[3, 1::2].sum() == INNER


def test_what_cannot_be_stacked_is_said() -> None:
    ups, downs = made("awq")
    assert why_not_stacked(ups) is None and why_not_stacked(made("act-order")[0]) is None
    assert "all quantized, or none" in why_not_stacked([*ups, [dense(4, 4, 0)]])
    assert "in one way" in why_not_stacked([*ups, *made("gptq-8")[0]])
    orders = made("act-order")[0]
    orders[1][0].perm = orders[1][0].perm.flip(0)
    assert "in one order" in why_not_stacked(orders)
    odd = integer(4, "zeros", 24)
    assert "multiples of 16 columns, not 24" in why_not_stacked([[odd(8, 96, 0)]])
    table = fp4(32)(8, 32, 0)
    table.table = tuple(range(16))
    assert "not the table" in why_not_stacked([[table]])
    with pytest.raises(KernelArgumentError, match="in one order"):
        stack(orders, none(orders), HALF, DEVICE)
    with pytest.raises(KernelArgumentError, match="down takes 48"):
        ups = made("dense", inner=33)[0]
        mlps(ups, downs, Gating("silu"), HALF)


def test_arguments_are_checked() -> None:
    found = mlps(*made("dense"), Gating("silu"), HALF)
    weights, chosen = chosen_of(3)
    x = activations(3, HIDDEN, HALF)
    for wrong in (x[:, :64], x.float(), x[:2]):
        with pytest.raises(KernelArgumentError, match="experts: x"):
            experts(wrong, weights, chosen, found)
    with pytest.raises(KernelArgumentError, match="activation is 'mish'"):
        Gating("mish")


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (5, 3), (32, 32)])
def test_each_tile_has_its_first_number_of_tokens(num_experts: int, top_k: int) -> None:
    def of(tokens: int) -> Tile:
        return tile(90, -(-tokens * top_k // num_experts), 4, 128)

    first = tokens_of_tiles(num_experts, top_k)
    changes = [tokens for tokens in range(2, 1200) if of(tokens) != of(tokens - 1)]
    assert [1, *changes] == list(first)


@pytest.mark.parametrize("cc", [75, 80, 86, 89, 90, 100, 120])
def test_every_card_has_a_path(cc: int) -> None:
    assert (gemv_tokens(cc) > 0) == (cc in (75, 86, 89, 120))
    sizes = [tile(cc, rows, 4, 128).block_m for rows in (1, 8, 9, 16, 17, 64, 1000)]
    assert sizes == ([16] * 7 if cc == 75 else [16, 16, 32, 32, 64, 64, 64])
