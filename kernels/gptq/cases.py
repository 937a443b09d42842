"""Every shipped configuration of the integer products, for `make kernels-report`."""

from ..compile_cases import CompileCase
from . import products
from .tuning import FOLDER, Table, Tile, tables

_COMMON = {"words": "*i32", "bias": None, "y": None, "partials": "*fp32", "locks": "*i32", "M": "i32", "N": "i32",
           "K": "i32", "stride": "i32", "tiles": "i32", "groups": "i32"}
_ALIGNED = ("x", "words", "scales", "bias", "y", "partials", "dense", "N", "K", "stride")
# bits, group, minima: what conversions write (128, 64, 32, whole rows), GGUF, and the narrow groups
WEIGHTS = ((4, 128, False), (4, 64, False), (4, 32, False), (4, 32, True), (4, 0, False), (4, 16, False),
           (2, 64, False), (3, 128, False), (8, 128, False), (8, 0, False))


def compile_cases() -> list[CompileCase]:
    """4-bit weights in groups of 128 with each tile of each table; the other weights with the tiles for few rows."""
    cases: list[CompileCase] = []
    shipped = sorted(tables(FOLDER / "heuristic.json"), key=lambda t: t.min_cc)
    for table, following in zip(shipped, [*shipped[1:], None], strict=True):
        max_cc = following.min_cc - 1 if following else 1000
        for dtype in ("fp16", "bf16") if table.min_cc >= 80 else ("fp16",):
            for weight in WEIGHTS:
                whole = weight == WEIGHTS[0]
                tiles = table.gemm if whole else table.gemm[:1]
                cases += [*([gemv(table, max_cc, dtype, weight)] if table.gemv_rows else []),
                          *(gemm(table, max_cc, dtype, weight, tile) for tile in tiles),
                          dequantize(table, max_cc, dtype, weight)]
    return cases


def gemv(table: Table, max_cc: int, dtype: str, weight: tuple[int, int, bool]) -> CompileCase:
    constants = {**_weight(weight), "HAS_BIAS": False, "EVEN_K": True, "BLOCK_N": table.gemv_block_n,
                 "SPLIT_K": 4}
    return _case("gemv", products.gemv, dtype, weight, constants, table.gemv_warps, 1, table.min_cc, max_cc,
                 table.gemv_block_n)


def gemm(table: Table, max_cc: int, dtype: str, weight: tuple[int, int, bool], tile: Tile) -> CompileCase:
    constants = {**_weight(weight), "HAS_BIAS": True, "EVEN_K": True, "BLOCK_M": tile.block_m,
                 "BLOCK_N": tile.block_n, "SPLIT_K": 4, "SWAP": tile.swap}
    name = f"gemm {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}{' swap' if tile.swap else ''}"
    return _case(name, products.gemm, dtype, weight, constants, tile.warps, tile.stages, table.min_cc, max_cc,
                 tile.block_n)


def dequantize(table: Table, max_cc: int, dtype: str, weight: tuple[int, int, bool]) -> CompileCase:
    signature = {"words": "*i32", "scales": "*fp32" if weight[2] else "*i32", "dense": f"*{dtype}", "N": "i32",
                 "K": "i32", "stride": "i32", "groups": "i32"}
    constants = {**_weight(weight), "BLOCK_N": 64}
    return _build(f"dequantize {_label(weight)} {dtype}", products.dequantize, signature, constants, 4, 1, table.min_cc,
                  max_cc, 0)


def _weight(weight: tuple[int, int, bool]) -> dict:
    bits, group, mins = weight
    return {"BITS": bits, "GROUP": group, "MINS": mins, "BF16_SCALE": False}


def _label(weight: tuple[int, int, bool]) -> str:
    bits, group, mins = weight
    return f"int{bits} g{group or 'row'}{' mins' if mins else ''}"


def _case(name: str, kernel, dtype: str, weight, constants: dict, warps: int, stages: int, min_cc: int, max_cc: int,
          block_n: int) -> CompileCase:
    pointer = f"*{dtype}"
    signature = {"x": pointer, "words": "*i32", "scales": "*fp32" if weight[2] else "*i32",
                 **_COMMON, "bias": pointer, "y": pointer}
    return _build(f"{name} {_label(weight)} {dtype}", kernel, signature, constants, warps, stages, min_cc, max_cc,
                  block_n * 32 * (16 // weight[0]))


def _build(name: str, kernel, signature: dict, constants: dict, warps: int, stages: int, min_cc: int, max_cc: int,
           weights: int) -> CompileCase:
    return CompileCase(f"{name} cc{min_cc}", kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants,
                       warps, stages, min_cc, max_cc, tuple(a for a in _ALIGNED if a in signature), weights)
