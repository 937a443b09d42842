"""What `make kernels-report` compiles of latent attention: DeepSeek's sizes and MiniCPM 3's."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..measure.compile_cases import CompileCase
from .attend import reduce_kernel
from .config import padded_dim
from .latent import MAX_SPLITS, tile_config
from .latent_kernels import latent_attend_kernel, latent_rope_kernel
from .paged import MIN_SPLIT

COMPUTE = {"fp16": tl.float16, "bf16": tl.bfloat16}


def latent_cases() -> list[CompileCase]:
    """A configuration serves all cards from 8.0 on."""
    cases = [
        _attend(heads, rank, rope, splits, dtype)
        for heads, rank, rope in ((128, 512, 64), (16, 512, 64), (40, 256, 32))
        for splits in (MAX_SPLITS, 1)
        for dtype in ("bf16", "fp16")
    ]
    return [
        *cases,
        _reduce(512),
        _reduce(256),
        _rope(128, 128, 64, 512, True),
        _rope(40, 64, 32, 256, False),
    ]


def _attend(heads: int, rank: int, rope: int, splits: int, dtype: str) -> CompileCase:
    signature = {
        **dict.fromkeys(("q_ptr", "turned_ptr", "cache_ptr"), f"*{dtype}"),
        "out_ptr": "*fp32" if splits > 1 else f"*{dtype}",
        "mass_ptr": "*fp32" if splits > 1 else None,
        **dict.fromkeys(("table_ptr", "start_ptr", "length_ptr"), "*i32"),
        **dict.fromkeys(("num_seqs", "table_stride"), "i32"),
        **dict.fromkeys(("q_stride_token", "q_stride_head"), "i32"),
        **dict.fromkeys(("turned_stride_token", "turned_stride_head"), "i32"),
        "softmax_scale": "fp32",
    }
    config = tile_config(heads, rank, decode=splits > 1)
    constants = {
        "HEADS": heads,
        "TILE_HEADS": min(heads, config.block_m),
        "RANK": rank,
        "ROPE": rope,
        "DIM": padded_dim(rank),
        "ROPE_DIM": max(16, padded_dim(rope)),
        "BLOCK_SIZE": 16,
        "BLOCK_M": config.block_m,
        "TILE": config.tile,
        "SPLITS": splits,
        "MIN_SPLIT": MIN_SPLIT,
        "PER_SEQ": splits > 1,
        "COMPUTE": COMPUTE[dtype],
    }
    name = f"{'decode' if splits > 1 else 'prefill'}-{heads}x{rank}-{dtype}"
    return _case(name, latent_attend_kernel, signature, constants, config.num_warps)


def _reduce(rank: int) -> CompileCase:
    signature = {
        **dict.fromkeys(("split_out", "split_mass"), "*fp32"),
        "out": "*bf16",
        **dict.fromkeys(("query_starts", "context_lengths"), "*i32"),
        **dict.fromkeys(("out_stride_token", "out_stride_head"), "i32"),
    }
    constants = {
        "HEAD_DIM": rank,
        "DIM": padded_dim(rank),
        "TILE": 32,
        "SPLITS": MAX_SPLITS,
        "MIN_SPLIT": MIN_SPLIT,
        "WINDOW": 0,
    }
    return _case(f"reduce-{rank}", reduce_kernel, signature, constants, 4)


def _rope(heads: int, nope: int, rope: int, rank: int, interleaved: bool) -> CompileCase:
    signature = {
        **dict.fromkeys(("q_ptr", "latent_ptr", "weight_ptr"), "*bf16"),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), "*bf16"),
        **dict.fromkeys(("position_ptr", "slot_ptr"), "*i64"),
        "cache_ptr": "*bf16",
        **dict.fromkeys(("q_stride", "latent_stride", "table_stride"), "i32"),
        "eps": "fp32",
    }
    constants = {
        "HEADS": heads,
        "NOPE": nope,
        "ROPE": rope,
        "RANK": rank,
        "PAIRS": triton.next_power_of_2(rope // 2),
        "DIM": triton.next_power_of_2(rank),
        "INTERLEAVED": interleaved,
    }
    name = f"rope-{heads}x{rank}{'-interleaved' * interleaved}"
    return _case(name, latent_rope_kernel, signature, constants, 1)


def _case(
    name: str,
    kernel: Any,  # the @triton.jit function
    signature: Mapping[str, str | None],
    constants: dict[str, Any],
    num_warps: int,
) -> CompileCase:
    absent = {argument: None for argument, kind in signature.items() if kind is None}
    kinds = {argument: kind or "constexpr" for argument, kind in signature.items()}
    pointers = [argument for argument, kind in kinds.items() if kind.startswith("*")]
    strides = [argument for argument in kinds if "_stride" in argument and "table" not in argument]
    return CompileCase(
        f"latent-{name}",
        kernel,
        kinds | dict.fromkeys(constants, "constexpr"),
        absent | constants,
        num_warps,
        num_stages=2,
        min_cc=80,
        aligned=(*pointers, *strides),
    )
