"""What `make kernels-report` compiles of GPTQ: every number of bits, symmetric and with zero points."""

from ..awq.decode import half_scale_and_zero
from ..dequant_gemm.cases import Form, cases_of
from ..dequant_gemm.decode import integers
from ..dequant_gemm.layout import Decode
from ..measure.compile_cases import CompileCase
from .decode import symmetric_scale

SYMMETRIC = ((4, 128), (4, 32), (2, 64), (3, 128), (8, 128), (8, 0))  # bits, group; 0: a whole row
WITH_ZEROS = ((2, 64), (3, 128), (8, 128), (8, 0))  # of 4 bits: AWQ's


def compile_cases() -> list[CompileCase]:
    """Symmetric 4-bit weights in groups of 128 with each tile of each table; the others with the tiles for few rows."""
    symmetric, zeros = Decode(integers, symmetric_scale), Decode(integers, half_scale_and_zero)
    forms = [
        *(Form("gptq", _name(*kind) + " sym", symmetric, *kind, "") for kind in SYMMETRIC),
        *(Form("gptq", _name(*kind), zeros, *kind, "*i32") for kind in WITH_ZEROS),
    ]
    return [case for form in forms for case in cases_of(form, every_tile=form is forms[0])]


def _name(bits: int, group: int) -> str:
    return f"int{bits} g{group or 'row'}"
