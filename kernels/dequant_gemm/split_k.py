"""A product may be split along K: each split writes float32 partial sums to a workspace, and the one that arrives last
adds them up in order. There are no atomic additions of values, so a result does not depend on timing.
"""

import triton
import triton.language as tl


@triton.jit
def finish(
    acc,
    y,
    bias,
    partials,
    locks,
    m,
    n,
    M,
    N,
    tile,
    split,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Write acc [BM, BN]; of a split product, whoever comes last adds up all parts in order and writes that."""
    inside = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    last = True
    if SPLIT_K > 1:
        tl.store(partials + split * M * N + at, acc, mask=inside)
        tl.debug_barrier()  # every thread's part is written before one of them announces it
        last = tl.atomic_add(locks + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if SPLIT_K > 1:
            acc = tl.zeros_like(acc)
            for part in range(SPLIT_K):
                acc += tl.load(
                    partials + part * M * N + at, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(locks + tile, 0)
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)
