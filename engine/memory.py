"""The memory budget: planned from headers, then checked against what loading really took, then degraded, never guessed.

    available = weights + activations + KV cache + recurrent states + what is left to the machine

The ladder, when it does not fit: a smaller KV cache, then a shorter context (both only where the user did not fix
them), then one error that says what is missing.
"""

import logging
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import torch

from ..architectures.base import LatentAttention, ModelSpec
from ..errors import UserError
from .config import EngineConfig
from .host_memory import Headroom, gib, headroom
from .vision import KEPT_BYTES

logger = logging.getLogger(__name__)

_CPU_SHARE = 0.4  # of the memory left after loading: the machine has other things to do
_GPU_SHARE = 0.9
_SNAPSHOTS = 32  # of recurrent states, kept for prompts that begin as one before them
_WINDOW_SHARE = 4  # blocks of full attention for each of a window, where memory is scarce
_ANY = 1 << 40  # blocks
# An image of the most pixels while it is read and cut takes 300 MiB, a frame of 4096 patches in the tower as much again
VISION_BYTES = 5 * 2**27 + KEPT_BYTES
_STATE_SHARE = 0.5  # of the cache's memory that states may take


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, and what they buy."""

    blocks: tuple[int, ...]  # of each KV group
    max_model_len: int
    kv_cache: int
    activations: int
    num_states: int = 0  # slots for recurrent states, of requests and snapshots
    states: int = 0

    @property
    def num_blocks(self) -> int:
        """Of the first KV group, which sees the most."""
        return self.blocks[0]


def kv_bytes_per_token(
    model: ModelSpec,
    dtype: torch.dtype,
    cache_dtype: str = "auto",
    layers: Collection[int] | None = None,
) -> int:
    """Keys and values, or latents, of those of the layers (None: of all) that have their own; in 8 bits, with a float32
    scale for each vector."""

    def vector(dim: int) -> int:
        return dim * dtype.itemsize if cache_dtype == "auto" else dim + 4

    mixers = [mixer for i, mixer in model.cached.items() if layers is None or i in layers]
    return sum(count * vector(dim) for mixer in mixers for count, dim in mixer.kept)


def state_bytes(model: ModelSpec) -> int:
    """The recurrent states of all layers, in float32: what one request carries, or one snapshot."""
    shapes = (shape for layer in model.layers for shape in layer.state_shapes)
    return sum(4 * prod(shape) for shape in shapes)


def activation_bytes(
    config: EngineConfig, model: ModelSpec, dtype: torch.dtype, device: torch.device
) -> int:
    """An upper bound for one step: the widest intermediate of a full batch, float32 logits twice over, and on a GPU the
    widest matrix in 16 bits, which large batches are multiplied by after it has been dequantized."""
    mixers = [layer.mixer for layer in model.layers if layer.mixer is not None]
    mlps = [layer.mlp for layer in model.layers if layer.mlp is not None]
    inner = max((width for mlp in mlps for width in mlp.widths), default=0)
    between = max((mlp.numbers_per_token(model.hidden_size) for mlp in mlps), default=0)
    groups = [group for mixer in mixers for group in mixer.groups(model.hidden_size)]
    mixed = max((sum(group.out_features) for group in groups), default=0)
    heads = max(
        (m.numbers_per_token for m in model.cached.values() if isinstance(m, LatentAttention)),
        default=0,
    )
    streams = 4 if model.alt_up is None else 4 + 3 * model.alt_up.num_streams  # of hidden states
    per_token = streams * model.hidden_size + between + 2 * mixed + heads
    matrix = 2 * inner * model.hidden_size * dtype.itemsize if device.type == "cuda" else 0
    logits = 2 * 4 * config.max_num_seqs * model.vocab_size
    return config.max_num_batched_tokens * per_token * dtype.itemsize + logits + matrix


def tensor_bytes(thing: Any) -> int:
    """Of all tensors in a nest of lists, dicts and dataclasses; memory that several share counts once."""
    found: dict[int, int] = {}
    _collect(thing, found)
    return sum(found.values())


def _collect(thing: Any, found: dict[int, int]) -> None:
    if isinstance(thing, torch.Tensor):
        place = id(thing) if thing.is_mkldnn else thing.data_ptr()
        found[place] = max(found.get(place, 0), thing.nbytes)
    elif isinstance(thing, (list, tuple)):
        for each in thing:
            _collect(each, found)
    elif isinstance(thing, dict):
        _collect(list(thing.values()), found)
    elif is_dataclass(thing) and not isinstance(thing, type):
        _collect([getattr(thing, each.name) for each in fields(thing)], found)


def release_cached(device: torch.device) -> None:
    """Give back what loading needed for a moment, so that it is seen as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_weights_fit(weight_bytes: int, model: ModelSpec, device: torch.device) -> None:
    """Refuse before loading what cannot fit. Raises UserError with both numbers."""
    room = available(device)
    on_cpu = device.type == "cpu"
    # There, loading has the codes of an output head twice for a moment: as they are made, and in the kernels' layout.
    needed = weight_bytes + (2 * model.vocab_size * model.hidden_size if on_cpu else 0)
    if needed > room.free:
        raise UserError(
            f"loading the weights needs {gib(needed)}, {gib(room.free)} are free of {room.limit}; use a smaller or a "
            "quantized checkpoint, or raise the limit"
        )


def plan(
    config: EngineConfig,
    model: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    windows: Sequence[int | None] = (None,),
    reserved: int = 0,
) -> MemoryPlan:
    """Size the KV cache and the slots of states, after the weights are loaded. windows: of the KV groups, the widest
    first; reserved: bytes that others will take. Raises UserError if not one useful request fits."""
    activations = activation_bytes(config, model, dtype, device)
    groups = _groups(config, model, dtype, windows)
    state = state_bytes(model)
    snapshots = _SNAPSHOTS if config.enable_prefix_caching else 0
    num_states = config.max_num_seqs + snapshots if state else 0
    wanted_len = config.max_model_len or model.max_position_embeddings
    if wanted_len > model.max_position_embeddings:
        raise UserError(
            f"--max-model-len {wanted_len} is more than the {model.max_position_embeddings} positions "
            "the model was trained for"
        )
    enough = config.max_num_seqs * -(-wanted_len // config.block_size)
    budget = config.kv_cache_memory
    if budget is None:
        share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
        room = available(device)
        logger.info("the KV cache is planned in %s, free of %s", gib(room.free), room.limit)
        free = int(share * room.free) - activations - reserved
        if free < 0:
            raise UserError(
                f"nothing is left for a KV cache: a full step's activations need {gib(activations)}, and {share:.0%} "
                f"may be taken of {gib(room.free)} that are free of {room.limit}; lower --max-num-batched-tokens or "
                "--max-num-seqs, or raise the limit"
            )
        plenty = sum(group.bytes(min(enough, group.most)) for group in groups)
        budget = min(free, plenty + num_states * state)
    if state:
        num_states = _fitting_states(num_states, state, budget)
    left = budget - num_states * state
    blocks = [enough] * len(groups)
    if any(group.block for group in groups):
        blocks = _share(groups, left, enough if config.kv_cache_memory is None else _ANY)
    capacity = blocks[0] * config.block_size
    if capacity < min(wanted_len, config.max_model_len or config.block_size):
        count = -(-wanted_len // config.block_size)
        needed = sum(group.bytes(group.blocks_beside(count)) for group in groups)
        raise UserError(
            f"the KV cache holds {max(0, capacity)} tokens in {gib(left)}; a context of {wanted_len} "
            f"needs {gib(needed)}: lower --max-model-len, or raise --kv-cache-memory"
        )
    return MemoryPlan(
        tuple(blocks),
        min(wanted_len, capacity),
        sum(group.bytes(count) for group, count in zip(groups, blocks, strict=True)),
        activations,
        num_states,
        num_states * state,
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """What is to be known of a KV group to give it blocks."""

    block: int  # bytes
    least: int  # blocks with which a request of any length runs
    most: int  # with which as many requests run as may

    def bytes(self, blocks: int) -> int:
        return blocks * self.block

    def blocks_beside(self, widest: int) -> int:
        """Where memory is scarce: of a window, a share of the `widest` group's. Short requests hold as many in each,
        long ones only there."""
        return min(widest, self.most, max(self.least, -(-widest // _WINDOW_SHARE)))


def _groups(
    config: EngineConfig, model: ModelSpec, dtype: torch.dtype, windows: Sequence[int | None]
) -> list[_Group]:
    def group(window: int | None) -> _Group:
        layers = [i for i, own in model.windows.items() if len(windows) == 1 or own == window]
        kept = kv_bytes_per_token(model, dtype, config.kv_cache_dtype, layers)
        block = kept * config.block_size
        if window is None or window == windows[0]:
            return _Group(block, _ANY, _ANY)
        # A window begins anywhere in a block, and so does the chunk behind it.
        chunk = -(-config.max_num_batched_tokens // config.block_size)
        seen = -(-(window - 1) // config.block_size) + 2
        return _Group(block, seen + chunk, config.max_num_seqs * seen + chunk)

    return [group(window) for window in windows]


def _share(groups: list[_Group], budget: int, most: int) -> list[int]:
    """Blocks of each group within the budget: of the first as many as fit, `most` at most, then of windows as many as
    requests may need."""

    def is_too_much(count: int) -> bool:
        return sum(each.bytes(each.blocks_beside(count)) for each in groups) > budget

    counts = range(budget // groups[0].block + 2)
    first = min(most, max(0, bisect_left(counts, True, key=is_too_much) - 1))
    blocks = [group.blocks_beside(first) for group in groups]
    left = budget - sum(group.bytes(n) for group, n in zip(groups, blocks, strict=True))
    for index, group in enumerate(groups[1:], 1):
        wanted = min(blocks[0], group.most) - blocks[index]
        more = min(wanted, left // group.block)
        blocks[index] += more
        left -= group.bytes(more)
    return blocks


def _fitting_states(wanted: int, state: int, budget: int) -> int:
    """Slots of `state` bytes within their share of the budget: one to compute in and one to go on from, at least."""
    count = min(wanted, int(budget * _STATE_SHARE) // state)
    if count < 2:
        raise UserError(
            f"the recurrent state of one request takes {gib(state)}, and two do not fit in half of the {gib(budget)} "
            "that caches may take: raise --kv-cache-memory"
        )
    if count < wanted:
        logger.info("%d recurrent states of %s fit, %d were wished", count, gib(state), wanted)
    return count


def available_bytes(device: torch.device) -> int:
    """Memory that could be had now."""
    return available(device).free


def available(device: torch.device) -> Headroom:
    """Memory that could be had now, and what bounds it."""
    if device.type == "cuda":
        return Headroom(torch.cuda.mem_get_info(device)[0], f"{device}'s memory")
    return headroom()
