"""Every shipped configuration of the FP8 products, for `make kernels-report`."""

from dataclasses import dataclass, replace

import triton

from ..dequant_gemm.cases import Form, cases_of
from ..dequant_gemm.layout import Decode
from ..fused.rows import warps
from ..measure.compile_cases import CompileCase
from .decode import e4m3, float_scale
from .gemm import gemm
from .launch import CHUNK, GROUP_M
from .layout import TILE_OUT
from .quantize import quantize
from .tiles import FOLDER, Table, Tile, tables
from .w8a8 import MAX_WIDTH

_NUMBERS = dict.fromkeys(
    (
        "M",
        "N",
        "K",
        "x_stride",
        "weight_stride",
        "w_scale_stride",
        "x_scale_row",
        "x_scale_group",
        "k_tiles",
    ),
    "i32",
)


@dataclass(frozen=True, slots=True)
class Scales:
    """Where the scales of a product stand: features and rows of W, features of x (0: all) that share one."""

    name: str
    group: int
    rows: int
    x_group: int


CHANNEL, BLOCK = Scales("channel", 0, 1, 0), Scales("block", 128, 128, 128)
OTHER = Scales("group 64", 64, 1, 64)  # no rows that share scales, groups shorter than a tile of K


def compile_cases() -> list[CompileCase]:
    """Scales per block of 128 and per output channel, each with every tile; W8A16, W8A8 and its quantization."""
    decode = Decode(e4m3, float_scale)
    forms = [
        Form("w8a16", f"fp8 g{group or 'row'}", decode, 8, group, "*fp32") for group in (128, 0)
    ]
    w8a16 = [case for form in forms for case in cases_of(form, every_tile=True)]
    return w8a16 + _w8a8_cases() + _quantize_cases()


def _w8a8_cases() -> list[CompileCase]:
    cases = []
    shipped = sorted(tables(FOLDER / "heuristic.json"), key=lambda table: table.min_cc)
    for table, following in zip(shipped, [*shipped[1:], None], strict=True):
        cards = (table.min_cc, following.min_cc - 1 if following else 1000)
        cases += [
            _gemm(table, cards, tile, scales) for tile in table.gemm for scales in (CHANNEL, BLOCK)
        ]
        own = [tile for tile in table.gemm if tile.rows <= table.quantize_rows]
        cases += [
            _gemm(table, cards, tile, scales, quantize)
            for tile in own
            for scales, quantize in ((CHANNEL, "group"), (BLOCK, "group"), (CHANNEL, "static"))
        ]
        cases += [
            _gemm(table, cards, table.gemm[0], CHANNEL, "group", "fp16"),
            _one_row(_gemm(table, cards, table.gemm[0], CHANNEL, "group")),
            *(_gemm(table, cards, tile, OTHER) for tile in (table.gemm[0], table.gemm[-1])),
            *(
                _gemm(table, cards, tile, CHANNEL, even=False)
                for tile in (table.gemm[0], table.gemm[-1])
            ),
        ]
    return cases


def _gemm(
    table: Table,
    cards: tuple[int, int],
    tile: Tile,
    scales: Scales,
    quantize: str = "no",
    dtype: str = "bf16",
    even: bool = True,
) -> CompileCase:
    step = min(tile.block_k, scales.group or tile.block_k)
    width = tile.block_n if not scales.group or scales.rows % tile.block_n == 0 else TILE_OUT
    signature = {
        "x": "*fp8e4nv" if quantize == "no" else f"*{dtype}",
        "x_scales": "*fp32",
        "weight": "*fp8e4nv",
        "w_scales": "*fp32",
        "bias": f"*{dtype}",
        "y": f"*{dtype}",
        "partials": "*fp32",
        "locks": "*i32",
        **_NUMBERS,
    }
    constants = {
        "QUANTIZE": quantize,
        "X_GROUP": scales.x_group if quantize == "no" else 0,
        "W_ROWS": scales.rows,
        "W_GROUP": scales.group,
        "HAS_BIAS": True,
        "EVEN_K": even,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": width,
        "BLOCK_K": step,
        "SPLIT_K": 4,
        "SWAP": tile.swap,
        "PROMOTE": table.promote,
        "NATIVE_FP8": True,
        "GROUP_M": GROUP_M,
    }
    form = (
        f"{tile.block_m}x{width}x{step} w{tile.warps} s{tile.stages}{' swap' * tile.swap} {scales.name}"
        f"{'' if quantize == 'no' else ' quantize ' + quantize}{' odd K' * (not even)}"
    )
    aligned = tuple(
        name
        for name, kind in signature.items()
        if (name != "locks" and kind.startswith("*"))
        or name in ("N", "K", "x_stride", "weight_stride")
    )
    return CompileCase(
        f"w8a8 {form} {dtype} cc{table.min_cc}",
        gemm,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        tile.warps,
        tile.stages,
        *cards,
        aligned=aligned,
        weights_per_program=width * step,
        fp8_dot=True,
    )


def _one_row(case: CompileCase) -> CompileCase:
    """As Triton compiles it for M = 1, which it takes for a constant: what decoding alone runs."""
    return replace(
        case,
        name=f"{case.name} M=1",
        signature={**case.signature, "M": "constexpr"},
        constexprs={**case.constexprs, "M": 1},
    )


def _quantize_cases() -> list[CompileCase]:
    """Rows of small and the largest models with a scale each, groups, and a static scale."""
    forms = [
        ("token", triton.next_power_of_2(width), False) for width in (576, 4096, 14336, MAX_WIDTH)
    ]
    return [
        _quantize(*form, dtype)
        for form in (*forms, ("group", 128, False), ("static", CHUNK, True))
        for dtype in ("fp16", "bf16")
    ]


def _quantize(kind: str, group: int, static: bool, dtype: str) -> CompileCase:
    together = max(1, CHUNK // group)
    signature = {
        "x": f"*{dtype}",
        "codes": "*u8",
        "scales": "*fp32",
        "x_stride": "i32",
        "M": "i32",
        "K": "i32",
        "groups": "i32",
    }
    constants = {"GROUP": group, "GROUPS": together, "STATIC": static, "NATIVE_FP8": True}
    return CompileCase(
        f"quantize {kind} {group} {dtype}",
        quantize,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        warps(group * together),
        1,
        min_cc=89,
        aligned=("x", "codes", "scales", "x_stride", "K"),
    )
