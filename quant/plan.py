"""What will be quantized and how, decided from headers alone before anything is read in full.

The rule for widths that the wished group size does not divide: halve it until it does, down to 32, or 16 as a last
resort. AWQ has one group size a checkpoint, so the largest that suits every layer is taken (576 and 128: 64). GPTQ
names the exceptions in `dynamic`, so only the layers that need it get a smaller group. A layer that no such group
divides, or whose width the format cannot pack, stays dense and is listed as such. Linears that share an input are
treated alike, because runtimes fuse them.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from .blocks import BlockSource
from .checkpoint import Checkpoint
from .errors import UnsupportedError
from .scheme import LayerScheme, QuantScheme, exactly

Method = Literal["awq", "gptq", "fp8"]
GROUP_MIN = 16
BITS = {"awq": (4,), "gptq": (4, 2, 3, 8), "fp8": (8,)}  # the first is the default


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for, checked."""

    method: Method
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, method: Method, bits: int | None = None, group_size: int = 128,
           symmetric: bool | None = None) -> "Recipe":
        """Fill in the method's defaults. Raises UnsupportedError for what the format cannot hold."""
        if method not in BITS:
            raise UnsupportedError(f"method {method!r} is not supported ({', '.join(BITS)} are)")
        if bits is None:
            bits = BITS[method][0]
        if bits not in BITS[method]:
            raise UnsupportedError(f"--bits {bits} is not possible with {method} "
                                   f"({', '.join(map(str, sorted(BITS[method])))} are)")
        if group_size != -1 and (group_size < GROUP_MIN or group_size % GROUP_MIN):
            raise UnsupportedError(f"--group-size {group_size} is not possible (a multiple of {GROUP_MIN}, or -1)")
        default = method != "awq"
        return cls(method, bits, -1 if method == "fp8" else group_size, default if symmetric is None else symmetric)


@dataclass(frozen=True, slots=True)
class Plan:
    """How each linear of the blocks is quantized, and the scheme that says so on disk."""

    scheme: QuantScheme
    dtype: torch.dtype  # of what stays dense
    group_sizes: dict[str, int]  # quantized module -> columns per scale
    dense: dict[str, str] = field(default_factory=dict)  # module that stays dense -> why
    notes: tuple[str, ...] = ()  # for people: where the rule above had to step in

    def grid(self, module: str, recipe: Recipe) -> tuple[int, int, bool]:
        """(bits, group_size, symmetric) of a quantized module."""
        return recipe.bits, self.group_sizes[module], recipe.symmetric


def make_plan(checkpoint: Checkpoint, source: BlockSource, recipe: Recipe) -> Plan:
    """Decide for every linear in the blocks. Raises UnsupportedError if nothing could be quantized."""
    shapes = {f"{source.name(i)}.{name}": shape for i in range(len(source))
              for name, shape in source.linear_shapes(i).items()}
    stages = [[f"{source.name(i)}.{n}" for n in stage] for i in range(len(source)) for stage in source.map.stages]
    sizes: dict[str, int] = {}
    dense: dict[str, str] = {}
    for stage in stages:
        size, why = _group_size([shapes[m] for m in stage], recipe)
        if size is None:
            dense |= dict.fromkeys(stage, why)
        else:
            sizes |= dict.fromkeys(stage, size)
    if not sizes:
        raise UnsupportedError(f"{checkpoint.path}: no layer can be quantized ({next(iter(dense.values()))})")
    if recipe.method == "awq" and recipe.group_size != -1:
        sizes = dict.fromkeys(sizes, min(sizes.values()))
    return Plan(_scheme(recipe, sizes, dense), source.dtype, sizes, dense, _notes(recipe, sizes, dense))


def _group_size(shapes: list[tuple[int, int]], recipe: Recipe) -> tuple[int | None, str]:
    """Columns per scale for linears [out, in] that share an input, or None and why they stay dense."""
    width = shapes[0][1]
    if recipe.method == "fp8":
        return width, ""
    per_word = 32 if recipe.bits == 3 else 32 // recipe.bits
    if any(out % per_word for out, _ in shapes) or width % per_word:
        return None, f"{recipe.bits}-bit words cannot hold its shape"
    if recipe.group_size == -1:
        return width, ""
    size = recipe.group_size
    while width % size and size % 2 == 0 and size // 2 >= GROUP_MIN:
        size //= 2
    return (size, "") if width % size == 0 else (None, f"no group of {recipe.group_size} or its halves divides {width}")


def _scheme(recipe: Recipe, sizes: dict[str, int], dense: dict[str, str]) -> QuantScheme:
    ignore = ("lm_head", *dense)
    if recipe.method == "fp8":
        layer = LayerScheme("fp8", 8, -1, True, strategy="channel", act_quant="token")
        return QuantScheme("compressed-tensors", "float-quantized", layer, ignore=ignore)
    uniform = recipe.group_size if recipe.method == "gptq" or recipe.group_size == -1 else min(sizes.values())
    layer = LayerScheme("int", recipe.bits, uniform, recipe.symmetric)
    if recipe.method == "awq":
        return QuantScheme("awq", "gemm", layer, ignore=ignore)
    overrides = tuple((exactly(module), LayerScheme("int", recipe.bits, size, recipe.symmetric))
                      for module, size in sizes.items() if recipe.group_size not in (-1, size))
    return QuantScheme("gptq", "gptq", layer, overrides=overrides, ignore=tuple(dense))


def _notes(recipe: Recipe, sizes: dict[str, int], dense: dict[str, str]) -> tuple[str, ...]:
    notes = []
    if recipe.group_size != -1:
        for size in sorted({s for s in sizes.values() if s != recipe.group_size}, reverse=True):
            count = sum(s == size for s in sizes.values())
            notes.append(f"group size {size} instead of {recipe.group_size} in {count} of {len(sizes)} layers, because "
                         f"{recipe.group_size} does not divide a width"
                         + (" and AWQ has one group size a checkpoint" if recipe.method == "awq" else ""))
    for why in sorted(set(dense.values())):
        notes.append(f"{sum(w == why for w in dense.values())} layers stay dense: {why}")
    return tuple(notes)
