"""On-disk formats: pure functions between the tensors of one module and its QuantizedWeight.

Each safetensors format is a module with `SUFFIXES` (the tensor names it may have under a module),
`read(tensors, layer, fmt) -> QuantizedWeight` and mostly `write(weight, fmt) -> tensors`; fmt is the scheme's
`format`.
A tensor that does not fit raises base.BadTensor, which the checkpoint turns into an error that names the file; a weight
that a format cannot hold exactly is a ValueError.

Importing this package loads no torch: the HTTP server's process reads the tokenizer in a GGUF file with `gguf/`.
"""

from importlib import import_module
from types import ModuleType

_BY_METHOD = {
    "awq": "awq",
    "gptq": "gptq",
    "fp8": "fp8",
    "compressed-tensors": "compressed_tensors",
    "hqq": "hqq",
    "modelopt": "modelopt",
}


def by_method(method: str) -> ModuleType:
    """The format module of a `quant_method` of safetensors checkpoints."""
    return import_module(f".{_BY_METHOD[method]}", __package__)
