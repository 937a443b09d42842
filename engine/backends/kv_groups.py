"""Which layers share block tables: those of whose caches as many last tokens are seen are one KV group
(engine/scheduling/kv_cache_manager.py)."""

from collections.abc import Sequence
from dataclasses import replace

from ...architectures.base import LayerSpec, ModelSpec


def group_windows(model: ModelSpec) -> tuple[int | None, ...]:
    """Of each group, the widest first. A model whose layers see no cache has one group, of none."""
    found = set(model.windows.values())
    limited = sorted((each for each in found if each is not None), reverse=True)
    return (None, *limited) if None in found or not limited else tuple(limited)


def layer_groups(model: ModelSpec, layers: Sequence[LayerSpec], num_groups: int) -> dict[int, int]:
    """Index among `layers`, consecutive ones of the model -> group, of those that see a cache. num_groups 1: there is
    one group, whatever they see."""
    windows = replace(model, layers=tuple(layers)).windows
    if num_groups == 1:
        return dict.fromkeys(windows, 0)
    groups = group_windows(model)
    return {index: groups.index(window) for index, window in windows.items()}
