"""Experts that lie in one tensor a layer, seen one by one under the names that most checkpoints give them:

    mlp.experts.gate_up_proj [experts, 2 * inner, hidden] -> mlp.experts.3.gate_proj.weight [inner, hidden]
                                                             mlp.experts.3.up_proj.weight   [inner, hidden]
    mlp.experts.down_proj    [experts, hidden, inner]     -> mlp.experts.3.down_proj.weight [hidden, inner]

or with the last two axes the other way round (Qwen 3-VL), which is seen by their lengths.

So whoever reads a checkpoint knows one layout. Only the rows of the expert that is asked for are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ...architectures.base import Experts, ModelSpec
from ...architectures.registry import model_spec
from ...errors import UserError
from .headers import TensorEntry


def unstacked(entries: dict[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint, those of stacked experts cut up. The rest is as it was, and so is all of a model
    that is not known: whoever needs its architecture says so."""
    if all(len(entry.shape) != 3 for entry in entries.values()):
        return entries
    try:
        model = model_spec(config, entries)
    except UserError:
        return entries
    found = dict(entries)
    for prefix, experts in _layers_of_experts(model):
        names, inner = experts.names, experts.intermediate_size
        gate_up, down = (f"{prefix}.{name}" for name in names.stacked)
        if gate_up in entries and len(entries[gate_up].shape) == 3:
            del found[gate_up]
            stack = _Stack(gate_up, entries[gate_up], model.hidden_size, 2 * inner)
            half = stack.rows // 2
            found |= stack.experts(f"{prefix}.{names.gate}.weight", slice(0, half))
            found |= stack.experts(f"{prefix}.{names.up}.weight", slice(half, 2 * half))
        if down in entries and len(entries[down].shape) == 3:
            del found[down]
            stack = _Stack(down, entries[down], inner, model.hidden_size)
            found |= stack.experts(f"{prefix}.{names.down}.weight", slice(0, stack.rows))
    return found


def _layers_of_experts(model: ModelSpec) -> Iterator[tuple[str, Experts]]:
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mlp, Experts):
            yield model.layer_name(index), layer.mlp


@dataclass(frozen=True, slots=True)
class _Stack:
    """The matrices of all experts in one tensor, [out_features, in_features] each or the other way round."""

    name: str
    entry: TensorEntry
    in_features: int
    out_features: int

    @property
    def transposed(self) -> bool:
        usual, other = (self.out_features, self.in_features), (self.in_features, self.out_features)
        return self.entry.shape[1:] == other != usual

    @property
    def rows(self) -> int:
        """Outputs of an expert, as they lie here."""
        return self.entry.shape[2 if self.transposed else 1]

    def experts(self, name: str, rows: slice) -> dict[str, TensorEntry]:
        """Some rows of each expert. name: of its tensor, "*" for the expert."""
        width = self.entry.shape[1 if self.transposed else 2]
        shape = (rows.stop - rows.start, width)
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
