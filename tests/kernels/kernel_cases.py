"""What tests of the Triton kernels share: where they run, and products and attention with their results in float64.

In the interpreter (TRITON_INTERPRET=1, the default) tests run on the CPU; with TRITON_INTERPRET=0, as `make test-gpu`
runs them, the same tests run compiled, on the GPU.
"""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nibble.kernels.attention.cache import PagedCache, allocate_scales
from nibble.kernels.attention.paged import AttentionSpec, PagedBatch, paged_attention
from nibble.kernels.awq import linear as awq
from nibble.kernels.dequant_gemm.layout import ShuffledWeight
from nibble.kernels.fp4 import linear as fp4
from nibble.kernels.fp8 import w8a16
from nibble.kernels.gguf import linear as gguf
from nibble.kernels.gptq import linear as gptq
from nibble.kernels.spec import scale_dtype
from nibble.quant.formats.fp4 import E2M1
from nibble.quant.weight import QuantizedWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "torch sees no CUDA device, and TRITON_INTERPRET=0 asks for one", allow_module_level=True
    )
interpreter_only = pytest.mark.skipif(
    not INTERPRETED, reason="pretends to be another card, in the interpreter alone"
)

BLOCK = 16
FP8 = torch.float8_e4m3fn
HALF, BF16 = torch.float16, torch.bfloat16
ATTENTION_TOLERANCE = {HALF: 2e-3, BF16: 2e-2}
# Rounding of a result. The interpreter cuts float32 down to bfloat16, unrounded.
ROUNDING = {HALF: 2**-11, BF16: 2**-7 if INTERPRETED else 2**-8}


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that a test makes lie where its kernels run. Tests import this."""
    parameters = getattr(request.node, "callspec", None)
    needs_bf16 = parameters is not None and BF16 in parameters.params.values()
    if needs_bf16 and not INTERPRETED and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bfloat16 needs compute capability 8.0")
    with DEVICE:
        yield


def make_weight(
    bits: int, zero: str, out: int, inner: int, group: int, scale_dtype: torch.dtype = HALF
):
    """Random integer codes. zero: "mid", "zeros" or "mins"; scales of both signs."""
    generator = torch.Generator("cpu").manual_seed(bits * 1000 + out + inner + group)
    shape = (out, -(-inner // group))
    how = {"generator": generator, "device": "cpu"}
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (out, inner), dtype=torch.uint8, **how),
        scales=((torch.rand(shape, **how) - 0.3) / 2**bits).to(scale_dtype),
        zeros=torch.randint(0, 2**bits, shape, dtype=torch.uint8, **how)
        if zero == "zeros"
        else None,
        mins=torch.randn(shape, **how) if zero == "mins" else None,
        bits=bits,
        block=(1, group),
    ).to(DEVICE)


def make_fp8_weight(
    out: int, inner: int, block: tuple[int, int], act_quant: str = "none"
) -> QuantizedWeight:
    """Every e4m3 code but NaN, subnormals too."""
    how = {"generator": torch.Generator("cpu").manual_seed(out), "device": "cpu"}
    codes = torch.randint(0, 256, (out, inner), dtype=torch.uint8, **how)
    codes[codes & 0x7F == 0x7F] = 0x7E
    scales = torch.rand(-(-out // block[0]), -(-inner // block[1]), **how) / 100
    return QuantizedWeight(
        codes.view(FP8), scales, kind="fp8", bits=8, block=block, act_quant=act_quant
    ).to(DEVICE)


def make_fp4_weight(out: int, inner: int, group: int) -> QuantizedWeight:
    """Random E2M1 codes; groups of 32 have powers of two as scales, as MXFP4, others any."""
    how = {"generator": torch.Generator("cpu").manual_seed(out + group), "device": "cpu"}
    codes = torch.randint(0, 16, (out, inner), dtype=torch.uint8, **how)
    scales = torch.rand(out, -(-inner // group), **how) / 10 + 0.01
    if group == 32:
        scales = scales.log2().ceil().exp2()
    return QuantizedWeight(codes, scales, kind="table", table=E2M1, block=(1, group)).to(DEVICE)


def repack(weight: QuantizedWeight) -> ShuffledWeight:
    """As the room does that kernels/select.py chooses for such a weight."""
    if weight.kind == "fp8":
        return w8a16.repack(weight)
    if weight.kind == "table":
        return fp4.repack(weight)
    if weight.mins is not None or scale_dtype(weight.scales) == torch.float32:
        return gguf.repack(weight)
    in_order = weight.zeros is not None and weight.bits == 4 and weight.perm is None
    return awq.repack(weight) if in_order else gptq.repack(weight)


def activations(rows: int, inner: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rows)
    return torch.randn(rows, inner, generator=generator, device="cpu").to(DEVICE, dtype)


def check_product(
    y: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    accumulation: float | None = None,
) -> None:
    """y is x W^T (+ bias), but for rounding it once, and float32 sums: an error of `accumulation` times the sum of
    magnitudes, by default what adding one by one may cost."""
    dense = weight.dequantize(torch.float32).double()
    want = x.double() @ dense.T + (0 if bias is None else bias.double())
    accumulation = x.shape[1] * 2**-24 if accumulation is None else accumulation
    bound = x.double().abs() @ dense.abs().T * accumulation + want.abs() * ROUNDING[x.dtype] + 1e-6
    assert y.dtype == x.dtype and y.shape == want.shape
    assert ((y.double() - want).abs() <= bound).all(), (y.double() - want).abs().max()


class AttentionCase:
    """Sequences of (context, queries), their keys and values in a paged cache whose every other place is poisoned."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype=HALF,
        kind="same",
        decodes: int = 0,
        **batch: int,
    ):
        torch.manual_seed(heads * 1000 + dim + len(lengths))
        self.lengths, self.heads, self.kv_heads, self.dim = lengths, heads, kv_heads, dim
        counts = [-(-context // BLOCK) for context, _ in lengths]
        self.tables = torch.full((len(lengths), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
        free = torch.randperm(sum(counts) + 3).tolist()
        for s, count in enumerate(counts):
            self.tables[s, :count] = torch.tensor(
                [free.pop() for _ in range(count)], dtype=torch.int32
            )
        self.exact = [self._write_random(sum(counts) + 3, dtype, kind) for _ in "kv"]
        (keys, key_scales, self.k), (values, value_scales, self.v) = self.exact
        # The engine's layout: both in one tensor.
        both = torch.stack([keys.view(torch.uint8), values.view(torch.uint8)]).view(keys.dtype)
        self.cache = PagedCache(both[0], both[1], key_scales, value_scales)
        starts = torch.tensor([0] + [queries for _, queries in lengths]).cumsum(0).int()
        self.batch = PagedBatch(
            self.tables, starts, torch.tensor([c for c, _ in lengths]).int(), decodes, **batch
        )
        self.q = torch.randn(int(starts[-1]), heads, dim).to(dtype)

    def _write_random(self, num_blocks: int, dtype: torch.dtype, kind: str):
        """(codes, scales or None, the values of each sequence as float64 [kv_heads, context, dim])."""
        shape = (self.kv_heads, num_blocks, BLOCK, self.dim)
        store = {"same": dtype, "int8": torch.int8}.get(kind, FP8)
        bits = torch.int16 if kind == "same" else torch.int8
        poison = -1 if kind == "same" else 127  # NaN in float16, bfloat16 and e4m3fn
        codes = torch.full(shape, poison, dtype=bits).view(store)
        scales = {"fp8-tensor": torch.tensor([0.02])}.get(kind)
        if kind in ("int8", "fp8"):
            scales = allocate_scales(num_blocks, BLOCK, self.kv_heads, DEVICE).fill_(math.nan)
        exact = []
        for s, (context, _) in enumerate(self.lengths):
            at = torch.arange(context)
            block, offset = self.tables[s, at // BLOCK].long(), at % BLOCK
            x = (
                torch.randn(self.kv_heads, context, self.dim)
                * torch.rand(self.kv_heads, context, 1).exp2()
            )
            if kind in ("int8", "fp8"):
                x[:, 1::7] = 0
                scale = x.abs().amax(-1) / (127 if kind == "int8" else 448)
                scales[block, offset] = scale.T
                x = x / scale.clamp(min=1e-20)[..., None]
                x = x.round() if kind == "int8" else x
            elif kind == "fp8-tensor":
                scale = scales.expand(self.kv_heads, context)
                x = x / scales
            raw = (
                codes if kind == "same" else codes.view(torch.uint8)
            )  # indexing of FP8 is not everywhere
            raw[:, block, offset] = x.to(store).view(raw.dtype)
            read = raw[:, block, offset].view(store).double()
            exact.append(read if scales is None else read * scale[..., None].double())
        return codes, scales, exact

    def expected(self, spec: AttentionSpec) -> Tensor:
        out = []
        for s, (context, queries) in enumerate(self.lengths):
            q = self.q[self.batch.query_starts[s] : self.batch.query_starts[s + 1]].double()
            if not context:
                out.append(torch.zeros_like(q))
                continue
            k, v = (
                x[s].repeat_interleave(self.heads // self.kv_heads, 0) for x in (self.k, self.v)
            )
            logits = torch.einsum("qhd,hkd->hqk", q, k) * spec.scale
            if spec.soft_cap:
                logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
            behind = torch.arange(context - queries, context)[:, None] - torch.arange(context)
            seen = (behind >= 0) & (behind < (spec.window or 10**9))
            logits = logits.masked_fill(~seen, -math.inf)
            if spec.sinks is not None:
                logits = torch.cat(
                    [logits, spec.sinks.double()[:, None, None].expand(-1, queries, 1)], 2
                )
            weights = torch.softmax(logits, -1)[..., :context]
            out.append(torch.einsum("hqk,hkd->qhd", weights, v))
        return torch.cat(out)

    def check(self, **spec) -> None:
        spec = AttentionSpec(self.dim**-0.5, **spec)
        if spec.window is not None:  # blocks that no query sees are released
            for s, (context, queries) in enumerate(self.lengths):
                self.tables[s, : max(0, context - queries - spec.window + 1) // BLOCK] = 2**31 - 1
        out = paged_attention(self.q, self.cache, self.batch, spec)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype
        torch.testing.assert_close(
            out.double(),
            self.expected(spec),
            atol=ATTENTION_TOLERANCE[self.q.dtype],
            rtol=4 * ATTENTION_TOLERANCE[self.q.dtype],
        )
