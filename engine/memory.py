"""The memory budget: planned from headers, then checked against what loading really took, then degraded, never guessed.

    available = weights + activations + KV cache + what is left to the machine

The ladder, when it does not fit: a smaller KV cache, then a shorter context (both only where the user did not fix
them), then one error that says what is missing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..architectures.base import DecoderConfig
from ..errors import UserError
from .config import EngineConfig

_CPU_SHARE = 0.4  # of the memory left after loading: the machine has other things to do
_GPU_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, and what they buy."""

    num_blocks: int
    max_model_len: int
    kv_cache: int
    activations: int


def kv_bytes_per_token(model: DecoderConfig, dtype: torch.dtype, cache_dtype: str = "auto") -> int:
    vector = (
        model.head_dim * dtype.itemsize if cache_dtype == "auto" else model.head_dim + 4
    )  # 8 bits and a scale
    return 2 * model.num_layers * model.num_kv_heads * vector


def activation_bytes(
    config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """An upper bound for one step: the widest intermediate of a full batch, float32 logits twice over, and on a GPU the
    widest matrix in 16 bits, which large batches are multiplied by after it has been dequantized."""
    per_token = 4 * model.hidden_size + 3 * model.intermediate_size
    per_token += 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    matrix = (
        2 * model.intermediate_size * model.hidden_size * dtype.itemsize
        if device.type == "cuda"
        else 0
    )
    logits = 2 * 4 * config.max_num_seqs * model.vocab_size
    return config.max_num_batched_tokens * per_token * dtype.itemsize + logits + matrix


def release_cached(device: torch.device) -> None:
    """Give back what loading needed for a moment, so that it is seen as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_weights_fit(weight_bytes: int, device: torch.device) -> None:
    """Refuse before loading what cannot fit. Raises UserError with both numbers."""
    available = available_bytes(device)
    if weight_bytes > available:
        raise UserError(
            f"the weights need {gib(weight_bytes)}, {device.type} memory has {gib(available)} free; "
            "use a smaller or a quantized checkpoint"
        )


def plan(
    config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> MemoryPlan:
    """Size the KV cache, after the weights are loaded. Raises UserError if not one useful request fits."""
    activations = activation_bytes(config, model, dtype, device)
    block = kv_bytes_per_token(model, dtype, config.kv_cache_dtype) * config.block_size
    wanted_len = config.max_model_len or model.max_position_embeddings
    if wanted_len > model.max_position_embeddings:
        raise UserError(
            f"--max-model-len {wanted_len} is more than the {model.max_position_embeddings} positions "
            "the model was trained for"
        )
    budget = config.kv_cache_memory
    if budget is None:
        share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
        free = int(share * available_bytes(device)) - activations
        enough = config.max_num_seqs * -(-wanted_len // config.block_size) * block
        budget = min(free, enough)
    num_blocks = budget // block
    capacity = num_blocks * config.block_size
    if capacity < min(wanted_len, config.max_model_len or config.block_size):
        raise UserError(
            f"the KV cache holds {max(0, capacity)} tokens in {gib(budget)}; a context of {wanted_len} "
            f"needs {gib(-(-wanted_len // config.block_size) * block)}: lower --max-model-len, or "
            "raise --kv-cache-memory"
        )
    return MemoryPlan(num_blocks, min(wanted_len, capacity), num_blocks * block, activations)


def available_bytes(device: torch.device) -> int:
    """Memory that could be had now: on a CPU the smaller of the machine's and the control group's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    machine = int(found[1]) * 1024 if found else 8 << 30
    limit, used = (
        _read("/sys/fs/cgroup/memory.max").strip(),
        _read("/sys/fs/cgroup/memory.current").strip(),
    )
    return min(machine, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else machine


def gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
