"""What `make kernels-report` compiles: each card's own configuration, for head sizes and cache types."""

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from ..measure.compile_cases import CompileCase
from .attend import attend_kernel, reduce_kernel
from .config import TileConfig, decode_config, padded_dim, prefill_config
from .latent_cases import latent_cases
from .paged import MIN_SPLIT

CARDS = (75, 80, 86, 89, 90, 100, 120)
COMPUTE = {"fp16": tl.float16, "bf16": tl.bfloat16}
GROUP, BLOCK_SIZE, SPLITS = 4, 16, 16
POINTERS = (
    "q",
    "out",
    "split_mass",
    "split_out",
    "keys",
    "values",
    "key_scales",
    "value_scales",
    "sinks",
)
STRIDES = (
    "q_stride_token",
    "q_stride_head",
    "out_stride_token",
    "out_stride_head",
    "kv_stride_head",
    "kv_stride_block",
    "kv_stride_offset",
)


def compile_cases() -> list[CompileCase]:
    """A case for each card: its own configuration, compiled for it alone."""
    cases = []
    for cc in CARDS:
        dtype = "bf16" if cc >= 80 else "fp16"
        fp8 = "fp8e4nv" if cc >= 89 else "u8"
        for dim in (64, 128, 256):
            cases += [
                _attend(cc, dim, dtype, cache, "none" if cache == dtype else "token", per_seq)
                for cache in (dtype, fp8, "i8")
                for per_seq in (True, False)
            ]
        cases += [
            _attend(cc, 128, dtype, fp8, "tensor", True),
            _attend(cc, 96, dtype, dtype, "none", True),
            _attend(cc, 96, dtype, dtype, "none", False),
            _attend(cc, 128, dtype, dtype, "none", False, window=1024, soft_cap=50.0, sinks=True),
            _attend(cc, 128, dtype, dtype, "none", True, window=1024, soft_cap=50.0, sinks=True),
        ]
        cases += [_reduce(cc, dim, dtype) for dim in (64, 96, 128, 256)]
    return cases + latent_cases()


def _attend(
    cc: int,
    dim: int,
    dtype: str,
    cache: str,
    scales: str,
    per_seq: bool,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: bool = False,
) -> CompileCase:
    cache_bytes = 2 if cache == dtype else 1
    config = (
        decode_config(cc, dim, GROUP, cache_bytes)
        if per_seq
        else prefill_config(cc, dim, GROUP, cache_bytes)
    )
    pointer = f"*{dtype}"
    signature = {
        "q": pointer,
        "out": "*fp32" if per_seq else pointer,
        "split_mass": "*fp32" if per_seq else None,
        "keys": f"*{cache}",
        "values": f"*{cache}",
        **dict.fromkeys(("key_scales", "value_scales"), "*fp32" if scales != "none" else None),
        "sinks": pointer if sinks else None,
        "block_tables": "*i32",
        "query_starts": "*i32",
        "context_lengths": "*i32",
        "num_seqs": "i32",
        **dict.fromkeys(STRIDES, "i32"),
        "scale_stride_block": "i32",
        "scale_stride_offset": "i32",
        "scale_stride_head": "i32",
        "table_stride": "i32",
        "softmax_scale": "fp32",
    }
    constexprs = {
        "GROUP": GROUP,
        "HEAD_DIM": dim,
        "DIM": padded_dim(dim),
        "BLOCK_SIZE": BLOCK_SIZE,
        "BLOCK_M": config.block_m,
        "TILE": config.tile,
        "SPLITS": SPLITS if per_seq else 1,
        "MIN_SPLIT": MIN_SPLIT,
        "PER_SEQ": per_seq,
        "SCALES": scales,
        "HAS_SINKS": sinks,
        "WINDOW": window,
        "SOFT_CAP": soft_cap,
        "COMPUTE": COMPUTE[dtype],
        "ASM": True,
    }
    kind = "decode" if per_seq else "prefill"
    extra = "-window-cap-sinks" if window else ""
    return _case(
        f"{kind}-d{dim}-{cache}-{scales}{extra}", attend_kernel, cc, signature, constexprs, config
    )


def _reduce(cc: int, dim: int, dtype: str) -> CompileCase:
    tile = decode_config(cc, dim, GROUP, 2).tile
    signature = {
        "split_out": "*fp32",
        "split_mass": "*fp32",
        "out": f"*{dtype}",
        "query_starts": "*i32",
        "context_lengths": "*i32",
        "out_stride_token": "i32",
        "out_stride_head": "i32",
    }
    constexprs = {
        "HEAD_DIM": dim,
        "DIM": padded_dim(dim),
        "TILE": tile,
        "SPLITS": SPLITS,
        "MIN_SPLIT": MIN_SPLIT,
        "WINDOW": 0,
    }
    return _case(
        f"reduce-d{dim}", reduce_kernel, cc, signature, constexprs, TileConfig(0, tile, 4, 1)
    )


def _case(
    name: str,
    kernel: Any,  # the @triton.jit function
    cc: int,
    signature: Mapping[str, str | None],
    constexprs: dict[str, Any],
    config: TileConfig,
) -> CompileCase:
    absent = {argument: None for argument, kind in signature.items() if kind is None}
    types = {argument: kind or "constexpr" for argument, kind in signature.items()}
    return CompileCase(
        f"attention-{name}",
        kernel,
        types | dict.fromkeys(constexprs, "constexpr"),
        absent | constexprs,
        config.num_warps,
        config.num_stages,
        min_cc=cc,
        max_cc=cc,
        aligned=tuple(a for a in (*POINTERS, *STRIDES) if signature.get(a)),
    )
