"""What `make kernels-report` compiles of weights with minima: Q4_1's and Q4_K's groups."""

from ..dequant_gemm.cases import Form, cases_of
from ..dequant_gemm.decode import integers
from ..dequant_gemm.layout import Decode
from ..measure.compile_cases import CompileCase
from .decode import scale_and_minimum


def compile_cases() -> list[CompileCase]:
    """With the tiles for few rows of each table."""
    minima = Decode(integers, scale_and_minimum, has_minimum=True)
    form = Form("gguf", "int4 g32 mins", minima, 4, 32, "*fp32")
    return cases_of(form, every_tile=False)
