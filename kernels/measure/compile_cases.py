"""What each package of Triton kernels wants compiled without a GPU: its contract with `make kernels-report`.

A package's `cases.py` has `compile_cases() -> list[CompileCase]` covering every kernel with the configurations that
are shipped. This module imports no Triton; the packages do, when they are asked for their cases.
"""

import importlib
from dataclasses import dataclass
from typing import Any

PACKAGES = (
    "awq",
    "gptq",
    "gguf",
    "fp8",
    "fp4",
    "moe",
    "attention",
    "fused",
    "recurrent",
    "sampling",
)


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one configuration. Pointers, and integers named in `aligned`, are taken to be multiples of 16
    bytes or 16 elements, as every tensor that torch allocates and every width of a real model is."""

    name: str
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*fp16", "i32", "constexpr", ...
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    min_cc: int = 75
    max_cc: int = 1000
    aligned: tuple[str, ...] = ()
    weights_per_program: int = (
        0  # quantized weights one iteration of the main loop decodes; 0: not a product
    )
    fp8_dot: bool = False  # its products must be those of FP8 tensor cores


def compile_cases(packages: tuple[str, ...] = PACKAGES) -> list[CompileCase]:
    """The cases of these packages."""
    kernels = __package__.rpartition(".")[0]
    return [
        case
        for package in packages
        for case in importlib.import_module(f"{kernels}.{package}.cases").compile_cases()
    ]
