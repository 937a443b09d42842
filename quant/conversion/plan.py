"""What will be quantized and how, decided from headers alone before anything is read in full.

The rule for widths that the wished group size does not divide: halve it until it does, down to 16 (`fitting_group`).
AWQ has one group size a checkpoint, so the largest that suits every layer is taken for all (576 and 128: 64). GPTQ does
the same while that is at least 32: it could name exceptions in `dynamic`, but transformers does not apply those. Below
32, with --auto-bits (which needs exceptions anyway) and in compressed-tensors, whose readers all know groups by layer,
only the layers that need it get a smaller group. A layer that no such group divides, or whose width the format cannot
pack, stays dense and is listed as such. Linears that share an input are treated alike, because runtimes fuse them.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ...architectures.multimodal import other_parts
from ...errors import UnsupportedError
from ..checkpoint import Checkpoint
from ..scheme import LayerScheme, QuantScheme, exactly, fitting_group, modules_of
from .blocks import BlockSource
from .experts import read_by_transformers
from .recipe import Recipe

UNIFORM_LEAST = 32  # GPTQ has one group size for all layers down to this, below it exceptions


@dataclass(frozen=True, slots=True)
class Plan:
    """How each linear of the blocks is quantized, and the scheme that says so on disk."""

    scheme: QuantScheme
    dtype: torch.dtype  # of what stays dense
    group_sizes: dict[str, int]  # quantized module -> columns per scale
    dense: dict[str, str] = field(default_factory=dict)  # module that stays dense -> why
    notes: tuple[str, ...] = ()  # for people: where the rule above had to step in
    warnings: tuple[str, ...] = ()  # for people: what they may not have meant to do
    bits: dict[str, int] = field(
        default_factory=dict
    )  # quantized module -> bits, where not all have the recipe's
    routers: tuple[str, ...] = ()  # modules that choose experts: dense whatever the recipe
    single_experts: bool = True  # transformers reads experts one by one, as they are written
    others: tuple[str, ...] = ()  # what a multimodal model has beside its language model

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
    grouped = {module for group in groups for module in group}
    small = sorted(shapes.keys() - grouped - set(source.spec.routers))
    if source.spec.per_layer_inputs is not None:
        small.append(f"{source.spec.prefix}per_layer_model_projection")
    if (alt_up := source.spec.alt_up) is not None:
        small += [f"{source.spec.prefix}{n}" for n in (*alt_up.projections, *alt_up.unprojections)]
    dense = dict.fromkeys(small, "they are small, and what they say is felt")
    kept = frozenset(source.spec.dense_modules())
    for group in groups:
        size, why = None, "their outputs are gates"
        if group[0] not in kept:
            size, why = _group_size([shapes[m] for m in group], recipe)
        if size is None:
            dense |= dict.fromkeys(group, why)
        else:
            sizes |= dict.fromkeys(group, size)
    if not sizes:
        raise UnsupportedError(
            f"{checkpoint.path}: no layer can be quantized ({next(iter(dense.values()))})"
        )
    if _is_uniform(recipe, sizes):
        sizes = dict.fromkeys(sizes, min(sizes.values()))
    notes = _notes(recipe, sizes, dense)
    if recipe.fp8_scheme == "block" and any(
        shapes[m][0] % 128 for group in groups if len(group) > 1 for m in group
    ):
        notes += (
            "blocks of 128 rows do not divide every q, k, v, gate and up: vLLM, which fuses them, will refuse "
            "this checkpoint (--fp8-scheme channel suits any shape)",
        )
    warnings = _warnings(checkpoint)
    others = tuple(other_parts(checkpoint.config, checkpoint.names()))
    routers = source.spec.routers
    scheme = _scheme(recipe, sizes, {}, (*routers, *dense), others)
    return Plan(
        scheme,
        source.dtype,
        sizes,
        dense,
        notes,
        warnings,
        routers=routers,
        single_experts=not routers or read_by_transformers(source.config.model_type),
        others=others,
    )


def with_bits(plan: Plan, recipe: Recipe, bits: dict[str, int]) -> Plan:
    """The plan with bits of its own for each quantized module."""
    counts = {width: sum(b == width for b in bits.values()) for width in sorted(set(bits.values()))}
    note = ", ".join(f"{width} bits in {count}" for width, count in counts.items())
    return replace(
        plan,
        scheme=_scheme(recipe, plan.group_sizes, bits, (*plan.routers, *plan.dense), plan.others),
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
    size = fitting_group(recipe.group_size, width)
    return size, "" if size else f"no group of {recipe.group_size} or its halves divides {width}"


def _is_uniform(recipe: Recipe, sizes: dict[str, int]) -> bool:
    """Whether all layers are to have the smallest group size that one of them needs."""
    if recipe.method == "fp8" or recipe.group_size == -1:
        return False
    if recipe.target == "awq":
        return True
    alike = recipe.target in ("gptq", "gptq_v2") and recipe.auto_bits is None
    return alike and min(sizes.values()) >= UNIFORM_LEAST


def _scheme(
    recipe: Recipe,
    sizes: dict[str, int],
    bits: dict[str, int],
    dense: tuple[str, ...],
    others: tuple[str, ...],
) -> QuantScheme:
    ignore = ("lm_head", *dense, *modules_of(others, by_name=recipe.target in ("awq", "fp8")))
    kv_cache: Literal["fp8"] | None = "fp8" if recipe.kv_scales else None
    if recipe.method == "fp8":
        layer = recipe.fp8_layer
        if recipe.target == "fp8":
            return QuantScheme("fp8", "fp8", layer, ignore=ignore, kv_cache=kv_cache)
        return QuantScheme(
            "compressed-tensors", "float-quantized", layer, ignore=ignore, kv_cache=kv_cache
        )
    group_size = min(sizes.values()) if _is_uniform(recipe, sizes) else recipe.group_size
    layer = LayerScheme("int", recipe.bits, group_size, recipe.symmetric, desc_act=recipe.desc_act)
    if recipe.target == "awq":
        return QuantScheme("awq", "gemm", layer, ignore=ignore)
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
    ignore = (*dense, *modules_of(others, by_name=False))
    return QuantScheme("gptq", recipe.target, layer, overrides, ignore=ignore)


def _warnings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Where the model to quantize already is quantized."""
    if checkpoint.scheme is None:
        return ()
    return (
        f"the source is already quantized ({checkpoint.scheme.describe()}): its errors stay, and quality is measured "
        "against it, not against the weights that it was made of; convert those where you can have them",
    )


def _notes(recipe: Recipe, sizes: dict[str, int], dense: dict[str, str]) -> tuple[str, ...]:
    notes = []
    asked = recipe.group_size
    if asked != -1:
        for size in sorted({s for s in sizes.values() if s != asked}, reverse=True):
            count = sum(s == size for s in sizes.values())
            notes.append(
                f"group size {size} instead of {asked} in {count} of {len(sizes)} layers, because {asked} does not "
                "divide a width" + _why_all(recipe, sizes)
            )
    for why in sorted(set(dense.values())):
        notes.append(f"{sum(w == why for w in dense.values())} layers stay dense: {why}")
    return tuple(notes)


def _why_all(recipe: Recipe, sizes: dict[str, int]) -> str:
    """Why a layer whose width is divisible has the smaller group too."""
    if not _is_uniform(recipe, sizes):
        return ""
    if recipe.target == "awq":
        return " and AWQ has one group size a checkpoint"
    return " and transformers knows one group size a GPTQ checkpoint"
