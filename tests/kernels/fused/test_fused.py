"""The small Triton kernels in the interpreter against float64 and against the engine's own torch code.

The interpreter's bfloat16 arithmetic is wrong and its conversions truncate; the kernels compute in float32, so float16
and float32 are compared tightly here, and bfloat16 to a unit in the last place.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, on_device  # noqa: F401  (a fixture)
from torch import Tensor

from nibble.architectures.base import Rope
from nibble.engine.backends.torch.layers import RMSNorm, RopeTable, apply_rope
from nibble.kernels.attention.cache import PagedCache
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.fused.activation import gated
from nibble.kernels.fused.norm import rms_norm
from nibble.kernels.fused.rope import rope_and_cache

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(
        DEVICE, dtype
    )


def _near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 4
    )


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def _codes_are_nearest(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Each code stands for the number of its grid nearest to the value, and the largest value uses the largest code."""
    values, scales = values.double(), scales.double()
    largest = values.abs().amax(-1, keepdim=True)
    if codes.dtype == torch.int8:
        torch.testing.assert_close(scales * 127, largest, rtol=1e-5, atol=1e-12)
        bound = scales * 0.5
    else:
        torch.testing.assert_close(scales * 448, largest, rtol=1e-5, atol=1e-12)
        bound = (values.abs() / 16).clamp(
            min=scales * 2.0**-10
        )  # 3 bits of mantissa; subnormals in steps of 2**-9
    assert bool(((codes.double() * scales - values).abs() <= bound * (1 + 1e-4) + 1e-30).all())


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (1, 576, torch.float16),
        (3, 640, torch.bfloat16),
        (2, 48, torch.float32),
        (17, 64, torch.float16),
    ],
)
def test_norm_of_the_sum(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = _randn(rows, width, dtype=dtype), _randn(rows, width, dtype=dtype, seed=1)
    weight = _randn(width, seed=2)
    summed = (residual.double() + x.double()).to(dtype)
    out = rms_norm(x, weight.to(dtype), 1e-5, residual)
    assert out.dtype == dtype
    _near(residual, summed, dtype)
    _near(out, _rms(residual, weight.to(dtype), 1e-5), dtype)


def test_norm_alone_equals_the_engines() -> None:
    x, weight = _randn(5, 576, dtype=torch.float16), _randn(576, dtype=torch.float16, seed=1)
    _near(rms_norm(x, weight, 1e-6), RMSNorm(weight, 1e-6)(x), torch.float16)
    wide = _randn(5, 700, dtype=torch.float16)[:, :576]  # rows of a wider tensor
    _near(rms_norm(wide, weight, 1e-6), _rms(wide, weight, 1e-6), torch.float16)


def test_gemma_norms_before_and_after_the_addition() -> None:
    x, residual = _randn(3, 640, dtype=torch.float16), _randn(3, 640, dtype=torch.float16, seed=1)
    post, weight = _randn(640, seed=2), _randn(640, seed=3)
    summed = residual.double() + _rms(x, 1 + post, 1e-6)
    out = rms_norm(x, weight, 1e-6, residual, offset=1.0, post_weight=post)
    _near(residual, summed, torch.float16)
    _near(out, _rms(residual, 1 + weight, 1e-6), torch.float16)


@pytest.mark.parametrize("post", [False, True])
def test_what_is_added_is_scaled_after_its_own_norm(post: bool) -> None:
    x, residual = _randn(3, 70, dtype=torch.float16), _randn(3, 70, dtype=torch.float16, seed=1)
    after, weight = _randn(70, seed=2), _randn(70, seed=3)
    summed = residual.double() + 0.3 * (_rms(x, after, 0.5) if post else x.double())
    out = rms_norm(
        x,
        weight,
        1e-6,
        residual,
        post_weight=after if post else None,
        post_eps=0.5,
        scale=0.3,
    )
    _near(residual, summed, torch.float16)
    _near(out, _rms(residual, weight, 1e-6), torch.float16)


def _cached(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, scales) of rows that are written to the cache as they are, as v heads of one token each."""
    tokens, dim = values.shape
    cache = PagedCache(
        *torch.zeros(2, 1, tokens, 1, dim, dtype=torch.uint8).view(dtype),
        *torch.zeros(2, tokens, 1, 1),
    )
    qkv = torch.zeros(tokens, 3, dim)
    qkv[:, 2] = values
    table, slots = torch.ones(1, dim // 2), torch.arange(tokens)
    rope_and_cache(qkv, 1, table, table, torch.zeros_like(slots), slots, cache)
    return cache.values[0, :, 0], cache.value_scales[:, 0]


def test_fp8_codes_are_torchs() -> None:
    """With a scale of 1 (the largest value is 448) rounding is that of torch's conversion, subnormals and ties too."""
    values = [448.0, -448, 0, 1, 17, 19, 2**-6, 2**-7, 2**-9, 2**-10, 3 * 2**-10, 2**-11]
    x = torch.tensor([[*values, 0.0146, -0.3, 239, 433]])
    codes, scales = _cached(x, torch.float8_e4m3fn)
    assert scales.tolist() == [[1.0]]
    assert codes.view(torch.uint8).tolist() == x.to(torch.float8_e4m3fn).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_is_not_a_number_is_not_hidden(dtype: torch.dtype) -> None:
    x = _randn(3, 64)
    x[0, 3] = float("nan")
    x[2] = 0
    codes, scales = _cached(x, dtype)
    assert scales[:, 0].isnan().tolist() == [True, False, False]
    assert not codes.float().isnan().any()
    assert not codes[2].float().any() and 0 < float(scales[2, 0]) < 1e-20


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 1536, torch.float16), (3, 100, torch.bfloat16), (2, 33, torch.float32)],
)
def test_gated_activation(activation: str, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (_randn(rows, 2 * width) * 3).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    _near(gated(gate_up, activation), expected, dtype)


def _pages(dtype: torch.dtype, heads: int, dim: int, scales: str) -> PagedCache:
    """Three blocks of four tokens in the engine's layout: keys and values are halves of one tensor."""
    cache = torch.zeros(2, heads, 3, 4, dim).to(dtype)
    if scales == "none":
        return PagedCache(cache[0], cache[1])
    if scales == "tensor":
        return PagedCache(cache[0], cache[1], torch.tensor([0.013]), torch.tensor([0.02]))
    by_head = torch.zeros(2, heads, 3, 4).permute(0, 2, 3, 1)
    return PagedCache(cache[0], cache[1], by_head[0], by_head[1])


def _read(pages: Tensor, slot: int) -> Tensor:
    return pages[:, slot // 4, slot % 4]


def _rotated(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    table: RopeTable,
    positions: Tensor,
    rotary: int,
    norms: tuple[Tensor, Tensor] | None,
    v_norm: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """What the engine does, in float64."""
    q, k, v = qkv.double().split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = _rms(q, norms[0], 1e-6), _rms(k, norms[1], 1e-6)
    if v_norm:
        v = _rms(v, torch.ones(qkv.shape[2]), 1e-6)
    qkv = torch.cat((q, k, v), 1)
    cos, sin = table.at(positions)
    apply_rope(qkv[:, : heads + kv_heads, :rotary], cos.double(), sin.double(), interleaved)
    return qkv


LLAMA3 = (
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 16.0),
)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "norm"),
    [(9, 3, 64, 64, False), (4, 1, 256, 256, True), (3, 2, 96, 48, False), (2, 2, 80, 20, True)],
)
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float16, "none"),
        (torch.float8_e4m3fn, "tensor"),
        (torch.float8_e4m3fn, "head"),
        (torch.int8, "head"),
    ],
)
def test_rope_and_cache(
    heads: int, kv_heads: int, dim: int, rotary: int, norm: bool, dtype: torch.dtype, scales: str
) -> None:
    qkv = _randn(4, heads + 2 * kv_heads, dim, dtype=torch.float16)
    norms = (_randn(dim, seed=5) / 4 + 1, _randn(dim, seed=6) / 4 + 1) if norm else None
    rope = Rope(10000.0, "llama3", LLAMA3)
    table = RopeTable.build(rotary, rope, 64, torch.float32, DEVICE)
    positions, slots = torch.tensor([0, 63, 7, 8]), torch.tensor([5, 11, -1, 0])
    expected = _rotated(qkv, heads, kv_heads, table, positions, rotary, norms)
    before, pages = qkv.clone(), _pages(dtype, kv_heads, dim, scales)
    rope_and_cache(
        qkv,
        heads,
        table.cos,
        table.sin,
        positions,
        slots,
        pages,
        offset=1.0 if norm else 0.0,
        q_weight=norms[0] - 1 if norms else None,
        k_weight=norms[1] - 1 if norms else None,
    )
    _near(qkv[:, :heads], expected[:, :heads], torch.float16)
    assert torch.equal(qkv[:, heads:], before[:, heads:])
    written = [(t, s) for t, s in enumerate(slots.tolist()) if s >= 0]
    assert int((pages.values.float().abs().sum((0, 3)) > 0).sum()) == len(written), (
        "a padding token was cached"
    )
    for token, slot in written:
        for part, cache, scale in (
            (0, pages.keys, pages.key_scales),
            (1, pages.values, pages.value_scales),
        ):
            want = expected[token, heads + part * kv_heads :][:kv_heads]
            if scale is None:
                _near(_read(cache, slot), want, torch.float16)
            elif scales == "head":
                _codes_are_nearest(_read(cache, slot), scale[slot // 4, slot % 4, :, None], want)
            else:
                bound = (want.abs() / 16).clamp(min=float(scale) * 2.0**-10) * (1 + 1e-4)
                assert bool(
                    ((_read(cache, slot).double() * float(scale) - want).abs() <= bound).all()
                )


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (48, 20)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("v_norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_neighbours_turn_and_values_are_normed(
    dim: int, rotary: int, norm: bool, v_norm: bool, interleaved: bool
) -> None:
    heads, kv_heads = 3, 2
    qkv = _randn(2, heads + 2 * kv_heads, dim, dtype=torch.float16)
    norms = (_randn(dim, seed=5), _randn(dim, seed=6)) if norm else None
    table = RopeTable.build(rotary, Rope(100.0), 64, torch.float32, DEVICE)
    positions, slots = torch.tensor([3, 40]), torch.tensor([1, 6])
    want = _rotated(qkv, heads, kv_heads, table, positions, rotary, norms, v_norm, interleaved)
    pages = _pages(torch.float16, kv_heads, dim, "none")
    rope_and_cache(
        qkv,
        heads,
        table.cos,
        table.sin,
        positions,
        slots,
        pages,
        q_weight=norms[0] if norms else None,
        k_weight=norms[1] if norms else None,
        v_norm=v_norm,
        interleaved=interleaved,
    )
    _near(qkv[:, :heads], want[:, :heads], torch.float16)
    for token, slot in enumerate(slots.tolist()):
        _near(_read(pages.keys, slot), want[token, heads : heads + kv_heads], torch.float16)
        _near(_read(pages.values, slot), want[token, heads + kv_heads :], torch.float16)


def test_queries_alone_turn_and_nothing_is_cached() -> None:
    """Of a layer that reads what another has cached."""
    q, weight = _randn(2, 5, 32, dtype=torch.float16), _randn(32, seed=5)
    table = RopeTable.build(32, Rope(100.0), 64, torch.float32, DEVICE)
    positions, slots = torch.tensor([3, 40]), torch.tensor([1, 6])
    want = _rms(q, weight, 1e-6)
    apply_rope(want, *(each.double() for each in table.at(positions)))
    pages = _pages(torch.float16, 2, 32, "none")
    rope_and_cache(q, 5, table.cos, table.sin, positions, slots, pages, q_weight=weight)
    _near(q, want, torch.float16)
    assert not pages.keys.any() and not pages.values.any()


def test_wrong_arguments_are_named() -> None:
    x = _randn(2, 64)
    with pytest.raises(
        KernelArgumentError, match=r"rms_norm: weight has shape \[63\], want \[64\]"
    ):
        rms_norm(x, torch.ones(63), 1e-6)
    with pytest.raises(KernelArgumentError, match="residual is torch.float64"):
        rms_norm(x, torch.ones(64), 1e-6, x.double())
    with pytest.raises(KernelArgumentError, match="scale is given without a residual"):
        rms_norm(x, torch.ones(64), 1e-6, scale=0.5)
    with pytest.raises(KernelArgumentError, match="activation is 'relu'"):
        gated(x, "relu")
    with pytest.raises(KernelArgumentError, match="last axis of gate_up is not contiguous"):
        gated(x.T, "silu")
    qkv, table, ones = _randn(1, 4, 16), torch.ones(4, 8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(KernelArgumentError, match=r"want \[1, any, any, 16\]"):
        rope_and_cache(qkv, 2, table, table, ones, ones, _pages(torch.float16, 2, 16, "none"))


def test_nothing_to_do() -> None:
    assert rms_norm(torch.empty(0, 64), torch.ones(64), 1e-6).shape == (0, 64)
    assert gated(torch.empty(0, 64), "silu").shape == (0, 32)
