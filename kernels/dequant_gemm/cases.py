"""The compile cases of the shared loops for one form of weights, for `make kernels-report`: rooms list their forms."""

from dataclasses import dataclass
from typing import Any

from ..measure.compile_cases import CompileCase
from .dequantize import dequantize
from .gemm import gemm
from .gemv import gemv
from .layout import Decode
from .tiles import HEURISTIC, Tile, tables

_NUMBERS = dict.fromkeys(("M", "N", "K", "padded_out", "k_tiles", "groups"), "i32")
_ALIGNED = ("x", "words", "scales", "bias", "y", "partials", "dense", "N", "K", "padded_out")


@dataclass(frozen=True, slots=True)
class Form:
    """What a room hands to the loops."""

    room: str
    name: str  # "int4 g128"
    decode: Decode
    bits: int
    group: int  # 0: a whole row
    scales: str  # "*i32", "*fp32"


@dataclass(frozen=True, slots=True)
class _Target:
    form: Form
    dtype: str
    min_cc: int
    max_cc: int


def cases_of(form: Form, every_tile: bool) -> list[CompileCase]:
    """One form, for every table of the heuristic: with each tile, or with the one for few rows."""
    cases: list[CompileCase] = []
    shipped = sorted(tables(HEURISTIC), key=lambda t: t.min_cc)
    for table, following in zip(shipped, [*shipped[1:], None], strict=True):
        max_cc = following.min_cc - 1 if following else 1000
        for dtype in ("fp16", "bf16") if table.min_cc >= 80 else ("fp16",):
            target = _Target(form, dtype, table.min_cc, max_cc)
            fitting = [
                tile
                for tile in table.gemm
                if not tile.max_group or 0 < form.group <= tile.max_group
            ]
            cases += [
                *([_gemv(target, table.gemv_block_n, table.gemv_warps)] if table.gemv_rows else []),
                *(_gemm(target, tile) for tile in (fitting if every_tile else fitting[:1])),
                _dequantize(target),
            ]
    return cases


def _gemv(target: _Target, block_n: int, warps: int) -> CompileCase:
    constants = {"HAS_BIAS": False, "EVEN_K": True, "BLOCK_N": block_n, "SPLIT_K": 4}
    return _product("gemv", gemv, target, constants, warps, 1, block_n)


def _gemm(target: _Target, tile: Tile) -> CompileCase:
    constants = {
        "HAS_BIAS": True,
        "EVEN_K": True,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT_K": 4,
        "SWAP": tile.swap,
    }
    name = f"gemm {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}{' swap' if tile.swap else ''}"
    return _product(name, gemm, target, constants, tile.warps, tile.stages, tile.block_n)


def _dequantize(target: _Target) -> CompileCase:
    signature = {
        "words": "*i32",
        "scales": target.form.scales,
        "dense": f"*{target.dtype}",
        **{name: _NUMBERS[name] for name in ("N", "K", "padded_out", "groups")},
    }
    return _case("dequantize", dequantize, target, signature, {"BLOCK_N": 64}, 4, 1, 0)


def _product(
    name: str,
    kernel: Any,
    target: _Target,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    block_n: int,
) -> CompileCase:
    pointer = f"*{target.dtype}"
    signature = {
        "x": pointer,
        "words": "*i32",
        "scales": target.form.scales,
        "bias": pointer,
        "y": pointer,
        "partials": "*fp32",
        "locks": "*i32",
        **_NUMBERS,
    }
    constants = {"HAS_MINIMUM": target.form.decode.has_minimum, **constants}
    decoded = block_n * 32 * (16 // target.form.bits)
    return _case(name, kernel, target, signature, constants, warps, stages, decoded)


def _case(
    name: str,
    kernel: Any,  # the @triton.jit function
    target: _Target,
    signature: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    weights: int,
) -> CompileCase:
    form = target.form
    constants = {
        "CODE": form.decode.code,
        "SCALE": form.decode.scale,
        "BITS": form.bits,
        "GROUP": form.group,
        **constants,
    }
    return CompileCase(
        f"{form.room}-{name} {form.name} {target.dtype} cc{target.min_cc}",
        kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        warps,
        stages,
        target.min_cc,
        target.max_cc,
        tuple(argument for argument in _ALIGNED if argument in signature),
        weights,
    )
