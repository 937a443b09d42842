"""What will be quantized and how, decided from headers alone before anything is read in full.

The rule for widths that the wished group size does not divide: halve it until it does, down to 32, or 16 as a last
resort. AWQ has one group size a checkpoint, so the largest that suits every layer is taken (576 and 128: 64). GPTQ
names the exceptions in `dynamic`, so only the layers that need it get a smaller group. A layer that no such group
divides, or whose width the format cannot pack, stays dense and is listed as such. Linears that share an input are
treated alike, because runtimes fuse them.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ...errors import UnsupportedError
from ..checkpoint import Checkpoint
from ..scheme import LayerScheme, QuantScheme, exactly
from .blocks import BlockSource

Method = Literal["awq", "gptq", "fp8"]
Target = Literal["awq", "gptq", "gptq_v2", "compressed-tensors", "fp8"]
FP8Scheme = Literal["channel", "tensor", "block"]
GROUP_MIN = 16
# The first of each is the default.
BITS = {"awq": (4,), "gptq": (4, 2, 3, 8), "fp8": (8,)}
TARGETS: dict[str, tuple[Target, ...]] = {
    "awq": ("awq", "compressed-tensors"),
    "gptq": ("gptq", "gptq_v2", "compressed-tensors"),
    "fp8": ("compressed-tensors", "fp8"),
}
FP8_LAYERS: dict[str, LayerScheme] = {
    "channel": LayerScheme("fp8", 8, -1, True, strategy="channel", act_quant="token"),
    "tensor": LayerScheme("fp8", 8, -1, True, strategy="tensor", act_quant="tensor"),
    "block": LayerScheme(
        "fp8", 8, 128, True, strategy="block", act_quant="group", block=(128, 128)
    ),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for, checked."""

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    target: Target  # the format that is written
    fp8_scheme: FP8Scheme = "channel"
    kv_scales: bool = False  # scales for an FP8 KV cache beside the weights
    desc_act: bool = False  # groups of columns of like importance, wherever these are
    auto_bits: float | None = (
        None  # bits per weight on average, chosen layer by layer; then `bits` is only the default
    )

    @classmethod
    def of(
        cls,
        method: Method,
        bits: int | None = None,
        group_size: int = 128,
        symmetric: bool | None = None,
        *,
        target: Target | None = None,
        fp8_scheme: FP8Scheme | None = None,
        kv_scales: bool = False,
        desc_act: bool = False,
        auto_bits: float | None = None,
    ) -> "Recipe":
        """Fill in the method's defaults. Raises UnsupportedError for what the format cannot hold."""
        if method not in BITS:
            raise UnsupportedError(f"method {method!r} is not supported ({', '.join(BITS)} are)")
        if auto_bits is not None and bits is not None:
            raise UnsupportedError(
                "--auto-bits chooses the bits of each layer: give no --bits beside it"
            )
        if bits is None:
            bits = BITS[method][0]
        if bits not in BITS[method]:
            raise UnsupportedError(
                f"--bits {bits} is not possible with {method} "
                f"({', '.join(map(str, sorted(BITS[method])))} are)"
            )
        if group_size != -1 and (group_size < GROUP_MIN or group_size % GROUP_MIN):
            raise UnsupportedError(
                f"--group-size {group_size} is not possible (a multiple of {GROUP_MIN}, or -1)"
            )
        if fp8_scheme is not None and (method != "fp8" or fp8_scheme not in FP8_LAYERS):
            raise UnsupportedError(
                f"--fp8-scheme {fp8_scheme} is not possible with --{method} (with --fp8: "
                f"{', '.join(FP8_LAYERS)})"
            )
        symmetric = method != "awq" if symmetric is None else symmetric
        if method == "fp8":
            group_size, symmetric, fp8_scheme = -1, True, fp8_scheme or "channel"
        target = target or ("fp8" if fp8_scheme == "block" else TARGETS[method][0])
        recipe = cls(
            method,
            bits,
            group_size,
            symmetric,
            target,
            fp8_scheme or "channel",
            kv_scales,
            desc_act,
            auto_bits,
        )
        if problem := recipe._misfit():
            raise UnsupportedError(problem)
        return recipe

    @property
    def fp8_layer(self) -> LayerScheme:
        return FP8_LAYERS[self.fp8_scheme]

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model."""
        return self.method != "fp8" or self.fp8_scheme == "tensor" or self.kv_scales

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that the format can give a layer, where it lets layers differ."""
        if self.method != "gptq":
            return (self.bits,)
        return (4, 8) if self.target == "compressed-tensors" else tuple(sorted(BITS["gptq"]))

    def _misfit(self) -> str | None:
        """Why the format cannot hold what was asked for, and what to ask for instead."""
        if self.target not in TARGETS[self.method]:
            return f"--to {self.target} is not possible with --{self.method} ({', '.join(TARGETS[self.method])} are)"
        if self.target == "fp8" and self.fp8_scheme == "channel":
            return "--to fp8 has no scale per channel: --fp8-scheme tensor or block, or --to compressed-tensors"
        if self.target == "compressed-tensors" and self.bits not in (4, 8):
            return f"--to compressed-tensors holds 4 and 8 bits, not {self.bits}: --to gptq"
        if self.desc_act and (self.target not in ("gptq", "gptq_v2") or self.group_size == -1):
            return "--desc-act needs --gptq in its own format, and groups: no other says which group a column is in"
        if self.auto_bits is not None and self.method != "gptq":
            return f"--auto-bits needs --gptq: layers of {self.method} all have {self.bits} bits"
        if self.auto_bits is not None and not self.widths[0] <= self.auto_bits <= self.widths[-1]:
            return (
                f"--auto-bits {self.auto_bits:g} is not possible: {self.target} holds "
                f"{', '.join(map(str, self.widths))} bits"
            )
        if self.kv_scales and self.target != "compressed-tensors":
            return f"--kv-scales needs --to compressed-tensors: {self.target} has no place for them"
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How each linear of the blocks is quantized, and the scheme that says so on disk."""

    scheme: QuantScheme
    dtype: torch.dtype  # of what stays dense
    group_sizes: dict[str, int]  # quantized module -> columns per scale
    dense: dict[str, str] = field(default_factory=dict)  # module that stays dense -> why
    notes: tuple[str, ...] = ()  # for people: where the rule above had to step in
    bits: dict[str, int] = field(
        default_factory=dict
    )  # quantized module -> bits, where not all have the recipe's

    def grid(self, module: str, recipe: Recipe) -> tuple[int, int, bool]:
        """(bits, group_size, symmetric) of a quantized module."""
        return self.bits.get(module, recipe.bits), self.group_sizes[module], recipe.symmetric


def make_plan(checkpoint: Checkpoint, source: BlockSource, recipe: Recipe) -> Plan:
    """Decide for every linear in the blocks. Raises UnsupportedError if nothing could be quantized."""
    shapes = {
        f"{source.name(i)}.{name}": shape
        for i in range(len(source))
        for name, shape in source.linear_shapes(i).items()
    }
    groups = [
        [f"{source.name(i)}.{n}" for n in group]
        for i in range(len(source))
        for group in source.groups(i)
    ]
    sizes: dict[str, int] = {}
    dense: dict[str, str] = {}
    for group in groups:
        size, why = _group_size([shapes[m] for m in group], recipe)
        if size is None:
            dense |= dict.fromkeys(group, why)
        else:
            sizes |= dict.fromkeys(group, size)
    if not sizes:
        raise UnsupportedError(
            f"{checkpoint.path}: no layer can be quantized ({next(iter(dense.values()))})"
        )
    if recipe.target == "awq" and recipe.group_size != -1:
        sizes = dict.fromkeys(sizes, min(sizes.values()))
    notes = _notes(recipe, sizes, dense)
    if recipe.fp8_scheme == "block" and any(
        shapes[m][0] % 128 for group in groups if len(group) > 1 for m in group
    ):
        notes += (
            "blocks of 128 rows do not divide every q, k, v, gate and up: vLLM, which fuses them, will refuse "
            "this checkpoint (--fp8-scheme channel suits any shape)",
        )
    return Plan(_scheme(recipe, sizes, {}, dense), source.dtype, sizes, dense, notes)


def with_bits(plan: Plan, recipe: Recipe, bits: dict[str, int]) -> Plan:
    """The plan with bits of its own for each quantized module."""
    counts = {width: sum(b == width for b in bits.values()) for width in sorted(set(bits.values()))}
    note = ", ".join(f"{width} bits in {count}" for width, count in counts.items())
    return replace(
        plan,
        scheme=_scheme(recipe, plan.group_sizes, bits, plan.dense),
        bits=bits,
        notes=(*plan.notes, f"chosen by what rounding does to each layer: {note}"),
    )


def fits_words(shapes: list[tuple[int, int]], bits: int) -> bool:
    """Whether linears [out, in] fill whole 32-bit words along both sides, as the integer formats need."""
    per_word = 32 if bits == 3 else 32 // bits
    return not any(out % per_word or width % per_word for out, width in shapes)


def _group_size(shapes: list[tuple[int, int]], recipe: Recipe) -> tuple[int | None, str]:
    """Columns per scale for linears [out, in] that share an input, or None and why they stay dense."""
    width = shapes[0][1]
    if recipe.method == "fp8":
        return width, ""
    if not fits_words(shapes, recipe.bits):
        return None, f"{recipe.bits}-bit words cannot hold its shape"
    if recipe.group_size == -1:
        return width, ""
    size = recipe.group_size
    while width % size and size % 2 == 0 and size // 2 >= GROUP_MIN:
        size //= 2
    return (
        (size, "")
        if width % size == 0
        else (None, f"no group of {recipe.group_size} or its halves divides {width}")
    )


def _scheme(
    recipe: Recipe, sizes: dict[str, int], bits: dict[str, int], dense: dict[str, str]
) -> QuantScheme:
    ignore = ("lm_head", *dense)
    kv_cache: Literal["fp8"] | None = "fp8" if recipe.kv_scales else None
    if recipe.method == "fp8":
        fmt = "fp8" if recipe.target == "fp8" else "float-quantized"
        return QuantScheme(recipe.target, fmt, recipe.fp8_layer, ignore=ignore, kv_cache=kv_cache)
    if recipe.target == "awq":
        uniform = recipe.group_size if recipe.group_size == -1 else min(sizes.values())
        return QuantScheme(
            "awq", "gemm", LayerScheme("int", recipe.bits, uniform, recipe.symmetric), ignore=ignore
        )
    layer = LayerScheme(
        "int", recipe.bits, recipe.group_size, recipe.symmetric, desc_act=recipe.desc_act
    )
    own = {
        module: replace(
            layer,
            bits=bits.get(module, recipe.bits),
            group_size=-1 if recipe.group_size == -1 else size,
        )
        for module, size in sizes.items()
    }
    overrides = tuple((exactly(module), other) for module, other in own.items() if other != layer)
    if recipe.target == "compressed-tensors":
        return QuantScheme(
            "compressed-tensors", "pack-quantized", layer, overrides, ignore, kv_cache=kv_cache
        )
    return QuantScheme("gptq", recipe.target, layer, overrides, ignore=tuple(dense))


def _notes(recipe: Recipe, sizes: dict[str, int], dense: dict[str, str]) -> tuple[str, ...]:
    notes = []
    if recipe.group_size != -1:
        for size in sorted({s for s in sizes.values() if s != recipe.group_size}, reverse=True):
            count = sum(s == size for s in sizes.values())
            notes.append(
                f"group size {size} instead of {recipe.group_size} in {count} of {len(sizes)} layers, because "
                f"{recipe.group_size} does not divide a width"
                + (" and AWQ has one group size a checkpoint" if recipe.target == "awq" else "")
            )
    for why in sorted(set(dense.values())):
        notes.append(f"{sum(w == why for w in dense.values())} layers stay dense: {why}")
    return tuple(notes)
