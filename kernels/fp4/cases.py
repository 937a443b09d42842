"""What `make kernels-report` compiles of FP4: MXFP4's groups with 16-bit scales, NVFP4's with float32."""

from ..dequant_gemm.cases import Form, cases_of
from ..dequant_gemm.layout import Decode
from ..fp8.decode import float_scale
from ..measure.compile_cases import CompileCase
from .decode import bfloat16_scale, e2m1


def compile_cases() -> list[CompileCase]:
    """With the tiles for few rows of each table."""
    forms = (
        Form("fp4", "e2m1 g32", Decode(e2m1, bfloat16_scale), 4, 32, "*i16"),
        Form("fp4", "e2m1 g16", Decode(e2m1, float_scale), 4, 16, "*fp32"),
    )
    return [case for form in forms for case in cases_of(form, every_tile=False)]
