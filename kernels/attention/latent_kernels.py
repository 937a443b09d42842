"""The device side of `latent.py`: what a token leaves in the cache, and attention of its heads over latents.

All heads read one vector of each token, so heads are rows of a tile as tokens are: a program has BLOCK_M // TILE_HEADS
tokens of a sequence, found as attend.py does, with TILE_HEADS heads each. A tile of latents serves all of them, once as
keys and once as values.

    q [heads, RANK] . c      turned [heads, ROPE] . r      softmax      weights . c -> [heads, RANK]
          cache, a token     [ c: RANK | r: ROPE ]

Splits of the keys are those of attend.py, whose `reduce_kernel` weighs them.
"""

import triton
import triton.language as tl

from .attend import LOG2E, NONE, _sequence_of, _split_length


@triton.jit
def _turn(first, second, at, table, cos_ptr, sin_ptr, ROPE: tl.constexpr):
    """Two halves of pairs, turned by the angles of a position."""
    inside = at < ROPE // 2
    cos = tl.load(cos_ptr + table + at, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table + at, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def latent_rope_kernel(
    q_ptr,  # [T, HEADS, NOPE + ROPE]; the last ROPE of each head are written
    latent_ptr,  # [T, RANK + ROPE]
    weight_ptr,  # [RANK]
    cos_ptr,
    sin_ptr,  # [positions, ROPE / 2]
    position_ptr,
    slot_ptr,  # int64 [T]
    cache_ptr,  # [num_blocks * block_size, RANK + ROPE]
    q_stride,
    latent_stride,
    table_stride,
    eps,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid: (T, HEADS + 1), the last for the latent. PAIRS, DIM: ROPE / 2, RANK up to powers of two."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    inside = pair < ROPE // 2
    at_first, at_second = pair, pair + ROPE // 2
    if INTERLEAVED:
        at_first, at_second = 2 * pair, 2 * pair + 1
    table = tl.load(position_ptr + token) * table_stride
    if head < HEADS:
        row = q_ptr + token * q_stride + head * (NOPE + ROPE) + NOPE
        first = tl.load(row + at_first, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(row + at_second, mask=inside, other=0.0).to(tl.float32)
        first, second = _turn(first, second, pair, table, cos_ptr, sin_ptr, ROPE)
        tl.store(row + at_first, first.to(q_ptr.dtype.element_ty), mask=inside)
        tl.store(row + at_second, second.to(q_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_ptr + token)
        if slot >= 0:
            source = latent_ptr + token * latent_stride
            target = cache_ptr + slot * (RANK + ROPE)
            kind = cache_ptr.dtype.element_ty
            dims = tl.arange(0, DIM)
            x = tl.load(source + dims, mask=dims < RANK, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + dims, mask=dims < RANK, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * weight
            tl.store(target + dims, x.to(kind), mask=dims < RANK)
            first = tl.load(source + RANK + at_first, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(source + RANK + at_second, mask=inside, other=0.0).to(tl.float32)
            first, second = _turn(first, second, pair, table, cos_ptr, sin_ptr, ROPE)
            tl.store(target + RANK + at_first, first.to(kind), mask=inside)
            tl.store(target + RANK + at_second, second.to(kind), mask=inside)


@triton.jit
def _walk(
    q,
    turned,
    position,
    begin,
    end,
    table,
    cache_ptr,
    factor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Latents begin..end-1 into the running maximum and mass of each row, and its weighted latents."""
    dims, rope_dims = tl.arange(0, DIM), tl.arange(0, ROPE_DIM)
    top = tl.full([BLOCK_M], NONE, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        live = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        row = cache_ptr + (block * BLOCK_SIZE + at % BLOCK_SIZE) * (RANK + ROPE)
        known = live[:, None]
        if RANK < DIM:
            known = live[:, None] & (dims < RANK)[None, :]
        c = tl.load(row[:, None] + dims[None, :], mask=known, other=0.0).to(COMPUTE)
        r_known = live[:, None] & (rope_dims < ROPE)[None, :]
        r = tl.load(row[:, None] + RANK + rope_dims[None, :], mask=r_known, other=0.0)
        products = tl.dot(q, tl.trans(c))
        products = tl.dot(turned, tl.trans(r.to(COMPUTE)), products)
        seen = live[None, :] & (at[None, :] <= position[:, None])
        logits = tl.where(seen, products * factor, NONE)
        new_top = tl.maximum(top, tl.max(logits, 1))  # every row sees the first key: no -inf
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(COMPUTE), c, acc * shrink[:, None])
        top = new_top
    return top, mass, acc


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "start_ptr", "length_ptr"],
)
def latent_attend_kernel(
    q_ptr,  # [T, HEADS, RANK]
    turned_ptr,  # [T, HEADS, ROPE]
    cache_ptr,  # [num_blocks * BLOCK_SIZE, RANK + ROPE]
    out_ptr,  # [T, HEADS, RANK]; float32 [T, HEADS, SPLITS, RANK] where SPLITS > 1
    mass_ptr,  # float32 [T, HEADS, SPLITS]: log2 of the mass; not used where SPLITS == 1
    table_ptr,  # int32 [num_seqs, max_blocks]
    start_ptr,  # int32 [num_seqs + 1]
    length_ptr,  # int32 [num_seqs]
    num_seqs,
    q_stride_token,
    q_stride_head,
    turned_stride_token,
    turned_stride_head,
    table_stride,
    softmax_scale,
    HEADS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PER_SEQ: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid: (tiles, tiles of heads, SPLITS). PER_SEQ: a tile is one sequence, of one token."""
    BLOCK_Q: tl.constexpr = BLOCK_M // TILE_HEADS
    split = tl.program_id(2)
    seq, first_tile = tl.program_id(0), tl.program_id(0)
    if not PER_SEQ:
        seq, first_tile = _sequence_of(tl.program_id(0), start_ptr, num_seqs, BLOCK_Q)
    query_start = tl.load(start_ptr + seq)
    num_queries = tl.load(start_ptr + seq + 1) - query_start
    index = tl.cdiv(num_queries, BLOCK_Q) - 1 - (tl.program_id(0) - first_tile)
    if index < 0:
        return
    context = tl.load(length_ptr + seq)
    begin = index * 0
    end = tl.minimum(context - num_queries + (index + 1) * BLOCK_Q, context)
    if SPLITS > 1:
        length = _split_length(begin, end, SPLITS, MIN_SPLIT, TILE)
        begin += split * length
        if begin >= end:
            return
        end = tl.minimum(begin + length, end)

    rows, dims, rope_dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM), tl.arange(0, ROPE_DIM)
    query = index * BLOCK_Q + rows // TILE_HEADS
    head = tl.program_id(1) * TILE_HEADS + rows % TILE_HEADS
    is_row = (rows < BLOCK_Q * TILE_HEADS) & (query < num_queries) & (head < HEADS)
    token = (query_start + query).to(tl.int64)
    live = is_row[:, None] & (dims < RANK)[None, :]
    q_at = (token * q_stride_token + head * q_stride_head)[:, None] + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=live, other=0.0).to(COMPUTE)
    turned_at = (token * turned_stride_token + head * turned_stride_head)[:, None]
    turned_live = is_row[:, None] & (rope_dims < ROPE)[None, :]
    turned = tl.load(turned_ptr + turned_at + rope_dims[None, :], mask=turned_live, other=0.0)
    top, mass, acc = _walk(
        q,
        turned.to(COMPUTE),
        context - num_queries + query,
        begin,
        end,
        table_ptr + seq.to(tl.int64) * table_stride,
        cache_ptr,
        softmax_scale * LOG2E,
        RANK,
        ROPE,
        DIM,
        ROPE_DIM,
        BLOCK_SIZE,
        BLOCK_M,
        TILE,
        COMPUTE,
    )
    safe_mass = tl.where(mass > 0, mass, 1.0)
    result = acc / safe_mass[:, None]
    place = (token * HEADS + head) * SPLITS + split
    out_at = out_ptr + place[:, None] * RANK + dims[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=live)
    if SPLITS > 1:
        log_mass = tl.where(mass > 0, top + tl.log2(safe_mass), NONE)
        tl.store(mass_ptr + place, log_mass, mask=is_row)
