"""What config.json says of experts, in the spellings of the families that have them."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import CheckpointError
from .base import Experts, FeedForward, GatedMlp
from .config import Config

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # one number by its names


def experts(
    config: Config,
    inner: str,
    *,
    count: int | None,
    top_k: int | None,
    width: int,
    activation: Any = None,
    **more: Any,
) -> Experts:
    """inner: the field with the width of an expert. count, top_k, width: where the file says nothing (None: it must).
    activation: None: the file's. more: fields of Experts."""
    name = next((name for name in COUNTS if config.get(name) is not None), COUNTS[0])
    num_experts = config.size(name, count)
    chosen = config.size("num_experts_per_tok", top_k)
    if chosen > num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {chosen}, of {num_experts} experts"
        )
    activation = activation or config.activation()
    return Experts(num_experts, chosen, config.size(inner, width), activation, **more)


def limited_groups(config: Config, num_experts: int, group_rank: int = 2) -> tuple[int, int] | None:
    """DeepSeek's n_group and topk_group; None where they limit nothing. group_rank: of Experts."""
    groups, best = config.size("n_group", 1), config.size("topk_group", 1)
    if num_experts % groups or best > groups or num_experts // groups < group_rank:
        raise CheckpointError(
            f"config.json: {num_experts} experts in {groups} groups, the best {best} of them, make no sense"
        )
    return None if best == groups else (groups, best)


def sparse_layers(config: Config) -> Callable[[int], bool]:
    """Qwen's rule of which layers have experts: each decoder_sparse_step-th, but for those of mlp_only_layers."""
    step, dense = config.size("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise CheckpointError("config.json: mlp_only_layers is no list")
    return lambda layer: layer not in dense and (layer + 1) % step == 0


def in_layers(
    config: Config, sparse: Callable[[int], bool], found: Experts, width: int | None
) -> Sequence[FeedForward]:
    """One feed-forward a layer: the experts, or a dense MLP (of intermediate_size, `width` where the file says
    nothing; None: it must)."""
    dense = GatedMlp(config.size("intermediate_size", width), found.activation)
    layers = range(config.size("num_hidden_layers"))
    return [found if sparse(layer) else dense for layer in layers]
