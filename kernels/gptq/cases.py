"""What `make kernels-report` compiles of GPTQ: 2, 3 and 8 bits. Its 4-bit weights run what AWQ's do."""

from ..awq.decode import half_scale_and_zero
from ..dequant_gemm.cases import Form, cases_of
from ..dequant_gemm.decode import integers
from ..dequant_gemm.layout import Decode
from ..measure.compile_cases import CompileCase

WEIGHTS = ((2, 64), (3, 128), (8, 128), (8, 0))  # bits, group; 0: a whole row


def compile_cases() -> list[CompileCase]:
    """With the tiles for few rows of each table."""
    words = Decode(integers, half_scale_and_zero)
    return [
        case
        for bits, group in WEIGHTS
        for case in cases_of(
            Form("gptq", f"int{bits} g{group or 'row'}", words, bits, group, "*i32"),
            every_tile=False,
        )
    ]
