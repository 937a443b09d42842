"""What `make kernels-report` compiles of experts: routing, alignment, each kind of weights on each card."""

from dataclasses import dataclass
from typing import Any

import triton

from ..awq.decode import half_scale_and_zero
from ..dequant_gemm.cases import Form
from ..dequant_gemm.decode import integers
from ..dequant_gemm.layout import Decode
from ..dequant_gemm.tiles import Tile
from ..fp4.decode import bfloat16_scale, e2m1
from ..fp8.decode import e4m3, float_scale
from ..gguf.decode import scale_and_minimum
from ..measure.compile_cases import CompileCase
from .align import BLOCK, align_kernel
from .products import grouped_gemm, grouped_gemv
from .route import constants, route_kernel
from .routing import Routing
from .tiles import GEMV_BLOCK_N, GEMV_WARPS, gemv_tokens, tile
from .weight import DENSE_BITS

CARDS = ((75, 79), (80, 85), (86, 89), (90, 99), (100, 119), (120, 1000))  # that share their tiles
ROWS = (8, 16, 64, 128)  # of an expert: one for each tile
ROUTINGS = {  # Qwen 3's, DeepSeek V3's, Nemotron 3's
    "128 softmax": Routing(128, 8, "softmax", True),
    "256 sigmoid groups": Routing(256, 8, "sigmoid", True, 2.5, 8, 4, 2),
    "512 sigmoid": Routing(512, 22, "sigmoid", True, 5.0),
}
INT4 = Form("moe", "int4 g128", Decode(integers, half_scale_and_zero), 4, 128, "*i32")
FORMS = (
    INT4,
    Form("moe", "int2 g64", Decode(integers, half_scale_and_zero), 2, 64, "*i32"),
    Form("moe", "int3 g128", Decode(integers, half_scale_and_zero), 3, 128, "*i32"),
    Form("moe", "int8 g128", Decode(integers, half_scale_and_zero), 8, 128, "*i32"),
    Form("moe", "int4 g32 mins", Decode(integers, scale_and_minimum, True), 4, 32, "*fp32"),
    Form("moe", "e4m3 g128", Decode(e4m3, float_scale), 8, 128, "*fp32"),
    Form("moe", "e2m1 g32", Decode(e2m1, bfloat16_scale), 4, 32, "*i16"),
    Form("moe", "e2m1 g16", Decode(e2m1, float_scale), 4, 16, "*fp32"),
)
_NUMBERS = ("num_pairs", "N", "K", "padded_out", "k_tiles", "groups", "words_stride")
_ALIGNED = ("N", "K", "padded_out", "words_stride", "scales_stride")


@dataclass(frozen=True, slots=True)
class _Target:
    """A kind of weights, None: dense, for some cards."""

    form: Form | None
    dtype: str
    min_cc: int
    max_cc: int


def compile_cases() -> list[CompileCase]:
    """Routing and alignment; int4, the most served, with each tile; the others with the tiles for few rows."""
    cases = [_route(name, routing) for name, routing in ROUTINGS.items()]
    cases += [_align(block_m) for block_m in (16, 32, 64)]
    for min_cc, max_cc in CARDS:
        for dtype in ("fp16", "bf16") if min_cc >= 80 else ("fp16",):
            for form in (INT4, None, *FORMS[1:]):
                target = _Target(form, dtype, min_cc, max_cc)
                cases += _products(target, ROWS if form in (INT4, None) else ROWS[:1])
    return cases


def _products(target: _Target, rows: tuple[int, ...]) -> list[CompileCase]:
    bits, group = (target.form.bits, target.form.group) if target.form else (DENSE_BITS, 0)
    tiles = dict.fromkeys(tile(target.min_cc, count, bits, group) for count in rows)
    found = [_gemm(target, each, "silu", True) for each in tiles]
    first = next(iter(tiles))
    if target.form is INT4:
        found += [_gemm(target, first, "clamped", True, perm=True), _gemm(target, first, "", False)]
    return found + ([_gemv(target)] if gemv_tokens(target.min_cc) else [])


def _gemm(
    target: _Target, tile: Tile, activation: str, gated: bool, perm: bool = False
) -> CompileCase:
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SWAP": tile.swap}
    shape = (
        f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}{' swap' if tile.swap else ''}"
    )
    name = f"gemm {shape} {activation or 'down'}{' perm' if perm else ''}"
    return _product(
        name, grouped_gemm, target, constants, activation, gated, perm, tile.warps, tile.stages
    )


def _gemv(target: _Target) -> CompileCase:
    constants = {"BLOCK_N": GEMV_BLOCK_N}
    return _product("gemv", grouped_gemv, target, constants, "silu", True, False, GEMV_WARPS, 1)


def _product(
    name: str,
    kernel: Any,  # the @triton.jit function
    target: _Target,
    constants: dict[str, Any],
    activation: str,
    gated: bool,
    perm: bool,
    warps: int,
    stages: int,
) -> CompileCase:
    form, pointer = target.form, f"*{target.dtype}"
    kinds = dict.fromkeys(("x", "y", "bias"), pointer) | dict.fromkeys(_NUMBERS, "i32")
    kinds |= dict.fromkeys(("chosen", "pairs", "experts", "num_tiles"), "*i32")
    kinds |= {"scales_stride": "i32", "alpha": "fp32", "limit": "fp32", "pair_weights": "*fp32"}
    kinds |= {"perm": "*i32", "words": "*i32" if form else pointer}
    kinds["scales"] = form.scales if form else pointer
    absent = [*([] if perm else ["perm"]), *(["pair_weights"] if gated else ["bias"])]
    given = {
        "TOP_K": 8 if gated else 1,
        "ACTIVATION": activation,
        "GATED": gated,
        "CODE": form.decode.code if form else None,
        "SCALE": form.decode.scale if form else None,
        "HAS_MINIMUM": form.decode.has_minimum if form else False,
        "BITS": form.bits if form else DENSE_BITS,
        "GROUP": form.group if form else 0,
        "EVEN_K": True,
        **constants,
        **dict.fromkeys([*absent, *([] if form else ["scales"])]),
    }
    decoded = constants["BLOCK_N"] * 32 * (16 // form.bits) if form else 0
    label = f"{name} {form.name if form else 'dense'} {target.dtype} cc{target.min_cc}"
    return _case(label, kernel, kinds, given, warps, stages, target.min_cc, target.max_cc, decoded)


def _route(name: str, routing: Routing) -> CompileCase:
    kinds = dict.fromkeys(("logits", "correction_bias", "weights"), "*fp32")
    kinds |= {"chosen": "*i32", "routed_scale": "fp32"}
    given = {**constants(routing), "scales": None}
    return _case(f"route {name}", route_kernel, kinds, given, 1, 1)


def _align(block_m: int) -> CompileCase:
    kinds = dict.fromkeys(("chosen", "pairs", "experts", "num_tiles"), "*i32") | {
        "num_pairs": "i32"
    }
    sizes = {"NUM_EXPERTS": 128, "PADDED_EXPERTS": triton.next_power_of_2(128)}
    given = {**sizes, "BLOCK_M": block_m, "BLOCK": BLOCK}
    return _case(f"align {block_m}", align_kernel, kinds, given, 4, 1)


def _case(
    name: str,
    kernel: Any,
    kinds: dict[str, str],
    given: dict[str, Any],
    warps: int,
    stages: int,
    min_cc: int = 75,
    max_cc: int = 1000,
    decoded: int = 0,
) -> CompileCase:
    signature = {n: "constexpr" if n in given else kinds[n] for n in kernel.arg_names}
    aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or n in _ALIGNED)
    return CompileCase(
        f"moe-{name}",
        kernel,
        signature,
        given,
        warps,
        stages,
        min_cc,
        max_cc,
        aligned,
        decoded,
    )
