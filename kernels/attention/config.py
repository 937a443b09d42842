"""Which tiles a card gets, from its compute capability: what fits its shared memory and registers without spills.

Shared memory a program may have: cc 7.5 64 KB, 8.0 163 KB, 8.6 and 8.9 99 KB, 9.0 and 10.0 227 KB, 12.0 99 KB. With
3 stages one tile of keys and one of values are on their way (the first stage reads the block table); decode on cc 8.0
and 9.0 takes the same memory with 4. A tile of queries is needed beside them while it is turned into fragments.
"""

from dataclasses import dataclass

LARGE_SHARED = (80, 90, 100)  # data-centre cards


@dataclass(frozen=True, slots=True)
class TileConfig:
    block_m: int  # rows of a tile: queries times the heads of one kv head
    tile: int  # keys a step of the loop takes
    num_warps: int
    num_stages: int


def padded_dim(head_dim: int) -> int:
    """The power of two a head is padded to, as tiles are: 80 and 96 to 128."""
    return 1 << (head_dim - 1).bit_length()


def decode_config(cc: int, head_dim: int, rows: int, cache_bytes: int) -> TileConfig:
    """For tiles of one sequence's newest token. rows: heads of one kv head; cache_bytes: of one value.

    Bound by memory: few rows, and a tile of keys and values on its way.
    """
    dim, block_m = padded_dim(head_dim), max(16, 1 << (rows - 1).bit_length())
    if cc < 80:
        return TileConfig(block_m, 32, 4 if dim < 256 else 8, 1)
    if cc in LARGE_SHARED:
        warps = 8 if cc == 100 and dim == 128 and cache_bytes == 1 else 4  # four spill there
        return TileConfig(block_m, 64 if dim < 256 or cache_bytes == 1 else 32, warps, 3)
    return TileConfig(
        block_m,
        64 if dim <= 64 or (cache_bytes == 1 and dim <= 128) else 32,
        4,
        3 if dim < 256 else 2,
    )


def prefill_config(cc: int, head_dim: int, group: int, cache_bytes: int) -> TileConfig:
    """For tiles of many tokens: bound by the tensor cores. group: query heads of one kv head.

    Below cc 8.0 Triton multiplies without tensor cores, and large tiles spill. From 9.0 on the weights of 128 rows stay
    in the registers of eight warps beside 64 keys, before it only where no code has to be converted.
    """
    dim, least = padded_dim(head_dim), 1 << (group - 1).bit_length()
    if cc < 80:
        config = TileConfig(16, 32, 4 if dim < 256 else 8, 1)
    elif cc in (90, 100):
        block_m = 64 if cc == 100 and dim == 256 and cache_bytes == 1 else 128  # 128 spill
        config = TileConfig(block_m, 64 if dim < 256 else 32, 8, 3 if dim <= 128 else 2)
    elif dim < 256:
        wide = dim <= 64 or (cc == 80 and cache_bytes == 2)
        config = TileConfig(128, 64 if wide else 32, 8, 3 if cc == 80 else 2)
    else:
        config = TileConfig(64, 32, 8, 2)
    return (
        config if config.block_m >= least else TileConfig(least, config.tile, 8, config.num_stages)
    )


def num_splits(
    num_seqs: int, num_kv_heads: int, max_context: int, min_split: int, multiprocessors: int
) -> int:
    """Programs that share the keys of one tile: about two per multiprocessor in all, a power of two, 64 at most.

    A function of maxima alone, so that a captured graph has one grid; short contexts leave splits unused.
    """
    wanted = min(
        -(-2 * multiprocessors // (num_seqs * num_kv_heads)), -(-max_context // min_split), 64
    )
    return 1 << (max(wanted, 1).bit_length() - 1)
