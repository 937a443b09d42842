"""What a kernel raises where a caller has made a mistake. A user's bad input never reaches a kernel: `can_implement`
and the backends' `why_not` have refused it before, in words.
"""


class KernelArgumentError(ValueError):
    """An argument whose shape, dtype, strides or device a kernel does not take: a mistake of the code that calls it."""
