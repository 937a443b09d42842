"""What `make kernels-report` compiles: each kernel as it is launched for models that there are."""

from collections.abc import Mapping
from typing import Any

import triton

from ..fused.rows import warps
from ..measure.compile_cases import CompileCase
from .convolution import CHANNELS, CHANNELS_OF_ONE, TOKENS, conv_kernel
from .delta_rule import columns, delta_rule_kernel
from .gated_norm import gated_norm_kernel
from .state_space import state_space_kernel

BATCH = dict.fromkeys(
    ("start_ptr", "read_ptr", "stop_start_ptr", "stop_row_ptr", "stop_slot_ptr"), "*i32"
)


def compile_cases() -> list[CompileCase]:
    """Qwen 3.5 (delta rule), Granite 4, Nemotron and Bamba (Mamba-2), LFM2 (short convolutions)."""
    cases = [_conv(one, dtype) for one in (True, False) for dtype in ("fp16", "bf16")]
    cases += [_conv(one, "fp16", gated=True) for one in (True, False)]
    cases += [_delta(16, 32, 128, 128, dtype) for dtype in ("fp16", "bf16")]
    cases += [_delta(16, 48, 128, 256, "fp16"), _delta(4, 4, 256, 512, "fp16")]
    for sizes in ((128, 1, 128, 64), (128, 8, 256, 64), (112, 8, 128, 80), (8, 1, 512, 64)):
        cases.append(_space(*sizes, "fp16"))
    cases.append(_space(128, 1, 128, 64, "bf16"))
    return [
        *cases,
        _norm(128, False, "fp16"),
        _norm(128, False, "bf16"),
        _norm(8192, True, "fp16"),
        _norm(960, True, "fp16"),
    ]


def _conv(one: bool, dtype: str, gated: bool = False) -> CompileCase:
    """one: a token a request."""
    factors = f"*{dtype}" if gated else None
    pointers = {
        "x_ptr": f"*{dtype}",
        "factor_ptr": factors,
        "gate_ptr": factors,
        "taps_ptr": "*fp32",
        "bias_ptr": None if gated else "*fp32",
        "state_ptr": "*fp32",
        "out_ptr": f"*{dtype}" if gated else "*fp32",
        **BATCH,
    }
    taps = 3 if gated else 4
    constants = {
        "CHANNELS": 2048 if gated else 8192,
        "TAPS": taps,
        "ROWS": triton.next_power_of_2(taps - 1),
        "BLOCK_T": 1 if one else TOKENS,
        "BLOCK_C": CHANNELS_OF_ONE if one else CHANNELS,
        "SILU": not gated,
    }
    name = f"conv-{'one' if one else 'chunk'}-{dtype}{'-gated' * gated}"
    return _case(name, conv_kernel, pointers, {"x_stride": "i32"}, constants, 2)


def _delta(key_heads: int, heads: int, key_dim: int, value_dim: int, dtype: str) -> CompileCase:
    pointers = dict.fromkeys(
        ("qkv_ptr", "rate_ptr", "dt_bias_ptr", "state_ptr", "out_ptr"), "*fp32"
    )
    block_k, block_v = columns(key_dim, value_dim)
    constants = {
        "KEY_HEADS": key_heads,
        "VALUE_HEADS": heads,
        "K": key_dim,
        "V": value_dim,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
    }
    return _case(
        f"delta-{heads}x{key_dim}x{value_dim}-{dtype}",
        delta_rule_kernel,
        pointers | {"ba_ptr": f"*{dtype}"} | BATCH,
        dict.fromkeys(("qkv_stride", "ba_stride"), "i32"),
        constants,
        1,
    )


def _space(heads: int, groups: int, state_dim: int, head_dim: int, dtype: str) -> CompileCase:
    floats = ("xbc_ptr", "rate_ptr", "dt_bias_ptr", "skip_ptr", "state_ptr", "out_ptr")
    block_n, block_p = columns(state_dim, head_dim)
    constants = {
        "HEADS": heads,
        "GROUPS": groups,
        "N": state_dim,
        "P": head_dim,
        "BLOCK_N": block_n,
        "BLOCK_P": block_p,
    }
    return _case(
        f"space-{heads}x{state_dim}x{head_dim}-{dtype}",
        state_space_kernel,
        dict.fromkeys(floats, "*fp32") | {"dt_ptr": f"*{dtype}"} | BATCH,
        dict.fromkeys(("xbc_stride", "dt_stride"), "i32")
        | dict.fromkeys(("least_dt", "most_dt"), "fp32"),
        constants,
        1,
    )


def _norm(width: int, gate_first: bool, dtype: str) -> CompileCase:
    block = triton.next_power_of_2(width)
    pointers = {
        "x_ptr": "*fp32",
        "gate_ptr": f"*{dtype}",
        "weight_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
    }
    constants = {
        "WIDTH": width,
        "BLOCK": block,
        "WEIGHT_STRIDE": width if gate_first else 0,
        "GATE_FIRST": gate_first,
    }
    return _case(
        f"norm-{width}-{'gated-first-' * gate_first}{dtype}",
        gated_norm_kernel,
        pointers,
        {"gate_stride": "i32", "eps": "fp32"},
        constants,
        warps(block),
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
    return CompileCase(
        f"recurrent-{name}",
        kernel,
        {name: kinds[name] for name in kernel.arg_names},
        absent | constants,
        num_warps,
        num_stages=1,
        min_cc=80 if "bf16" in name else 75,
        aligned=tuple(aligned),
    )
