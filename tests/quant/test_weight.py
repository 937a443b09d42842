"""Parts of weights: what is cut out is what the whole has there."""

from dataclasses import replace

import pytest
import torch

from nibble.quant.weight import QuantizedWeight, part


def random_weight(
    rows: int, cols: int, block: tuple[int, int], offset: str | None
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    offsets = {
        "zeros": {"zeros": torch.randint(0, 16, grid, generator=generator).to(torch.uint8)},
        "mins": {"mins": torch.randn(grid, generator=generator)},
        None: {},
    }[offset]
    codes = torch.randint(0, 16, (rows, cols), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes, torch.rand(grid, generator=generator), block=block, **offsets)


@pytest.mark.parametrize("block", [(1, 32), (16, 32), (1, 128)])
@pytest.mark.parametrize("offset", ["zeros", "mins", None])
def test_a_part_dequantizes_to_that_part_of_the_whole(block, offset) -> None:
    weight = random_weight(48, 128, block, offset)
    whole = weight.dequantize()
    rows, cols = slice(16, 48), slice(32, 96) if block[1] == 32 else slice(None)
    cut = part(weight, rows, cols)
    assert isinstance(cut, QuantizedWeight)
    assert torch.equal(cut.dequantize(), whole[rows, cols])
    assert torch.equal(part(whole, rows, cols), whole[rows, cols])


def test_a_part_that_cuts_a_scale_or_act_order_is_refused() -> None:
    weight = random_weight(48, 128, (16, 32), None)
    with pytest.raises(ValueError, match="columns 0 to 40 cut a scale that 32 columns share"):
        part(weight, cols=slice(0, 40))
    with pytest.raises(ValueError, match="rows 8 to 48 cut"):
        part(weight, rows=slice(8, None))
    ordered = replace(random_weight(48, 128, (1, 32), None), perm=torch.randperm(128))
    assert torch.equal(part(ordered, slice(0, 16)).dequantize(), ordered.dequantize()[:16])
    with pytest.raises(ValueError, match="act-order"):
        part(ordered, cols=slice(0, 64))
