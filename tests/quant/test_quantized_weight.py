"""QuantizedWeight against its own definition, element by element."""

import math
from dataclasses import replace

import pytest
import torch

from nibble.quant.weight import QuantizedWeight, can_fuse, fuse, part, scaled_by_row

KINDS = ["symmetric", "zeros", "mins", "fp8"]


def weight_of(
    kind: str = "zeros", out=6, width=20, block=(1, 8), bits=4, perm=False, seed=0
) -> QuantizedWeight:
    """Random, its last group partial."""
    generator = torch.Generator().manual_seed(seed)
    grid = (math.ceil(out / block[0]), math.ceil(width / block[1]))
    codes = torch.randint(0, 2**bits, (out, width), generator=generator, dtype=torch.uint8)
    scales = torch.rand(grid, generator=generator) + 0.5
    order = torch.randperm(width, generator=generator) if perm else None
    if kind == "fp8":
        codes = torch.randn(out, width, generator=generator).to(torch.float8_e4m3fn)
        return QuantizedWeight(codes, scales, kind="fp8", bits=8, block=block, perm=order)
    zeros = torch.randint(0, 2**bits, grid, generator=generator, dtype=torch.uint8)
    mins = torch.randn(grid, generator=generator)
    return QuantizedWeight(
        codes,
        scales,
        zeros=zeros if kind == "zeros" else None,
        mins=mins if kind == "mins" else None,
        perm=order,
        bits=bits,
        block=block,
    )


def by_definition(w: QuantizedWeight) -> list[list[float]]:
    """The module's docstring, carried out."""
    out, width = w.codes.shape
    dense = [[0.0] * width for _ in range(out)]
    for o in range(out):
        for j in range(width):
            r, c = o // w.block[0], j // w.block[1]
            code, scale = float(w.codes[o, j].float()), float(w.scales[r, c])
            if w.kind == "fp8":
                value = code * scale
            elif w.mins is not None:
                value = code * scale + float(w.mins[r, c])
            else:
                zero = float(w.zeros[r, c]) if w.zeros is not None else 2 ** (w.bits - 1)
                value = (code - zero) * scale
            dense[o][int(w.perm[j]) if w.perm is not None else j] = value
    return dense


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("block", [(1, 8), (4, 8), (1, 20), (6, 20), (2, 1)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dense_is_what_the_definition_says(kind, bits, block, perm):
    weight = weight_of(kind, bits=bits, block=block, perm=perm)
    torch.testing.assert_close(
        weight.dequantize(), torch.tensor(by_definition(weight)), rtol=1e-6, atol=1e-6
    )
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scales": torch.ones(6, 2)}, "scales has shape"),
        ({"zeros": torch.ones(5, 3)}, "zeros has shape"),
        ({"mins": torch.ones(6, 3)}, "zeros or mins, not both"),
        ({"perm": torch.arange(19)}, "perm has shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, problem):
    with pytest.raises(ValueError, match=problem):
        replace(weight_of(), **change)


def test_bytes_are_those_of_codes_packed_densely():
    weight = weight_of(out=8, width=64, block=(1, 16), bits=4, perm=True)
    groups = 8 * 4
    assert weight.nbytes == 8 * 64 // 2 + groups * 4 + groups // 2 + 64 * 8  # float32, int64
    assert weight_of("mins", out=8, width=64, block=(1, 16), bits=2).nbytes == 128 + groups * 8
    assert weight_of("fp8", out=8, width=64, block=(1, 64)).nbytes == 512 + 8 * 4


@pytest.mark.parametrize(("first", "second"), [*zip(KINDS, KINDS, strict=True), KINDS[:2]])
def test_fused_is_one_above_the_other(first, second):
    """Also a symmetric one above one with zero points, of any number of bits."""
    for bits in (2, 4) if "fp8" not in (first, second) else (8,):
        parts = [weight_of(first, bits=bits, seed=1), weight_of(second, bits=bits, seed=2)]
        assert can_fuse(parts) and can_fuse(parts[::-1])
        for order in (parts, parts[::-1]):
            together = torch.cat([one.dequantize() for one in order])
            assert torch.equal(fuse(order).dequantize(), together)


@pytest.mark.parametrize(
    "other",
    [
        weight_of(bits=8),
        weight_of("mins"),
        weight_of("fp8"),
        weight_of(block=(1, 10)),
        weight_of(width=24),
        weight_of(perm=True),
        replace(weight_of(), act_quant="token"),
        replace(weight_of(), scales=weight_of().scales.half()),
        replace(weight_of(), input_scale=torch.ones(1)),
        weight_of(block=(2, 8)),
    ],
)
def test_what_would_change_a_value_is_not_fused(other):
    assert can_fuse([weight_of(), weight_of(seed=5)])
    assert not can_fuse([weight_of(), other]) and not can_fuse([other, weight_of()])


def test_blocks_of_rows_are_fused_only_where_they_end_together():
    whole, cut = weight_of("fp8", out=8, block=(4, 8)), weight_of("fp8", out=6, block=(4, 8))
    assert can_fuse([whole, whole])
    assert not can_fuse([cut, whole])
    assert torch.equal(fuse([whole, whole]).dequantize(), whole.dequantize().repeat(2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_put_together_are_the_whole(kind):
    weight = weight_of(kind, out=9)
    parts = [part(weight, rows) for rows in (slice(0, 2), slice(2, 6), slice(6, 9))]
    assert [p.out_features for p in parts] == [2, 4, 3]
    assert torch.equal(fuse(parts).dequantize(), weight.dequantize())


def test_one_scale_for_all_becomes_one_for_each_row():
    weight = weight_of("fp8", block=(6, 20))
    by_row = scaled_by_row(weight)
    assert by_row.block == (1, 20) and by_row.scales.shape == (6, 1)
    assert torch.equal(by_row.dequantize(), weight.dequantize())
    for other in (weight_of("fp8"), weight_of("zeros", block=(6, 20))):
        assert scaled_by_row(other) is other
