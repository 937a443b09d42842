"""Experts that lie in one tensor a layer, seen one by one under the names that most checkpoints give them:

    mlp.experts.gate_up_proj [experts, 2 * inner, hidden] -> mlp.experts.3.gate_proj.weight [inner, hidden]
                                                             mlp.experts.3.up_proj.weight   [inner, hidden]
    mlp.experts.down_proj    [experts, hidden, inner]     -> mlp.experts.3.down_proj.weight [hidden, inner]

So whoever reads a checkpoint knows one layout. Only the rows of the expert that is asked for are read.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from ...architectures.base import ExpertNames, Experts, ModelSpec
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
    for prefix, names in _stacked_layers(model):
        gate_up, down = (f"{prefix}.{name}" for name in names.stacked)
        if gate_up in entries and len(entries[gate_up].shape) == 3:
            del found[gate_up]
            half = entries[gate_up].shape[1] // 2
            for name, rows in ((names.gate, slice(0, half)), (names.up, slice(half, 2 * half))):
                found |= _experts(entries[gate_up], gate_up, f"{prefix}.{name}.weight", rows)
        if down in entries and len(entries[down].shape) == 3:
            del found[down]
            rows = slice(0, entries[down].shape[1])
            found |= _experts(entries[down], down, f"{prefix}.{names.down}.weight", rows)
    return found


def _stacked_layers(model: ModelSpec) -> Iterator[tuple[str, ExpertNames]]:
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mlp, Experts):
            yield model.layer_name(index), layer.mlp.names


def _experts(whole: TensorEntry, source: str, name: str, rows: slice) -> dict[str, TensorEntry]:
    """Some rows of each expert. name: of its tensor, "*" for the expert."""
    shape = (rows.stop - rows.start, whole.shape[2])
    nbytes = prod(shape) * whole.dtype.itemsize
    return {
        name.replace("*", str(expert)): TensorEntry(
            whole.file, whole.dtype, shape, nbytes, (source, (expert, rows))
        )
        for expert in range(whole.shape[0])
    }
