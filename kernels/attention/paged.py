"""Checked calls of the attention kernels: `paged_attention` for a batch, decodes first, then chunks.

One call takes a whole step: the first `num_decodes` sequences have one new token each and go to split-KV decode; the
others, chunks of any length after any prefix, to prefill.
Nothing is read back from the device: what the grid depends on is given by the caller as maxima, so that a graph
captured with maxima serves every batch within them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend import attend_kernel, reduce_kernel
from .cache import FP8, PagedCache, form, require
from .config import TileConfig, decode_config, num_splits, padded_dim, prefill_config

ACTIVATIONS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
MIN_SPLIT = 256  # keys below which another split costs more than it gains; a multiple of every tile


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where a step's tokens live; made once a step and shared by all layers. All tensors int32, on the device.

    Sequence s has the rows query_starts[s] .. query_starts[s + 1] - 1 of the step's tokens, the last of its
    context_lengths[s] tokens. A decode slot that is empty keeps its row and has the context length 0: its result is 0.
    """

    block_tables: Tensor  # [num_seqs, max_blocks]
    query_starts: Tensor  # [num_seqs + 1], the first 0
    context_lengths: Tensor  # [num_seqs]
    num_decodes: int  # sequences, the first ones, with one token each
    max_context: int = 0  # of the decodes, and of whatever a captured graph will serve; 0: what the block tables hold

    def __post_init__(self) -> None:
        tables, starts, lengths = self.block_tables, self.query_starts, self.context_lengths
        require(
            tables.dim() == 2
            and tables.stride(1) == 1
            and starts.shape == (len(tables) + 1,)
            and lengths.shape == (len(tables),),
            f"block_tables {form(tables)}, query_starts {form(starts)}, context_lengths {form(lengths)}: want "
            "[S, max_blocks], [S + 1] and [S]",
        )
        require(
            tables.dtype == starts.dtype == lengths.dtype == torch.int32
            and tables.device == starts.device == lengths.device,
            "block_tables, query_starts and context_lengths must be int32 and on one device",
        )
        require(
            0 <= self.num_decodes <= len(tables) and self.max_context >= 0,
            f"num_decodes {self.num_decodes}, max_context {self.max_context} do not fit {len(tables)} sequences",
        )


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer's attention is. scale: of the logits, mostly head_dim ** -0.5; window: positions seen, itself
    included; soft_cap: cap * tanh(logit / cap); sinks [num_heads]: logits that take mass and have no value."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    splits: int | None = (
        None  # a power of two; None: chosen. Results are the same in every batch only if it is given
    )

    def __post_init__(self) -> None:
        require(
            self.window is None or self.window >= 1,
            f"sliding window {self.window}: must be 1 or more",
        )
        require(
            self.soft_cap is None or self.soft_cap > 0, f"soft cap {self.soft_cap}: must be above 0"
        )
        require(
            self.splits is None or self.splits in (1, 2, 4, 8, 16, 32, 64),
            f"{self.splits} splits: must be a power of two, 64 at most",
        )


def paged_attention(q: Tensor, cache: PagedCache, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of a step's tokens over their sequences' cached keys and values, their own included.

    q [T, num_heads, head_dim], float16 or bfloat16, rotated, the last dimension contiguous. Keys and values of these
    tokens must have been written. Returns a contiguous [T, num_heads, head_dim] of the same dtype. Raises
    KernelArgumentError where shapes, dtypes or devices do not fit together.
    """
    _check(q, cache, batch, spec)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cc, multiprocessors = _card(q.device)
    num_decodes, num_seqs = batch.num_decodes, len(batch.context_lengths)
    group, head_dim = q.shape[1] // cache.keys.shape[0], q.shape[2]
    if num_decodes:
        config = decode_config(cc, head_dim, group, cache.keys.element_size())
        max_context = batch.max_context or batch.block_tables.shape[1] * cache.keys.shape[2]
        seen = min(max_context, spec.window or max_context)
        splits = spec.splits or num_splits(
            num_decodes, cache.keys.shape[0], seen, MIN_SPLIT, multiprocessors
        )
        _decode(q, out, cache, batch, spec, config, splits)
    if num_decodes < num_seqs:
        config = prefill_config(cc, head_dim, group, cache.keys.element_size())
        count = num_seqs - num_decodes
        tiles = (q.shape[0] - num_decodes if num_decodes else q.shape[0]) // (
            config.block_m // group
        ) + count
        _attend(
            q,
            out,
            None,
            cache,
            batch,
            slice(num_decodes, num_seqs),
            spec,
            config,
            (tiles, 1),
            per_seq=False,
        )
    return out


def _decode(
    q: Tensor,
    out: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    spec: AttentionSpec,
    config: TileConfig,
    splits: int,
) -> None:
    seqs = slice(0, batch.num_decodes)
    if splits == 1:
        _attend(
            q, out, None, cache, batch, seqs, spec, config, (batch.num_decodes, 1), per_seq=True
        )
        return
    _, num_heads, head_dim = q.shape
    rows = batch.num_decodes
    parts = torch.empty(rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
    mass = torch.empty(rows, num_heads, splits, dtype=torch.float32, device=q.device)
    _attend(
        q, parts, mass, cache, batch, seqs, spec, config, (batch.num_decodes, splits), per_seq=True
    )
    reduce_kernel[(batch.num_decodes, num_heads)](
        parts,
        mass,
        out,
        batch.query_starts,
        batch.context_lengths,
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        DIM=padded_dim(head_dim),
        TILE=config.tile,
        SPLITS=splits,
        MIN_SPLIT=MIN_SPLIT,
        WINDOW=spec.window or 0,
        num_warps=4,
    )


def _attend(
    q: Tensor,
    out: Tensor,
    mass: Tensor | None,
    cache: PagedCache,
    batch: PagedBatch,
    seqs: slice,
    spec: AttentionSpec,
    config: TileConfig,
    grid: tuple[int, int],
    per_seq: bool,
) -> None:
    num_kv_heads, _, block_size, head_dim = cache.keys.shape
    keys, values = _codes(cache.keys), _codes(cache.values)
    tables, starts, lengths = (
        batch.block_tables[seqs],
        batch.query_starts[seqs.start :],
        batch.context_lengths[seqs],
    )
    scales = cache.key_scales if cache.scales == "token" else None
    scale_strides = (0, 0, 0) if scales is None else scales.stride()
    interpreted = triton.knobs.runtime.interpret
    attend_kernel[(grid[0], num_kv_heads, grid[1])](
        q,
        out,
        mass,
        keys,
        values,
        cache.key_scales,
        cache.value_scales,
        spec.sinks,
        tables,
        starts,
        lengths,
        len(lengths),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *keys.stride()[:3],
        *scale_strides,
        tables.stride(0),
        spec.scale,
        GROUP=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        DIM=padded_dim(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        TILE=config.tile,
        SPLITS=grid[1],
        MIN_SPLIT=MIN_SPLIT,
        PER_SEQ=per_seq,
        SCALES=cache.scales,
        HAS_SINKS=spec.sinks is not None,
        WINDOW=spec.window or 0,
        SOFT_CAP=spec.soft_cap or 0.0,
        COMPUTE=_compute_type(q.dtype, interpreted),
        ASM=not interpreted,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _compute_type(dtype: torch.dtype, interpreted: bool) -> tl.dtype:
    """The interpreter keeps bfloat16 as integers: it converts them rightly and multiplies them wrongly."""
    return tl.float32 if interpreted and dtype == torch.bfloat16 else ACTIVATIONS[dtype]


def _codes(cached: Tensor) -> Tensor:
    """FP8 as its bits where the card cannot convert it."""
    return (
        cached.view(torch.uint8) if cached.dtype == FP8 and _card(cached.device)[0] < 89 else cached
    )


def _card(device: torch.device) -> tuple[int, int]:
    """Compute capability (86) and multiprocessors. In the interpreter, on a CPU, as the smallest card."""
    if device.type != "cuda":
        return 75, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _check(q: Tensor, cache: PagedCache, batch: PagedBatch, spec: AttentionSpec) -> None:
    kv_heads, _, _, head_dim = cache.keys.shape
    require(
        q.dim() == 3 and q.dtype in ACTIVATIONS and q.stride(2) == 1 and len(q) > 0,
        f"queries {form(q)}: want float16 or bfloat16 [T, num_heads, head_dim], head_dim contiguous",
    )
    require(
        q.shape[2] == head_dim and q.shape[1] % kv_heads == 0,
        f"queries {form(q)} do not fit keys {form(cache.keys)}: same head_dim, a multiple of the kv heads",
    )
    require(
        cache.keys.dtype == q.dtype or cache.keys.dtype not in ACTIVATIONS,
        f"queries of {q.dtype} over a KV cache of {cache.keys.dtype}: they must agree",
    )
    require(
        q.device == cache.keys.device == batch.block_tables.device,
        f"queries on {q.device}, KV cache on {cache.keys.device}, block tables on {batch.block_tables.device}",
    )
    require(
        q.device.type == "cuda" or triton.knobs.runtime.interpret,
        f"Triton attention runs on a CUDA device, not on {q.device}",
    )
    require(
        spec.sinks is None or (spec.sinks.shape == (q.shape[1],) and spec.sinks.device == q.device),
        "sinks must be [num_heads], on the queries' device",
    )
    require(
        _card(q.device)[0] >= 80 or q.dtype == torch.float16 or q.device.type != "cuda",
        "bfloat16 attention needs compute capability 8.0 or later: use float16",
    )
