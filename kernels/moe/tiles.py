"""Which path and which tiles the grouped products take, by compute capability and by how many rows an expert has.

An expert's own number of rows lies around the mean; a tile for twice the mean mostly reads its weights once. Tiles are
those of kernels/dequant_gemm/configs/heuristic.json, because decoding a weight costs the same. K is not split: the
experts of one token are programs enough.
"""

import torch

from ..dequant_gemm.tiles import Tile

GEMV_BLOCK_N, GEMV_WARPS = 64, 4
_ROWS = (8, 16, 64)  # an expert has on average, up to here: a tile for each, and one beyond
_MANY = 1 << 20  # rows: any number


def card(device: torch.device) -> int:
    """Compute capability, 8.9 is 89. In the interpreter, on a CPU, that of the first with tensor cores for Triton."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def gemv_tokens(cc: int) -> int:
    """Up to so many tokens, each pair of one and an expert is a product of its own, without tensor cores."""
    if cc < 80:
        return 8
    return 0 if cc in (80, 90) or 100 <= cc < 120 else 1


def tokens_of_tiles(num_experts: int, top_k: int) -> tuple[int, ...]:
    """How many tokens are the first that take each of the tiles."""
    return tuple(rows * num_experts // top_k + 1 for rows in (0, *_ROWS))


def tile(cc: int, rows: int, bits: int, group: int) -> Tile:
    """For `rows` rows an expert on average, and codes of `bits` in groups of `group` features (0: a whole row)."""
    if cc < 80:  # no tensor cores: Triton multiplies by FMA
        return Tile(_MANY, 16, 32, 4, 1)
    few, some, more = _ROWS
    if rows > more:
        return Tile(_MANY, 64, 128, 8, 3, True)
    if rows > some:
        return Tile(more, 64, 64, 4, 3, True)
    block_m = 16 if rows <= few else 32
    consumer = 86 <= cc < 90 and block_m == 16
    # on those a fourth stage spills some registers with narrow groups, and the swapped form with 2 bits
    stages = 3 if consumer and 0 < group <= 32 else 4
    swap = not 100 <= cc < 120 and not (consumer and bits == 2)
    return Tile(block_m // 2, block_m, 64, 4, stages, swap)
