"""What `make kernels-report` compiles of the choice of tokens: both launches for what rows ask for, and the state's."""

from collections.abc import Mapping
from typing import Any

from ..measure.compile_cases import CompileCase
from .sample import BLOCK, MASK_BLOCK
from .sample_kernels import (
    PIECE,
    bias_kernel,
    bitmask_kernel,
    choose_kernel,
    record_kernel,
    scan_kernel,
)


def compile_cases() -> list[CompileCase]:
    """Greedy, drawn, and drawn with penalties."""
    return _sample(False, False) + _sample(True, False) + _sample(True, True) + _state_cases()


def _sample(sampled: bool, penalties: bool) -> list[CompileCase]:
    """Both launches, for a vocabulary of 128256."""
    parts = {
        "part_max_ptr": "*fp32",
        "part_sum_ptr": "*fp32",
        "part_best_ptr": "*fp32",
        "part_id_ptr": "*i32",
    }
    rows = {"x_ptr": "*fp32", "filter_ptr": "*fp32", "key_ptr": "*i32"}
    state = {"penalty_ptr": "*fp32", "state_row_ptr": "*i32", "state_ptr": "*i32"}
    pointers: dict[str, str | None] = {
        **parts,
        **(rows if sampled else dict.fromkeys(rows)),
        **(state if penalties else dict.fromkeys(state)),
    }
    constants = {"SAMPLED": sampled, "PIECE": PIECE}
    kind = ("sample" if sampled else "greedy") + "-penalties" * penalties
    choose = {name: pointer for name, pointer in pointers.items() if name != "penalty_ptr"} | {
        "token_ptr": "*i64"
    }
    return [
        _case(
            f"scan-{kind}",
            scan_kernel,
            pointers | {"logits_ptr": "*fp32"},
            {"logits_stride": "i32", "vocab": "i32"},
            constants,
            4,
        ),
        _case(
            f"choose-{kind}",
            choose_kernel,
            choose,
            {"vocab": "i32", "pieces": "i32"},
            constants | {"PARTS": 64},
            8,
        ),
    ]


def _state_cases() -> list[CompileCase]:
    tokens = {"state_ptr": "*i32", "token_ptr": "*i64"}
    biases = {"logits_ptr": "*fp32", "row_ptr": "*i64", "token_ptr": "*i64", "bias_ptr": "*fp32"}
    return [
        _case(
            "record-prompt",
            record_kernel,
            tokens,
            {"count": "i32"},
            {"OUTPUT": False, "BLOCK": BLOCK},
            2,
        ),
        _case(
            "record-output",
            record_kernel,
            tokens,
            {"count": "i32"},
            {"OUTPUT": True, "BLOCK": BLOCK},
            2,
        ),
        _case(
            "bitmask",
            bitmask_kernel,
            {"logits_ptr": "*fp32", "row_ptr": "*i64", "bitmask_ptr": "*i32"},
            {"vocab": "i32", "logits_stride": "i32", "words": "i32"},
            {"BLOCK": MASK_BLOCK},
            4,
        ),
        _case(
            "bias",
            bias_kernel,
            biases,
            {"count": "i32", "logits_stride": "i32"},
            {"BLOCK": BLOCK},
            2,
        ),
    ]


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
    aligned = (
        argument
        for argument, kind in kinds.items()
        if kind.startswith("*") or argument.endswith("stride") or argument == "vocab"
    )
    return CompileCase(
        f"sampling-{name}",
        kernel,
        {argument: kinds[argument] for argument in kernel.arg_names},
        absent | constants,
        num_warps,
        num_stages=1,
        aligned=tuple(aligned),
    )
