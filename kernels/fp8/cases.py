"""Every shipped configuration of the FP8 products, for `make kernels-report`."""

from ..compile_cases import CompileCase
from ..gptq.cases import cases_of


def compile_cases() -> list[CompileCase]:
    """Scales per block of 128 and per output channel, each with every tile."""
    return [case for group in (128, 0) for case in cases_of((8, group, False), every_tile=True, fp8=True)]
