"""Every shipped configuration of the products with integers, for `make kernels-report`."""

from dataclasses import dataclass

from ..measure.compile_cases import CompileCase
from . import products
from .tuning import FOLDER, Tile, tables

_COMMON = {
    "words": "*i32",
    "bias": None,
    "y": None,
    "partials": "*fp32",
    "locks": "*i32",
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "stride": "i32",
    "tiles": "i32",
    "groups": "i32",
}
_ALIGNED = ("x", "words", "scales", "bias", "y", "partials", "dense", "N", "K", "stride")
# bits, group, minima: what conversions write (128, 64, 32, whole rows), GGUF, and the narrow groups
WEIGHTS = (
    (4, 128, False),
    (4, 64, False),
    (4, 32, False),
    (4, 32, True),
    (4, 0, False),
    (4, 16, False),
    (2, 64, False),
    (3, 128, False),
    (8, 128, False),
    (8, 0, False),
)
Weight = tuple[int, int, bool]


def compile_cases() -> list[CompileCase]:
    """4-bit weights in groups of 128 with each tile of each table; the other weights with the tiles for few rows."""
    return [
        case for weight in WEIGHTS for case in cases_of(weight, every_tile=weight == WEIGHTS[0])
    ]


def cases_of(weight: Weight, every_tile: bool, fp8: bool = False) -> list[CompileCase]:
    """One kind of weight, for every table of the heuristic."""
    cases: list[CompileCase] = []
    shipped = sorted(tables(FOLDER / "heuristic.json"), key=lambda t: t.min_cc)
    for table, following in zip(shipped, [*shipped[1:], None], strict=True):
        max_cc = following.min_cc - 1 if following else 1000
        for dtype in ("fp16", "bf16") if table.min_cc >= 80 else ("fp16",):
            target = Target(dtype, weight, fp8, table.min_cc, max_cc)
            fitting = [
                tile for tile in table.gemm if not tile.max_group or 0 < weight[1] <= tile.max_group
            ]
            tiles = fitting if every_tile else fitting[:1]
            cases += [
                *([gemv(target, table.gemv_block_n, table.gemv_warps)] if table.gemv_rows else []),
                *(gemm(target, tile) for tile in tiles),
                dequantize(target),
            ]
    return cases


@dataclass(frozen=True, slots=True)
class Target:
    """What of a case does not depend on the kernel."""

    dtype: str
    weight: Weight  # bits, group, minima
    fp8: bool
    min_cc: int
    max_cc: int

    @property
    def label(self) -> str:
        bits, group, mins = self.weight
        return f"{'fp' if self.fp8 else 'int'}{bits} g{group or 'row'}{' mins' if mins else ''} {self.dtype}"

    @property
    def constants(self) -> dict:
        bits, group, mins = self.weight
        return {"BITS": bits, "FP8": self.fp8, "GROUP": group, "MINS": mins, "BF16_SCALE": False}

    @property
    def scales(self) -> str:
        return "*fp32" if self.weight[2] or self.fp8 else "*i32"


def gemv(target: Target, block_n: int, warps: int) -> CompileCase:
    constants = {"HAS_BIAS": False, "EVEN_K": True, "BLOCK_N": block_n, "SPLIT_K": 4}
    return _product("gemv", products.gemv, target, constants, warps, 1, block_n)


def gemm(target: Target, tile: Tile) -> CompileCase:
    constants = {
        "HAS_BIAS": True,
        "EVEN_K": True,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT_K": 4,
        "SWAP": tile.swap,
    }
    name = f"gemm {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}{' swap' if tile.swap else ''}"
    return _product(name, products.gemm, target, constants, tile.warps, tile.stages, tile.block_n)


def dequantize(target: Target) -> CompileCase:
    signature = {
        "words": "*i32",
        "scales": target.scales,
        "dense": f"*{target.dtype}",
        "N": "i32",
        "K": "i32",
        "stride": "i32",
        "groups": "i32",
    }
    return _case("dequantize", products.dequantize, target, signature, {"BLOCK_N": 64}, 4, 1, 0)


def _product(
    name: str, kernel, target: Target, constants: dict, warps: int, stages: int, block_n: int
) -> CompileCase:
    pointer = f"*{target.dtype}"
    signature = {
        "x": pointer,
        "words": "*i32",
        "scales": target.scales,
        **_COMMON,
        "bias": pointer,
        "y": pointer,
    }
    return _case(
        name,
        kernel,
        target,
        signature,
        constants,
        warps,
        stages,
        block_n * 32 * (16 // target.weight[0]),
    )


def _case(
    name: str,
    kernel,
    target: Target,
    signature: dict,
    constants: dict,
    warps: int,
    stages: int,
    weights: int,
) -> CompileCase:
    constants = {**target.constants, **constants}
    aligned = tuple(a for a in _ALIGNED if a in signature)
    return CompileCase(
        f"{name} {target.label} cc{target.min_cc}",
        kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        warps,
        stages,
        target.min_cc,
        target.max_cc,
        aligned,
        weights,
    )
