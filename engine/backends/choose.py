"""Which decoder serves a model: the C++ one on a CPU, the Triton one on a CUDA device, torch's operators elsewhere.

All of them have the same three methods:

    new_cache(num_blocks, config) -> cache      the KV blocks of every layer
    forward(items, cache) -> hidden [T, hidden] of the items' tokens, whose keys and values it writes
    logits(hidden [R, hidden]) -> float32 [R, vocab]
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ...architectures.base import DecoderConfig
from ...errors import UserError
from ...kernels.cpu import library as cpu
from ...kernels.gptq.linear import why_no_triton
from ...quant.checkpoint import Checkpoint
from ..config import EngineConfig
from .cpp import decoder as native
from .cpp.loader import NativeLoader
from .cpp.prepared_cache import PreparedCache
from .torch.loader import KernelReport, Loader

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def why_torch(
    config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> str | None:
    """None if there is a decoder better than torch's operators for this model, else why there is not."""
    if device.type == "cuda":
        return why_no_triton(device, dtype) or _why_no_triton_decoder(model)
    if config.cpu_isa == "none":
        return "--cpu-isa none"
    return native.why_not(model, config.block_size, dtype, device)


def load_decoder(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Any, KernelReport]:
    """The decoder with its weights, and the kernels they got. Raises UserError on bad input."""
    reason = why_torch(config, model, dtype, device)
    _check_flags(config, device, reason)
    if reason is None and device.type == "cpu":
        loader: Loader = _native_loader(config, checkpoint, model, dtype, device)
    else:
        loader = Loader(checkpoint, model, dtype, device)
    decoder = loader.load(progress)
    if reason is None and device.type == "cuda":
        from .triton.decoder import (
            TritonDecoder,
        )  # imports Triton, which a machine without a GPU need not have

        return TritonDecoder(decoder), loader.report
    if reason is not None:
        level = logging.WARNING if device.type == "cuda" or cpu.why_missing() else logging.INFO
        logger.log(level, "torch's operators serve: %s", reason)
    return decoder, loader.report


def _why_no_triton_decoder(model: DecoderConfig) -> str | None:
    from .triton import decoder as triton  # imports Triton

    return triton.why_not(model)


def _check_flags(config: EngineConfig, device: torch.device, reason: str | None) -> None:
    """Refuse what the decoder that serves cannot do; reason: why it is torch's."""
    if config.cpu_activations not in ("int8", "bf16"):
        raise UserError(
            f"--cpu-activations {config.cpu_activations!r} is unknown; use int8 or bf16"
        )
    if config.lm_head_bits not in (None, 8, 16):
        raise UserError(
            f"--lm-head-bits {config.lm_head_bits} is not supported; use 8, 16, or leave it out"
        )
    if config.kv_cache_dtype not in ("auto", "int8", "fp8"):
        raise UserError(
            f"--kv-cache-dtype {config.kv_cache_dtype!r} is unknown; use auto, int8 or fp8"
        )
    on_cpu = device.type == "cpu"
    needs = "the C++ decoder, but it" if on_cpu else "the Triton decoder, but it"
    if config.kv_cache_dtype == "fp8" and on_cpu:
        raise UserError("--kv-cache-dtype fp8 needs a CUDA device; use int8 on a CPU")
    if config.kv_cache_dtype != "auto" and reason is not None:
        raise UserError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs {needs} cannot serve this model: {reason}"
        )
    if config.lm_head_bits == 8 and (reason is not None or not on_cpu):
        why = reason or "it runs on a CUDA device"
        raise UserError(
            f"--lm-head-bits 8 needs the C++ decoder, but it cannot serve this model: {why}"
        )


def _native_loader(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> NativeLoader:
    pool = cpu.Pool(config.num_threads or torch.get_num_threads(), config.cpu_isa)
    keep = (
        config.prepared_cache if config.quantize is None else None
    )  # what is quantized at load has no path
    head_bits = config.lm_head_bits or _head_bits(config, checkpoint)
    cache = PreparedCache.of(checkpoint, keep, f"head {head_bits}") if keep else None
    return NativeLoader(
        checkpoint,
        model,
        dtype,
        device,
        pool=pool,
        int8=config.cpu_activations == "int8",
        block_size=config.block_size,
        head_bits=head_bits,
        cache=cache,
    )


def _head_bits(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """Of a 16-bit output head: 8 beside weights of at most 4 bits and int8 activations, whose own
    error is far larger."""
    weights = checkpoint.scheme.default if checkpoint.scheme else None
    few = weights is not None and weights.kind == "int" and weights.bits <= 4
    return 8 if few and config.cpu_activations == "int8" else 16
