"""Experts that lie in one tensor a layer, seen one by one under the names that most checkpoints give them:

    mlp.experts.gate_up_proj [experts, 2 * inner, hidden] -> mlp.experts.3.gate_proj.weight [inner, hidden]
                                                             mlp.experts.3.up_proj.weight   [inner, hidden]
    mlp.experts.down_proj    [experts, hidden, inner]     -> mlp.experts.3.down_proj.weight [hidden, inner]

or with the last two axes the other way round (Qwen 3-VL, GPT-OSS), which is seen by their lengths; gates and ups may
take turns, row by row, and biases be stacked too (GPT-OSS):

    mlp.experts.gate_up_proj_bias   [experts, 2 * inner]             -> mlp.experts.3.gate_proj.bias [inner], ...
    mlp.experts.gate_up_proj_blocks [experts, 2 * inner, groups, 16] -> mlp.experts.3.gate_proj.weight_packed (fp4.py)
    mlp.experts.gate_up_proj_scales [experts, 2 * inner, groups]     -> mlp.experts.3.gate_proj.weight_scale

So whoever reads a checkpoint knows one layout. Only the rows of the expert that is asked for are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ...architectures.base import Experts, ModelSpec, experts_of
from ...architectures.registry import model_spec
from ...errors import UserError
from .headers import TensorEntry


def unstacked(entries: dict[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint, those of stacked experts cut up. The rest is as it was, and so is all of a model
    that is not known: whoever needs its architecture says so."""
    if all(len(entry.shape) not in (3, 4) for entry in entries.values()):
        return entries
    try:
        model = model_spec(config, entries)
    except UserError:
        return entries
    found = dict(entries)
    for prefix, experts in _layers_of_experts(model):
        names, inner = experts.names, experts.intermediate_size
        gate_up, down = (f"{prefix}.{name}" for name in names.stacked)
        for ending, suffix in _PARTS.items():
            if entry := found.pop(f"{gate_up}{ending}", None):
                stack = _Stack(
                    f"{gate_up}{ending}", entry, model.hidden_size, 2 * inner, names.interleaved
                )
                gate, up = _halves(stack.rows, names.interleaved)
                found |= stack.experts(f"{prefix}.{names.gate}.{suffix}", gate)
                found |= stack.experts(f"{prefix}.{names.up}.{suffix}", up)
            if entry := found.pop(f"{down}{ending}", None):
                stack = _Stack(
                    f"{down}{ending}", entry, inner, model.hidden_size, names.interleaved
                )
                found |= stack.experts(f"{prefix}.{names.down}.{suffix}", slice(0, stack.rows))
    return found


# What a stack's name ends in -> what a module calls it
_PARTS = {"": "weight", "_bias": "bias", "_blocks": "weight_packed", "_scales": "weight_scale"}


def _halves(rows: int, interleaved: bool) -> tuple[slice, slice]:
    """The rows of gates and of ups."""
    if interleaved:
        return slice(0, rows, 2), slice(1, rows, 2)
    return slice(0, rows // 2), slice(rows // 2, rows)


def _layers_of_experts(model: ModelSpec) -> Iterator[tuple[str, Experts]]:
    for index, layer in enumerate(model.layers):
        if (experts := experts_of(layer.mlp)) is not None:
            yield model.layer_name(index), experts


@dataclass(frozen=True, slots=True)
class _Stack:
    """The matrices of all experts in one tensor, [out_features, in_features] each or the other way round."""

    name: str
    entry: TensorEntry
    in_features: int
    out_features: int
    family_transposes: bool  # which decides where the lengths do not: GPT-OSS's are all 2880

    @property
    def transposed(self) -> bool:
        if len(self.entry.shape) != 3 or self.name.endswith("_scales"):
            return False
        usual, other = (self.out_features, self.in_features), (self.in_features, self.out_features)
        return self.entry.shape[1:] == other and (other != usual or self.family_transposes)

    @property
    def rows(self) -> int:
        """Outputs of an expert, as they lie here."""
        return self.entry.shape[2 if self.transposed else 1]

    def experts(self, name: str, rows: slice) -> dict[str, TensorEntry]:
        """Some rows of each expert. name: of its tensor, "*" for the expert."""
        others = self.entry.shape[1:2] if self.transposed else self.entry.shape[2:]
        width = (prod(others),) if others else ()  # blocks of codes lie in one row
        shape = (len(range(self.rows)[rows]), *width)
        nbytes = prod(shape) * self.entry.dtype.itemsize
        part = (slice(None), rows) if self.transposed else (rows,)
        return {
            name.replace("*", str(expert)): TensorEntry(
                self.entry.file,
                self.entry.dtype,
                shape,
                nbytes,
                (self.name, (expert, *part)),
                self.transposed,
            )
            for expert in range(self.entry.shape[0])
        }
