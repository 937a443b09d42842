"""The two attention kernels: softmax(q K^T) V over paged keys and values, and the merging of splits.

A program takes a tile of queries of one sequence for one kv head, and walks over the keys they see with a running
maximum (Milakov and Gimelshein 2018; Dao et al. 2022). The query heads that share the kv head are rows of the same
tile, so that the keys are read once for all of them and a decode step, too, is a product for the tensor cores:

    rows of a tile    token 0: head 0 .. GROUP-1 | token 1: head 0 .. GROUP-1 | ...      BLOCK_M // GROUP tokens

    query_starts      sequence s owns the rows query_starts[s] .. query_starts[s + 1] - 1 of q, its newest tokens:
                      position = context_lengths[s] - its number of queries + index

Which tokens a program has is read on the device; the grid is fixed by maxima, and programs past the end return at once:
a captured graph serves every batch up to its size.

    one tile per sequence (PER_SEQ)   program x is the sequence: decode
    many                              sequence s starts at tile query_starts[s] // BLOCK_Q + s, found by bisection, and
                                      the last tile of a sequence, which sees most, is started first

With SPLITS > 1 the keys of a tile are shared out among programs z (flash decoding). Each leaves its own softmax's
result and the logarithm of its mass, which `reduce_kernel` weighs. Results do not depend on the order programs run in.

All logarithms and exponentials have base 2. Positions may exceed 2^31 bytes from the cache's start: offsets are int64.
"""

import triton
import triton.language as tl

from .codes import E4M3_FACTOR, decode

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(float("-inf"))
# Weights of a quantized value cache are rounded relative to the largest scale; float16 has this much room above 1.
HEADROOM = tl.constexpr(1.0 / 4096)


@triton.jit
def _sequence_of(tile, query_starts, num_seqs, BLOCK_Q: tl.constexpr):
    """The last sequence that starts at or before `tile`, and its first tile."""
    base = tl.load(query_starts)
    low, high = tile * 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first = (tl.load(query_starts + middle) - base) // BLOCK_Q + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low, (tl.load(query_starts + low) - base) // BLOCK_Q + low


@triton.jit
def _keys_seen(first, last, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that queries at positions first..last see: [begin, end), begin a multiple of TILE."""
    begin = first * 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // TILE * TILE
    return begin, tl.maximum(last + 1, 0)


@triton.jit
def _split_length(begin, end, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Keys a split has: a multiple of TILE; short contexts use fewer splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(end - begin, SPLITS), TILE) * TILE, MIN_SPLIT)


@triton.jit
def _logits(products, factor, SOFT_CAP: tl.constexpr):
    """Base-2 logits; a soft cap is cap * tanh(logit / cap) (Gemma 2)."""
    if SOFT_CAP > 0:
        tanh = 1 - 2 / (1 + tl.exp2(products * (factor * (2 * LOG2E / SOFT_CAP))))
        return tanh * (SOFT_CAP * LOG2E)
    else:
        return products * (factor * LOG2E)


@triton.jit
def _walk(
    q,
    position,
    top,
    mass,
    acc,
    unit,
    begin,
    end,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_stride_block,
    kv_stride_offset,
    scale_stride_block,
    scale_stride_offset,
    factor,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Keys begin..end-1 into (top, mass, acc): running maximum and mass of each row, and its weighted values.

    acc is in units of `unit`, which follows the largest value scale met. Unless MASKED, every row sees every key.
    """
    dims = tl.arange(0, DIM)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        live = at < end
        if (
            MASKED and WINDOW > 0
        ):  # what lies behind all windows may be released: the table names nothing there
            live &= at > tl.min(position, 0) - WINDOW
        if MASKED:
            block = tl.load(table + at // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        else:
            block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        offset = at % BLOCK_SIZE
        token = block * kv_stride_block + offset * kv_stride_offset
        if HEAD_DIM == DIM:
            k = tl.load(keys + token[None, :] + dims[:, None])
        else:
            k = tl.load(
                keys + token[None, :] + dims[:, None], mask=dims[:, None] < HEAD_DIM, other=0.0
            )
        products = tl.dot(q, decode(k, COMPUTE, ASM))
        if TOKEN_SCALES:
            scale_at = block * scale_stride_block + offset * scale_stride_offset
            products *= tl.load(key_scales + scale_at)[None, :]
        logits = _logits(products, factor, SOFT_CAP)
        if MASKED:
            seen = live[None, :] & (at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen &= at[None, :] > position[:, None] - WINDOW
            logits = tl.where(seen, logits, NONE)
        new_top = tl.maximum(top, tl.max(logits, 1))
        pivot = tl.where(new_top == NONE, 0.0, new_top) if MASKED else new_top
        weights = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        mass = mass * shrink + tl.sum(weights, 1)
        top = new_top
        if TOKEN_SCALES:
            scales = tl.load(value_scales + scale_at, mask=live, other=0.0)
            new_unit = tl.maximum(unit, tl.max(scales, 0) * HEADROOM)
            weights *= (scales / new_unit)[None, :]
            shrink *= unit / new_unit
            unit = new_unit
        # What lies behind the end, or a window, is never multiplied: 0 * NaN is NaN.
        if HEAD_DIM == DIM and not MASKED:
            v = tl.load(values + token[:, None] + dims[None, :])
        elif HEAD_DIM == DIM:
            v = tl.load(values + token[:, None] + dims[None, :], mask=live[:, None], other=0.0)
        else:
            v = tl.load(
                values + token[:, None] + dims[None, :],
                mask=live[:, None] & (dims[None, :] < HEAD_DIM),
                other=0.0,
            )
        acc = tl.dot(weights.to(COMPUTE), decode(v, COMPUTE, ASM), acc * shrink[:, None])
    return top, mass, acc, unit


# One compilation whatever the batch is: sequences, and where in it the chunks start, change from step to step.
@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lengths"],
)
def attend_kernel(
    q,  # [T, num_heads, HEAD_DIM]
    out,  # the same; float32 [T, num_heads, SPLITS, HEAD_DIM] where SPLITS > 1
    split_mass,  # float32 [T, num_heads, SPLITS]: log2 of the mass; not used where SPLITS == 1
    keys,
    values,  # [num_kv_heads, num_blocks, BLOCK_SIZE, HEAD_DIM]; uint8: the bits of e4m3fn
    key_scales,
    value_scales,  # float32 [1] ("tensor") or [num_blocks, BLOCK_SIZE, num_kv_heads] ("token")
    sinks,  # [num_heads], logits that take part in the softmax and have no value
    block_tables,  # int32 [num_seqs, max_blocks]
    query_starts,  # int32 [num_seqs + 1]
    context_lengths,  # int32 [num_seqs], this step's tokens included; 0: an empty slot, whose result is zeros
    num_seqs,
    q_stride_token,
    q_stride_head,
    out_stride_token,
    out_stride_head,
    kv_stride_head,
    kv_stride_block,
    kv_stride_offset,
    scale_stride_block,
    scale_stride_offset,
    scale_stride_head,
    table_stride,
    softmax_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PER_SEQ: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid: (tiles, num_kv_heads, SPLITS). DIM: HEAD_DIM padded to a power of two. WINDOW, SOFT_CAP: 0 for none."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head, split = tl.program_id(1), tl.program_id(2)
    seq, first_tile = tl.program_id(0), tl.program_id(0)
    if not PER_SEQ:
        seq, first_tile = _sequence_of(tl.program_id(0), query_starts, num_seqs, BLOCK_Q)
    query_start = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - query_start
    index = tl.cdiv(num_queries, BLOCK_Q) - 1 - (tl.program_id(0) - first_tile)
    if index < 0:
        return
    context = tl.load(context_lengths + seq)
    first = context - num_queries + index * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, context) - 1
    begin, end = _keys_seen(first, last, TILE, WINDOW)
    if SPLITS > 1:
        length = _split_length(begin, end, SPLITS, MIN_SPLIT, TILE)
        begin += split * length
        if begin >= end:
            return
        end = tl.minimum(begin + length, end)

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    query = index * BLOCK_Q + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    position = context - num_queries + query
    row_live = (rows < BLOCK_Q * GROUP) & (query < num_queries)
    live = row_live[:, None] & (dims[None, :] < HEAD_DIM)
    token = (query_start + query).to(tl.int64)
    q_at = token * q_stride_token + head * q_stride_head
    q_tile = tl.load(q + q_at[:, None] + dims[None, :], mask=live, other=0).to(COMPUTE)

    key_factor, value_factor = softmax_scale, tl.full([], 1.0, tl.float32)
    if SCALES == "tensor":
        key_factor, value_factor = softmax_scale * tl.load(key_scales), tl.load(value_scales)
    if keys.dtype.element_ty == tl.uint8:
        key_factor, value_factor = key_factor * E4M3_FACTOR, value_factor * E4M3_FACTOR
    top = tl.full([BLOCK_M], NONE, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=row_live, other=0).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
        mass = tl.where(split == 0, 1.0, mass)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    unit = tl.full([], 1e-30, tl.float32)
    keys += kv_head.to(tl.int64) * kv_stride_head
    values += kv_head.to(tl.int64) * kv_stride_head
    if SCALES == "token":
        key_scales += kv_head.to(tl.int64) * scale_stride_head
        value_scales += kv_head.to(tl.int64) * scale_stride_head
    table = block_tables + seq.to(tl.int64) * table_stride
    # Tiles below the first query's position need no mask; a decode tile has one masked one, not worth a second loop.
    masked_from = begin
    if WINDOW == 0 and not PER_SEQ:
        masked_from = tl.maximum(first + 1, 0) // TILE * TILE
        top, mass, acc, unit = _walk(
            q_tile,
            position,
            top,
            mass,
            acc,
            unit,
            begin,
            masked_from,
            keys,
            values,
            key_scales,
            value_scales,
            table,
            kv_stride_block,
            kv_stride_offset,
            scale_stride_block,
            scale_stride_offset,
            key_factor,
            HEAD_DIM,
            DIM,
            BLOCK_SIZE,
            TILE,
            False,
            SCALES == "token",
            WINDOW,
            SOFT_CAP,
            COMPUTE,
            ASM,
        )
    top, mass, acc, unit = _walk(
        q_tile,
        position,
        top,
        mass,
        acc,
        unit,
        masked_from,
        end,
        keys,
        values,
        key_scales,
        value_scales,
        table,
        kv_stride_block,
        kv_stride_offset,
        scale_stride_block,
        scale_stride_offset,
        key_factor,
        HEAD_DIM,
        DIM,
        BLOCK_SIZE,
        TILE,
        True,
        SCALES == "token",
        WINDOW,
        SOFT_CAP,
        COMPUTE,
        ASM,
    )

    if SCALES == "token":
        value_factor *= unit
    safe_mass = tl.where(mass > 0, mass, 1.0)
    result = acc * (value_factor / safe_mass)[:, None]
    out_at = token * out_stride_token + head * out_stride_head + split * HEAD_DIM
    tl.store(out + out_at[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=live)
    if SPLITS > 1:
        num_heads = tl.num_programs(1) * GROUP
        log_mass = tl.where(mass > 0, top + tl.log2(safe_mass), NONE)
        tl.store(split_mass + (token * num_heads + head) * SPLITS + split, log_mass, mask=row_live)


@triton.jit
def reduce_kernel(
    split_out,
    split_mass,  # what attend_kernel left
    out,  # [T, num_heads, HEAD_DIM]
    query_starts,
    context_lengths,
    out_stride_token,
    out_stride_head,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Grid: (num_seqs, num_heads). The splits of a sequence's one query, weighted by their masses."""
    seq, head = tl.program_id(0), tl.program_id(1)
    query_start = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - query_start
    if num_queries <= 0:
        return
    context = tl.load(context_lengths + seq)
    begin, end = _keys_seen(context - num_queries, context - 1, TILE, WINDOW)
    length = _split_length(begin, end, SPLITS, MIN_SPLIT, TILE)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM)
    live = begin + splits * length < end
    token = query_start.to(tl.int64)
    row = (token * tl.num_programs(1) + head) * SPLITS
    mass = tl.load(split_mass + row + splits, mask=live, other=NONE)
    top = tl.max(mass, 0)
    weights = tl.exp2(mass - tl.where(top == NONE, 0.0, top))
    total = tl.sum(weights, 0)
    parts = tl.load(
        split_out + (row + splits)[:, None] * HEAD_DIM + dims[None, :],
        mask=live[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out + token * out_stride_token + head * out_stride_head + dims,
        result.to(out.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
