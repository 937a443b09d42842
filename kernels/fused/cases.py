"""What `make kernels-report` compiles: each kernel as it is launched for small and large models, with every cache."""

from collections.abc import Mapping
from typing import Any

import triton

from ..measure.compile_cases import CompileCase
from .activation import PIECE, _gated_kernel
from .norm import _rms_norm_kernel
from .rope import PROGRAM
from .rope_kernels import rope_kernel
from .rows import warps

PAGES = {"int8": "*i8", "fp8": "*u8"}


def compile_cases() -> list[CompileCase]:
    """FP8 is compiled twice: with the conversion in integers, for any card, and with that of cards from 8.9 on."""
    cases = [_norm(width) for width in (576, 4096, 8192)]
    cases += [
        _gated(width, activation)
        for width in (1536, 14336, 28672)
        for activation in ("silu", "gelu_tanh")
    ]
    cases += [
        _rope(code, native, code != "none", heads, dim, norm)
        for code, native in (("none", False), ("int8", False), ("fp8", False), ("fp8", True))
        for heads, dim, norm in ((9, 64, False), (32, 128, True), (4, 256, True), (32, 96, False))
    ]
    cases += [
        _rope("none", False, False, 32, 128, True, interleaved=True),
        _rope("int8", False, True, 8, 256, True, v_norm=True),
        _rope("none", False, False, 8, 256, True, cached=False),
    ]
    return [
        *cases,
        _norm(4096, dtype="bf16", gemma=True),
        _gated(14336, "silu", dtype="bf16"),
        _rope("fp8", True, False, 32, 128, True, dtype="bf16"),
        _rope("none", False, False, 32, 128, True, dtype="bf16"),
    ]


def _norm(width: int, dtype: str = "fp16", gemma: bool = False) -> CompileCase:
    block = triton.next_power_of_2(width)
    pointers = {
        "x_ptr": f"*{dtype}",
        "residual_ptr": f"*{dtype}",
        "weight_ptr": "*fp32" if gemma else f"*{dtype}",
        "post_weight_ptr": "*fp32" if gemma else None,
        "out_ptr": f"*{dtype}",
    }
    numbers = dict.fromkeys(("x_stride", "residual_stride"), "i32")
    numbers |= dict.fromkeys(("eps", "post_eps", "scale"), "fp32")
    constants = {"WIDTH": width, "BLOCK": block, "OFFSET": 1.0 if gemma else 0.0}
    name = f"norm-{width}-{dtype}{'-gemma' * gemma}"
    return _case(name, _rms_norm_kernel, pointers, numbers, constants, warps(block))


def _gated(width: int, activation: str, dtype: str = "fp16") -> CompileCase:
    block = min(triton.next_power_of_2(width), PIECE)
    pointers = {"gate_up_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    constants = {"WIDTH": width, "BLOCK": block, "ACTIVATION": activation}
    name = f"gated-{width}-{activation}-{dtype}"
    return _case(name, _gated_kernel, pointers, {"gate_up_stride": "i32"}, constants, warps(block))


def _rope(
    code: str,
    native: bool,
    per_head: bool,
    heads: int,
    dim: int,
    norm: bool,
    dtype: str = "fp16",
    *,
    v_norm: bool = False,
    interleaved: bool = False,
    cached: bool = True,
) -> CompileCase:
    pairs = triton.next_power_of_2(dim // 2)
    program_heads = min(triton.next_power_of_2(heads), PROGRAM // (2 * pairs))
    page = f"*{dtype}" if code == "none" else PAGES[code]
    scale = "*fp32" if code != "none" else None
    pointers = {
        "qkv_ptr": f"*{dtype}",
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "position_ptr": "*i64",
        "slot_ptr": "*i64",
        "q_weight_ptr": f"*{dtype}" if norm else None,
        "k_weight_ptr": f"*{dtype}" if norm else None,
        "keys_ptr": page,
        "values_ptr": page,
        "key_scales_ptr": scale,
        "value_scales_ptr": scale,
    }
    numbers = dict.fromkeys(("qkv_stride", "table_stride", "block_size"), "i32") | {"eps": "fp32"}
    numbers |= dict.fromkeys(
        [
            f"{kind}_stride_{axis}"
            for kind in ("k", "v", "ks", "vs")
            for axis in (("h", "b", "o") if len(kind) == 1 else ("b", "o", "h"))
        ],
        "i32",
    )
    constants = {
        "Q_HEADS": heads,
        "KV_HEADS": max(1, heads // 4) if cached else 0,
        "DIM": dim,
        "ROTARY": dim,
        "HEADS": program_heads,
        "PAIRS": pairs,
        "OFFSET": 0.0,
        "CODE": code,
        "PER_HEAD": per_head,
        "NATIVE_FP8": native,
        "V_NORM": v_norm,
        "INTERLEAVED": interleaved,
    }
    kind = "head" if per_head else "tensor" if code != "none" else "16bit"
    extra = "-vnorm" * v_norm + "-interleaved" * interleaved + "-queries" * (not cached)
    return _case(
        f"rope-{heads}x{dim}-{dtype}-{code}-{kind}{extra}",
        rope_kernel,
        pointers,
        numbers,
        constants,
        warps(2 * program_heads * pairs),
    )


def _case(
    name: str,
    kernel: Any,  # the @triton.jit function
    pointers: Mapping[str, str | None],
    numbers: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
) -> CompileCase:
    absent = {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: kind or "constexpr" for argument, kind in pointers.items()} | numbers
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = [
        name for name, kind in kinds.items() if kind.startswith("*") or name.endswith("stride")
    ]
    native, bf16 = constants.get("NATIVE_FP8", False), "-bf16" in name
    return CompileCase(
        f"fused-{name}" + "-native" * native,
        kernel,
        {name: kinds[name] for name in kernel.arg_names},
        absent | constants,
        num_warps,
        num_stages=1,
        min_cc=89 if native else 80 if bf16 else 75,
        aligned=tuple(aligned),
    )
