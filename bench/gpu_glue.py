"""`make bench-gpu`, glue: the small fused kernels of a Llama-3-8B layer and the choice of tokens, beside torch's
operators for the same.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_cells import Cell, Lab, Row
from gpu_report import PLAIN
from torch import Tensor

from nibble.engine.backends.torch.layers import apply_rope
from nibble.kernels.attention.cache import PagedCache, allocate_scales
from nibble.kernels.fused.activation import gated
from nibble.kernels.fused.norm import rms_norm
from nibble.kernels.fused.rope import rope_and_cache
from nibble.kernels.sampling.sample import SamplingRows, greedy, sample

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB, BLOCK, POSITIONS = (
    4096,
    14336,
    32,
    8,
    128,
    128256,
    16,
    8192,
)
ROWS, QUICK_ROWS = (1, 8, 32, 64, 256, 2048), (1, 256)
SAMPLED_ROWS = 256  # no step draws for more
Calls = dict[str, Callable[[], object]]  # by kind: what a row of the result is called


def plan(quick: bool) -> list[Cell]:
    """A cell for each operation and number of rows."""
    return [
        Cell("glue", f"{operation} {rows}", {"operation": operation, "m": rows})
        for operation in OPERATIONS
        for rows in (QUICK_ROWS if quick else ROWS)
        if rows <= SAMPLED_ROWS or operation not in (GREEDY, DRAW)
    ]


def measure(cell: Cell, lab: Lab) -> Iterator[Row]:
    """A row for each way to compute it. Operands fit the L2 cache, as they do in a layer: they are not rotated."""
    operation, rows = cell.arguments["operation"], cell.arguments["m"]
    calls, nbytes = OPERATIONS[operation](rows, lab.device)
    for kind, call in calls.items():
        yield Row({**cell.arguments, "kind": kind, "bytes": nbytes}, [call])


def _randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _norm(rows: int, device: torch.device) -> tuple[Calls, int]:
    x, weight = _randn(rows, HIDDEN, device=device), _randn(HIDDEN, device=device)
    residual = torch.zeros_like(x)

    def plain() -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, (HIDDEN,), weight, 1e-5)

    ours = {"Nibble": lambda: rms_norm(x, weight, 1e-5, residual)}
    return {PLAIN: plain, **ours}, 8 * rows * HIDDEN


def _gated(rows: int, device: torch.device) -> tuple[Calls, int]:
    gate_up = _randn(rows, 2 * INNER, device=device)
    calls = {
        PLAIN: lambda: F.silu(gate_up[:, :INNER]) * gate_up[:, INNER:],
        "Nibble": lambda: gated(gate_up, "silu"),
    }
    return calls, 6 * rows * INNER


def _rope(rows: int, device: torch.device) -> tuple[Calls, int]:
    qkv = _randn(rows, HEADS + 2 * KV_HEADS, DIM, device=device)
    angles = torch.rand(POSITIONS, DIM // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, POSITIONS, (rows,), device=device)
    slots = torch.randperm(rows, device=device)
    blocks = -(-rows // BLOCK)
    caches = {"": torch.bfloat16, " fp8": torch.float8_e4m3fn, " int8": torch.int8}
    pages = {name: _pages(blocks, dtype, device) for name, dtype in caches.items()}
    plain_cos, plain_sin = (t.bfloat16()[positions].unsqueeze(1) for t in (cos, sin))
    keys, values = pages[""].keys.flatten(1, 2), pages[""].values.flatten(1, 2)

    def plain() -> None:
        apply_rope(qkv[:, : HEADS + KV_HEADS], plain_cos, plain_sin)
        keys[:, slots] = qkv[:, HEADS : HEADS + KV_HEADS].transpose(0, 1)
        values[:, slots] = qkv[:, HEADS + KV_HEADS :].transpose(0, 1)

    ours = {
        f"Nibble{name}": lambda name=name: rope_and_cache(
            qkv, HEADS, cos, sin, positions, slots, pages[name]
        )
        for name in caches
    }
    return {PLAIN: plain, **ours}, 4 * rows * (HEADS + 2 * KV_HEADS) * DIM


def _pages(blocks: int, dtype: torch.dtype, device: torch.device) -> PagedCache:
    both = torch.zeros(
        2,
        KV_HEADS,
        blocks,
        BLOCK,
        DIM,
        dtype=torch.uint8 if dtype.itemsize == 1 else dtype,
        device=device,
    ).view(dtype)
    if dtype == torch.bfloat16:
        return PagedCache(both[0], both[1])
    return PagedCache(
        both[0], both[1], *(allocate_scales(blocks, BLOCK, KV_HEADS, device) for _ in "kv")
    )


def _greedy(rows: int, device: torch.device) -> tuple[Calls, int]:
    logits = torch.randn(rows, VOCAB, device=device)
    return {PLAIN: lambda: logits.argmax(-1), "Nibble": lambda: greedy(logits)}, 4 * rows * VOCAB


def _draw(rows: int, device: torch.device) -> tuple[Calls, int]:
    """Temperature 0.8, top_k 50, top_p 0.9: torch sorts, as samplers in torch do."""
    logits = torch.randn(rows, VOCAB, device=device) * 3
    keys = torch.randint(-(2**31), 2**31 - 1, (rows, 2), device=device, dtype=torch.int32)
    how = SamplingRows(torch.tensor([[0.8, 50.0, 0.9, 0.0]], device=device).repeat(rows, 1), keys)

    def plain() -> Tensor:
        ordered, ids = (logits / 0.8).sort(-1, descending=True)
        ordered[:, 50:] = float("-inf")
        share = ordered.softmax(-1)
        share = torch.where(share.cumsum(-1) - share < 0.9, share, 0.0)
        return ids.gather(
            -1, (share / torch.empty_like(share).exponential_()).argmax(-1, keepdim=True)
        )

    return {PLAIN: plain, "Nibble": lambda: sample(logits, how)}, 8 * rows * VOCAB


GREEDY, DRAW = "greedy", "draw, top_k 50, top_p 0.9"
OPERATIONS = {
    "residual + RMSNorm": _norm,
    "rope + KV write": _rope,
    "silu(gate) * up": _gated,
    GREEDY: _greedy,
    DRAW: _draw,
}
