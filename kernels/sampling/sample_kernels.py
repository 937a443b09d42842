"""The device side of `sample.py`: a scan of the vocabulary in pieces, then one program a row that chooses."""

import triton
import triton.language as tl

PIECE = 2048  # logits in one program of the scan, and in one step of a row's later passes


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _race(weight, ids, key_0, key_1):
    """weight / E, E exponential: engine/sampler.py's hash of (seed, position, id). The keys are uint32."""
    bits = _mix32(_mix32(ids.to(tl.uint32) + key_0) ^ key_1)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    rest = 1.0 - uniform
    # -log1p(-u): log(1 - u) times what rounding 1 - u has changed u by
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * uniform / (1.0 - rest))
    return weight / exponential


@triton.jit
def _penalized(x, row, column, inside, state_ptr, state_row_ptr, penalty_ptr, vocab):
    """Repetition, presence and frequency penalties [3] of the row, where its request has a state."""
    state_row = tl.load(state_row_ptr + row)
    if state_row >= 0:
        state = tl.load(state_ptr + state_row.to(tl.int64) * vocab + column, mask=inside, other=0)
        repetition = tl.load(penalty_ptr + row * 3)
        x = tl.where(state > 0, tl.where(x > 0, x / repetition, x * repetition), x)
        count = (state >> 1).to(tl.float32)
        lessened = x - (
            tl.load(penalty_ptr + row * 3 + 1) + tl.load(penalty_ptr + row * 3 + 2) * count
        )
        x = tl.where(count > 0, lessened, x)
    return x


@triton.jit
def _number(x):
    """NaN as -inf: an argmax over NaN could name a lane behind the last."""
    return tl.where(x > float("-inf"), x, float("-inf"))


@triton.jit
def scan_kernel(
    logits_ptr,  # [B, VOCAB]
    x_ptr,  # float32 [B, VOCAB], written: logits after penalties and temperature
    part_max_ptr,
    part_sum_ptr,
    part_best_ptr,  # float32 [B, pieces]: largest x, sum of exp(x - largest), best race
    part_id_ptr,  # int32 [B, pieces]: who won it
    filter_ptr,  # float32 [B, 4]: temperature, top_k, top_p, min_p
    key_ptr,  # int32 [B, 2]
    penalty_ptr,  # float32 [B, 3]
    state_row_ptr,  # int32 [B]
    state_ptr,  # int32 [state rows, VOCAB]: 2 * (times among output tokens) + (is in the prompt)
    logits_stride,
    vocab,
    SAMPLED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One piece of one row. Greedy rows race with x itself; without SAMPLED all rows are greedy and x is not kept."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column = piece * PIECE + tl.arange(0, PIECE)
    inside = column < vocab
    x = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=float("-inf")).to(
        tl.float32
    )
    temperature = 0.0
    if SAMPLED:
        if state_ptr is not None:
            x = _penalized(x, row, column, inside, state_ptr, state_row_ptr, penalty_ptr, vocab)
        temperature = tl.load(filter_ptr + row * 4)
        x = x / tl.where(temperature > 0, temperature, 1.0)
        tl.store(x_ptr + row * vocab + column, x, mask=inside)
    largest = tl.max(x, axis=0)
    weight = tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))
    race = x
    if SAMPLED:  # noqa: SIM102  (decided when compiling; what follows on the device)
        if temperature > 0:
            key_0 = tl.load(key_ptr + row * 2).to(tl.uint32, bitcast=True)
            key_1 = tl.load(key_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
            race = tl.where(inside, _race(weight, column, key_0, key_1), -1.0)
    best, winner = tl.max(_number(race), axis=0, return_indices=True)
    part = row * tl.num_programs(1) + piece
    tl.store(part_max_ptr + part, largest)
    tl.store(part_sum_ptr + part, tl.sum(weight, axis=0))  # NaN if one x is
    tl.store(part_best_ptr + part, best)
    tl.store(part_id_ptr + part, piece * PIECE + winner)


@triton.jit
def _order(x):
    """float32 to uint32 that are ordered alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _mass_of_top_k(x_ptr, part_max_ptr, top_k, largest, vocab, pieces, PIECE: tl.constexpr):
    """Sum of exp(x - largest) over the k largest x of a row: the k-th is found digit by digit, from the highest."""
    low = tl.full((), 0, tl.uint32)  # of the k-th largest, the digits found so far
    fixed = tl.full((), 0, tl.uint32)  # which bits those are
    wanted = top_k
    for digit in range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros((256,), tl.int32)
        for piece in range(pieces):
            if _order(tl.load(part_max_ptr + piece)) >= low:
                column = piece * PIECE + tl.arange(0, PIECE)
                inside = column < vocab
                key = _order(tl.load(x_ptr + column, mask=inside, other=float("-inf")))
                alike = inside & ((key & fixed) == low)
                counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=alike)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        found = tl.sum(
            (above >= wanted).to(tl.int32), axis=0
        )  # above falls: how many bins lie below the k-th's
        wanted -= tl.sum(tl.where(tl.arange(0, 256) == found, above, 0), axis=0)
        low = low | (found.to(tl.uint32) << shift)
        fixed = (fixed >> 8) | 0xFF000000
    mass = tl.zeros((PIECE,), tl.float32)
    kth = tl.full((PIECE,), 0, tl.float32)
    for piece in range(pieces):
        if _order(tl.load(part_max_ptr + piece)) >= low:
            column = piece * PIECE + tl.arange(0, PIECE)
            x = tl.load(x_ptr + column, mask=column < vocab, other=float("-inf"))
            weight = tl.exp(x - largest)
            mass += tl.where(_order(x) > low, weight, 0.0)
            kth = tl.maximum(kth, tl.where(_order(x) == low, weight, 0.0))
    return tl.sum(mass, axis=0) + tl.max(kth, axis=0) * wanted.to(tl.float32)


@triton.jit
def _before(
    x_ptr, part_max_ptr, candidate, key_0, key_1, min_p, largest, vocab, pieces, PIECE: tl.constexpr
):
    """Of the tokens more probable than the candidate (of equals, those with lower ids): their number, their mass, and
    who among them wins the race."""
    pivot = tl.load(x_ptr + candidate)
    count = tl.zeros((PIECE,), tl.int32)
    mass = tl.zeros((PIECE,), tl.float32)
    best = tl.full((PIECE,), -1.0, tl.float32)
    best_id = tl.zeros((PIECE,), tl.int32)
    for piece in range(pieces):
        if tl.load(part_max_ptr + piece) >= pivot:
            column = piece * PIECE + tl.arange(0, PIECE)
            x = tl.load(x_ptr + column, mask=column < vocab, other=float("-inf"))
            before = ((x > pivot) | ((x == pivot) & (column < candidate))) & (column < vocab)
            weight = tl.exp(x - largest)
            count += before.to(tl.int32)
            mass += tl.where(before, weight, 0.0)
            race = tl.where(before & (weight >= min_p), _race(weight, column, key_0, key_1), -1.0)
            best_id = tl.where(race > best, column, best_id)
            best = tl.maximum(race, best)
    _, lane = tl.max(best, axis=0, return_indices=True)
    winner = tl.sum(tl.where(tl.arange(0, PIECE) == lane, best_id, 0), axis=0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.exp(pivot - largest), winner


@triton.jit
def _filtered(
    candidate,
    row,
    x_ptr,
    part_max_ptr,
    filter_ptr,
    key_ptr,
    largest,
    total,
    vocab,
    pieces,
    PIECE: tl.constexpr,
):
    """The winner among the tokens that top_k, top_p and min_p keep; the candidate won among all.

    A token is kept if fewer than top_k, of less than top_p of the mass, come before it. If it is not, neither is any
    that comes after it: the winner is among those before, and the same pass has found it.
    """
    top_k = tl.load(filter_ptr + row * 4 + 1)
    top_p = tl.load(filter_ptr + row * 4 + 2)
    min_p = tl.load(filter_ptr + row * 4 + 3)
    key_0 = tl.load(key_ptr + row * 2).to(tl.uint32, bitcast=True)
    key_1 = tl.load(key_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
    limit = tl.where(top_k > 0, tl.minimum(top_k, vocab.to(tl.float32)), vocab.to(tl.float32)).to(
        tl.int32
    )
    wanted = tl.where(top_p < 1.0, top_p * total, float("inf"))
    pending = ((limit < vocab) | (top_p < 1.0) | (min_p > 0.0)).to(tl.int32)
    if (top_p < 1.0) & (limit < vocab):
        wanted = top_p * _mass_of_top_k(x_ptr, part_max_ptr, limit, largest, vocab, pieces, PIECE)
    while pending > 0:
        count, mass, weight, winner = _before(
            x_ptr, part_max_ptr, candidate, key_0, key_1, min_p, largest, vocab, pieces, PIECE
        )
        kept = (count == 0) | ((count < limit) & (mass < wanted) & (weight >= min_p))
        candidate = tl.where(kept, candidate, winner)
        pending = tl.where(kept, 0, 1)
    return candidate


@triton.jit
def choose_kernel(
    x_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_best_ptr,
    part_id_ptr,  # of the scan
    filter_ptr,
    key_ptr,
    state_row_ptr,
    state_ptr,
    token_ptr,  # int64 [B], written; -1: the row holds NaN, +inf or nothing but -inf
    vocab,
    pieces,
    SAMPLED: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = row * pieces + part
    inside = part < pieces
    part_max = tl.load(part_max_ptr + at, mask=inside, other=float("-inf"))
    largest = tl.max(part_max, axis=0)
    share = tl.exp(part_max - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(tl.load(part_sum_ptr + at, mask=inside, other=0.0) * share, axis=0)
    race = tl.load(part_best_ptr + at, mask=inside, other=float("-inf"))
    temperature = 0.0
    if SAMPLED:
        temperature = tl.load(filter_ptr + row * 4)
        race = tl.where(temperature > 0, race * share, race)
    _, best = tl.max(_number(tl.where(inside, race, float("-inf"))), axis=0, return_indices=True)
    token = tl.load(part_id_ptr + row * pieces + best)
    sound = (total > 0) & (total < float("inf"))  # neither is NaN
    if SAMPLED:
        if sound & (temperature > 0):
            token = _filtered(
                token,
                row,
                x_ptr + row * vocab,
                part_max_ptr + row * pieces,
                filter_ptr,
                key_ptr,
                largest,
                total,
                vocab,
                pieces,
                PIECE,
            )
        if state_ptr is not None:
            state_row = tl.load(state_row_ptr + row)
            if sound & (state_row >= 0):
                seen = state_ptr + state_row.to(tl.int64) * vocab + token
                tl.store(seen, tl.load(seen) + 2)
    tl.store(token_ptr + row, tl.where(sound, token.to(tl.int64), -1))


@triton.jit
def record_kernel(state_ptr, token_ptr, count, OUTPUT: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens int64 [count] of a prompt, or of an output, into one state row."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    token = tl.load(token_ptr + index, mask=inside, other=0)
    if OUTPUT:
        tl.atomic_add(state_ptr + token, 2, mask=inside)
    else:
        tl.atomic_or(state_ptr + token, 1, mask=inside)


@triton.jit
def bias_kernel(
    logits_ptr, row_ptr, token_ptr, bias_ptr, count, logits_stride, BLOCK: tl.constexpr
):
    """logits[row, token] += bias for `count` distinct pairs."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row = tl.load(row_ptr + index, mask=inside, other=0)
    at = row * logits_stride + tl.load(token_ptr + index, mask=inside, other=0)
    logit = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logit += tl.load(bias_ptr + index, mask=inside, other=0.0)
    tl.store(logits_ptr + at, logit.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bitmask_kernel(
    logits_ptr, row_ptr, bitmask_ptr, vocab, logits_stride, words, BLOCK: tl.constexpr
):
    """logits[row, token] = -inf where the token's bit is 0, for one block of one row of the bitmask."""
    line = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    word = tl.load(bitmask_ptr + line * words + token // 32, mask=inside, other=-1)
    forbidden = inside & (((word >> (token % 32)) & 1) == 0)
    at = tl.load(row_ptr + line) * logits_stride + token
    tl.store(logits_ptr + at, float("-inf"), mask=forbidden)
