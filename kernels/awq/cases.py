"""What `make kernels-report` compiles of AWQ: the groups that conversions write, and the narrowest."""

from ..dequant_gemm.cases import Form, cases_of
from ..dequant_gemm.decode import integers
from ..dequant_gemm.layout import Decode
from ..measure.compile_cases import CompileCase
from .decode import bfloat16_scale_and_zero, half_scale_and_zero

GROUPS = (128, 64, 32, 0, 16)


def compile_cases() -> list[CompileCase]:
    """Groups of 128 with each tile of each table; the others, and scales in bfloat16, with the tiles for few rows."""
    words = Decode(integers, half_scale_and_zero)
    forms = [Form("awq", f"int4 g{group or 'row'}", words, 4, group, "*i32") for group in GROUPS]
    bfloat16 = Decode(integers, bfloat16_scale_and_zero)
    forms.append(Form("awq", "int4 g128 bf16 scales", bfloat16, 4, 128, "*i32"))
    return [case for form in forms for case in cases_of(form, every_tile=form is forms[0])]
