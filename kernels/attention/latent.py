"""Latent attention over a paged cache of latents (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1), in its absorbed form.

    cache   [num_blocks, block_size, RANK + ROPE]    of a token: its normed latent c, its rotated key r
    scores  q W_k . c + turned . r                   what makes keys of latents is applied to the queries instead,
    result  W_v (weights . c)                        and what makes values to what they find

All heads read one vector of each token, so a decode step reads RANK + ROPE numbers a token, and chunks do as decodes
do: a prompt costs some three times the products that keys and values made of its latents would, and no memory for them.
"""

import torch
import triton
from torch import Tensor

from ..fused.rows import FLOATS, need, need_rows
from .attend import reduce_kernel
from .config import TileConfig, num_splits, padded_dim
from .latent_kernels import latent_attend_kernel, latent_rope_kernel
from .paged import ACTIVATIONS, MIN_SPLIT, PagedBatch, _card, _compute_type

MAX_RANK = 512
MAX_SPLITS = 16  # float32 results of all of them stand in the registers of one program


def latent_rope_and_cache(
    q: Tensor,
    latents: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    *,
    interleaved: bool,
) -> None:
    """Rotate the last dimensions of each query head in place; write normed latents and rotated keys to the cache.

    q [T, heads, NOPE + ROPE], a token's heads contiguous. latents [T, RANK + ROPE]. weight [RANK], of their norm.
    cos, sin [positions, ROPE / 2]. positions, slots int64 [T]; slot -1: nothing is cached. cache [num_blocks,
    block_size, RANK + ROPE], contiguous. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "latent_rope_and_cache"
    need_rows(name, "q", q, FLOATS, None, None, None)
    tokens, heads, head_dim = q.shape
    need(q.stride(1) == head_dim, name, "the heads of a token in q are not contiguous")
    rank, rope = len(weight), 2 * cos.shape[-1]
    need(0 < rope <= head_dim, name, f"heads of {head_dim} cannot turn {rope} dimensions")
    need_rows(name, "latents", latents, FLOATS, tokens, rank + rope)
    need_rows(name, "weight", weight, FLOATS, rank)
    need_rows(name, "cos", cos, FLOATS, None, None)
    need_rows(name, "sin", sin, FLOATS, *cos.shape)
    need(cos.stride() == sin.stride(), name, "cos and sin lie differently in memory")
    need_rows(name, "positions", positions, (torch.int64,), tokens)
    need_rows(name, "slots", slots, (torch.int64,), tokens)
    need_rows(name, "cache", cache, FLOATS, None, None, rank + rope)
    need(cache.is_contiguous(), name, "the cache has gaps")
    if tokens:
        latent_rope_kernel[(tokens, heads + 1)](
            q,
            latents,
            weight,
            cos,
            sin,
            positions,
            slots,
            cache,
            q.stride(0),
            latents.stride(0),
            cos.stride(0),
            eps,
            HEADS=heads,
            NOPE=head_dim - rope,
            ROPE=rope,
            RANK=rank,
            PAIRS=triton.next_power_of_2(rope // 2),
            DIM=triton.next_power_of_2(rank),
            INTERLEAVED=interleaved,
            num_warps=1,
        )


def latent_attention(
    q: Tensor, turned: Tensor, cache: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """Causal attention of a step's tokens over their sequences' latents, their own included.

    q [T, heads, RANK]: queries times what makes keys; turned [T, heads, ROPE], rotated; float16 or bfloat16, the last
    dimension contiguous. cache as above, of q's dtype; the latents of these tokens must have been written. Returns a
    contiguous [T, heads, RANK]: weighted latents. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "latent_attention"
    need_rows(name, "q", q, tuple(ACTIVATIONS), None, None, None)
    tokens, heads, rank = q.shape
    need(0 < rank <= MAX_RANK, name, f"latents of {rank} dimensions; at most {MAX_RANK}")
    need_rows(name, "turned", turned, (q.dtype,), tokens, heads, None)
    need_rows(name, "cache", cache, (q.dtype,), None, None, rank + turned.shape[2])
    need(cache.is_contiguous(), name, "the cache has gaps")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    count, num_seqs = batch.num_decodes, len(batch.context_lengths)
    if count:
        seen = batch.max_context or batch.block_tables.shape[1] * cache.shape[1]
        config = tile_config(heads, rank, decode=True)
        tiles = triton.cdiv(heads, min(heads, config.block_m))
        wanted = num_splits(count, tiles, seen, MIN_SPLIT, _card(q.device)[1])
        splits, seqs = min(wanted, MAX_SPLITS), slice(0, count)
        _attend(q, turned, cache, out, batch, scale, seqs, config, count, splits)
    if count < num_seqs:
        config, seqs = tile_config(heads, rank, decode=False), slice(count, num_seqs)
        tokens_of_tile = config.block_m // min(heads, config.block_m)
        tiles = (tokens - count) // tokens_of_tile + num_seqs - count
        _attend(q, turned, cache, out, batch, scale, seqs, config, tiles, None)
    return out


def tile_config(heads: int, rank: int, decode: bool) -> TileConfig:
    """As many heads in a tile as registers hold without spills, for they read the same latents; of few heads, several
    tokens of a chunk. The same for all cards."""
    wide = padded_dim(rank) > 256
    if decode:
        return TileConfig(16, 32, 4, 2) if heads <= 16 else TileConfig(32, 16 if wide else 32, 4, 2)
    return TileConfig(32, 32, 8 if wide else 4, 2)


def _attend(
    q: Tensor,
    turned: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: PagedBatch,
    scale: float,
    seqs: slice,
    config: TileConfig,
    tiles: int,
    splits: int | None,
) -> None:
    """splits: of the keys of sequences with one token each, the first of the step; None: chunks, which have none."""
    _, heads, rank = q.shape
    rope, tile_heads = turned.shape[2], min(heads, config.block_m)
    parts, mass = out, None
    if splits is not None and splits > 1:
        shape = (tiles, heads, splits)
        parts = torch.empty(*shape, rank, dtype=torch.float32, device=q.device)
        mass = torch.empty(shape, dtype=torch.float32, device=q.device)
    tables, lengths = batch.block_tables[seqs], batch.context_lengths[seqs]
    latent_attend_kernel[(tiles, triton.cdiv(heads, tile_heads), splits or 1)](
        q,
        turned,
        cache,
        parts,
        mass,
        tables,
        batch.query_starts[seqs.start :],
        lengths,
        len(lengths),
        q.stride(0),
        q.stride(1),
        turned.stride(0),
        turned.stride(1),
        tables.stride(0),
        scale,
        HEADS=heads,
        TILE_HEADS=tile_heads,
        RANK=rank,
        ROPE=rope,
        DIM=padded_dim(rank),
        ROPE_DIM=max(16, padded_dim(rope)),
        BLOCK_SIZE=cache.shape[1],
        BLOCK_M=config.block_m,
        TILE=config.tile,
        SPLITS=splits or 1,
        MIN_SPLIT=MIN_SPLIT,
        PER_SEQ=splits is not None,
        COMPUTE=_compute_type(q.dtype, triton.knobs.runtime.interpret),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if mass is not None:
        reduce_kernel[(tiles, heads)](
            parts,
            mass,
            out,
            batch.query_starts,
            batch.context_lengths,
            out.stride(0),
            out.stride(1),
            HEAD_DIM=rank,
            DIM=padded_dim(rank),
            TILE=config.tile,
            SPLITS=splits,
            MIN_SPLIT=MIN_SPLIT,
            WINDOW=0,
            num_warps=4,
        )
