"""`make bench-gpu`, attention: decode and prefill of Llama-3-8B's heads over a paged cache, beside torch's attention
over a contiguous one, and FlashInfer's where it is installed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from gpu_cells import Cell, Lab, Row
from gpu_report import FLASHINFER, FLEX, SDPA
from torch import Tensor

from nibble.kernels.attention.cache import PagedCache, allocate_scales
from nibble.kernels.attention.paged import AttentionSpec, PagedBatch, paged_attention

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
SCALE = DIM**-0.5
CONTEXTS, BATCHES, PROMPTS = (
    (1024, 4096, 16384, 32768),
    (1, 8, 32, 64),
    (512, 1024, 2048, 4096, 8192),
)
QUICK_CONTEXTS, QUICK_BATCHES, QUICK_PROMPTS = (4096, 32768), (1, 32), (2048, 8192)
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
Sequences = tuple[int, int, int]  # how many, their context, how many of its tokens are new


def plan(quick: bool) -> list[Cell]:
    """A cell for each cache that is filled; torch's attention first, which the others are compared with."""
    contexts, batches, prompts = (
        (QUICK_CONTEXTS, QUICK_BATCHES, QUICK_PROMPTS) if quick else (CONTEXTS, BATCHES, PROMPTS)
    )
    kinds = [SDPA, *CACHES, *([] if quick else [FLASHINFER])]
    prefill = [SDPA, "bf16", "fp8", *([] if quick else [FLEX, FLASHINFER])]
    return [
        *(
            _cell("decode", batch, context, kind)
            for context in contexts
            for batch in batches
            for kind in kinds
        ),
        *(_cell("prefill", 1, length, kind) for length in prompts for kind in prefill),
    ]


def _cell(phase: str, batch: int, context: int, kind: str) -> Cell:
    return Cell(
        "attention",
        f"{phase} {batch} x {context} {kind}",
        {"phase": phase, "batch": batch, "context": context, "kind": kind},
    )


def measure(cell: Cell, lab: Lab) -> Iterator[Row]:
    """One row: layers of caches are taken in turn."""
    given = cell.arguments
    batch, context, kind = given["batch"], given["context"], given["kind"]
    queries = 1 if given["phase"] == "decode" else context
    width = CACHES[kind].itemsize if kind in CACHES else 2
    scales = 4 if width == 1 else 0
    cached = 2 * batch * context * KV_HEADS * (DIM * width + scales)
    make = {SDPA: _sdpa, FLEX: _flex, FLASHINFER: _flashinfer}.get(kind) or _paged(CACHES[kind])
    sequences = (batch, context, queries)
    calls = [make(sequences, lab.device) for _ in range(lab.copies(cached))]
    operations = (
        4 * batch * queries * HEADS * DIM * (context if queries == 1 else (context + 1) / 2)
    )
    yield Row(
        {**given, "bytes": cached + 4 * batch * queries * HEADS * DIM, "operations": operations},
        calls,
    )


def _queries(sequences: Sequences, device: torch.device) -> Tensor:
    batch, _, new = sequences
    return torch.randn(batch * new, HEADS, DIM, device=device, dtype=torch.bfloat16)


def _paged(dtype: torch.dtype) -> Callable[[Sequences, torch.device], Callable[[], Tensor]]:
    """Nibble's kernels, blocks in random order; quantized caches with a scale for each token and head."""

    def make(sequences: Sequences, device: torch.device) -> Callable[[], Tensor]:
        batch, context, new = sequences
        blocks = batch * (context // BLOCK)
        pages = [_codes((KV_HEADS, blocks, BLOCK, DIM), dtype, device) for _ in "kv"]
        scales = [
            allocate_scales(blocks, BLOCK, KV_HEADS, device).fill_(0.01)
            if dtype.itemsize == 1
            else None
            for _ in "kv"
        ]
        tables = torch.randperm(blocks, device=device).view(batch, -1).int()
        starts = torch.arange(0, batch * new + 1, new, device=device).int()
        lengths = torch.full((batch,), context, device=device).int()
        step = PagedBatch(tables, starts, lengths, batch if new == 1 else 0, max_context=context)
        paged, q, spec = (
            PagedCache(*pages, *scales),
            _queries(sequences, device),
            AttentionSpec(SCALE),
        )
        return lambda: paged_attention(q, paged, step, spec)

    return make


def _codes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values of any dtype, filled in place: a cache may be larger than half of what is free."""
    if dtype == torch.bfloat16:
        return torch.empty(shape, dtype=dtype, device=device).normal_()
    bits = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 0x7F)  # no NaN of e4m3
    return bits.view(dtype)


def _contiguous(sequences: Sequences, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    batch, context, new = sequences
    q = _queries(sequences, device).view(batch, new, HEADS, DIM).transpose(1, 2)
    k, v = (_codes((batch, KV_HEADS, context, DIM), torch.bfloat16, device) for _ in "kv")
    return q, k, v


def _sdpa(sequences: Sequences, device: torch.device) -> Callable[[], Tensor]:
    q, k, v = _contiguous(sequences, device)
    return lambda: F.scaled_dot_product_attention(
        q, k, v, is_causal=sequences[2] > 1, enable_gqa=True
    )


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(sequences: Sequences, device: torch.device) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = _contiguous(sequences, device)
    new, context = q.shape[2], k.shape[2]
    mask = create_block_mask(
        lambda b, h, i, j: i + context - new >= j, None, None, new, context, device=str(device)
    )
    return lambda: _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


def _flashinfer(sequences: Sequences, device: torch.device) -> Callable[[], Tensor]:
    if importlib.util.find_spec("flashinfer") is None:
        raise ModuleNotFoundError("FlashInfer is not installed")
    import flashinfer

    batch, context, new = sequences
    per_sequence = context // BLOCK
    pages = _codes((batch * per_sequence, 2, BLOCK, KV_HEADS, DIM), torch.bfloat16, device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    blocks = torch.arange(0, batch + 1, device=device).int() * per_sequence
    order, last = (
        torch.randperm(len(pages), device=device).int(),
        torch.full((batch,), BLOCK, device=device).int(),
    )
    q = _queries(sequences, device)
    if new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            blocks,
            order,
            last,
            HEADS,
            KV_HEADS,
            DIM,
            BLOCK,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
    else:
        starts = torch.arange(0, batch * new + 1, new, device=device).int()
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            starts,
            blocks,
            order,
            last,
            HEADS,
            KV_HEADS,
            DIM,
            BLOCK,
            causal=True,
            q_data_type=q.dtype,
        )
    return lambda: wrapper.run(q, pages)
