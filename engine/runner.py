"""Runner: owns the model and the KV cache on one device, and computes what the scheduler decided.

It keeps no state of requests: positions, blocks, penalties and random numbers all follow from the Request itself, so a
preempted request resumes anywhere, and a batch is only a list.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu import library as cpu
from ..quant.at_load import quantized_at_load
from ..quant.checkpoint import Checkpoint, open_checkpoint
from ..quant.errors import NibbleError
from ..quant.safetensors_files import read_json
from . import memory
from .attention import AttentionMetadata, KVCache
from .batch import ScheduledBatch, ScheduledRequest, StepResult
from .config import EngineConfig
from .loader import Loader
from .messages import Ready, TokenLogprobs
from .models.decoder import DecoderConfig
from .models.native import NativeDecoder, why_not
from .models.registry import decoder_config
from .native_loader import NativeLoader
from .prepared_cache import PreparedCache
from .request import Request, SamplingParams
from .sampler import sample, token_logprobs

logger = logging.getLogger(__name__)

_LOGITS_ROWS = 256  # rows of prompt logits at a time: a vocabulary is wide
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Runner:
    """Loads config.model, then executes batches. Raises NibbleError on bad input."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] | None = None):
        started = time.perf_counter()
        tell = progress or (lambda line: None)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        checkpoint = open_checkpoint(config.model, config.revision)
        self.model_config = decoder_config(checkpoint.config)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, checkpoint, self.device)
        before = memory.available_bytes(self.device)
        with quantized_at_load(checkpoint, config.quantize, config.save_quantized) as checkpoint:
            memory.check_weights_fit(checkpoint.nbytes, self.device)
            loader = loader_for(config, checkpoint, self.model_config, self.dtype, self.device)
            with torch.inference_mode():
                self.model = loader.load(lambda done, total: tell(f"loading layer {done}/{total}"))
        self.kernels = loader.report
        self.weight_bytes = max(0, before - memory.available_bytes(self.device))
        self.plan = memory.plan(config, self.model_config, self.dtype, self.device)
        self.int8_cache = config.kv_cache_dtype == "int8"
        self.block_size, self.num_blocks = config.block_size, self.plan.num_blocks
        self.max_model_len, self.vocab_size = self.plan.max_model_len, self.model_config.vocab_size
        self.eos_token_ids = _eos_token_ids(checkpoint)
        self.quantization = checkpoint.scheme.describe() if checkpoint.scheme else "none"
        self.cache = self._new_cache(self.num_blocks)
        self._check_sanity()
        self.load_seconds = time.perf_counter() - started

    def ready(self) -> Ready:
        ledger = {"weights": self.weight_bytes, "kv_cache": self.plan.kv_cache, "activations": self.plan.activations}
        return Ready(max_model_len=self.max_model_len, vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids,
                     num_blocks=self.num_blocks, block_size=self.block_size, dtype=str(self.dtype).split(".")[1],
                     device=str(self.device), quantization=self.quantization, kernels=dict(self.kernels.used),
                     ledger=ledger, load_seconds=self.load_seconds)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute the scheduled tokens and sample for every item that catches up with its request."""
        items = sorted(batch.items, key=lambda item: item.num_tokens > 1)  # decodes first; stable
        hidden = self._forward(items, self.cache)
        result = StepResult()
        ends, sampling, offset = [], [], 0
        for item in items:
            if item.request.params.prompt_logprobs is not None:
                self._score_prompt(item, hidden[offset:offset + item.num_tokens], result)
            offset += item.num_tokens
            if item.samples:
                ends.append(offset - 1)
                sampling.append(item.request)
        if sampling:
            rows = hidden if len(ends) == len(hidden) else hidden[torch.tensor(ends, device=self.device)]
            sample(self.model.logits(rows), sampling, result)
            for request in sampling:
                if request.request_id in result.errors:
                    self.cache.clear(request.block_table)
        return result

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [T, vocab] for every position of one sequence. The scheduler's cache is left alone."""
        item, cache = self._scratch(token_ids)
        hidden = self._forward([item], cache)
        return torch.cat([self.model.logits(rows) for rows in hidden.split(_LOGITS_ROWS)])

    def _forward(self, items: list[ScheduledRequest], cache: Any) -> Tensor:
        """Hidden states [T, hidden] of all tokens, items side by side. cache: what `_new_cache` made."""
        if isinstance(self.model, NativeDecoder):
            return self.model.forward(items, cache)
        token_ids = [token for item in items for token in item.request.token_ids[item.start:item.end]]
        positions = [position for item in items for position in range(item.start, item.end)]
        meta = AttentionMetadata.build(items, self.block_size, self.dtype, self.device)
        return self.model.forward(torch.tensor(token_ids, device=self.device),
                                  torch.tensor(positions, device=self.device), cache, meta)

    def _score_prompt(self, item: ScheduledRequest, hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens start+1 .. end, as far as they are prompt."""
        request = item.request
        scored = request.prompt_token_ids[item.start + 1:item.end + 1]
        entries: list[TokenLogprobs] = []
        for first in range(0, len(scored), _LOGITS_ROWS):
            rows = hidden[first:min(first + _LOGITS_ROWS, len(scored))]
            logprobs = torch.log_softmax(self.model.logits(rows), -1)
            entries += [token_logprobs(row, token, request.params.prompt_logprobs or 0)
                        for row, token in zip(logprobs, scored[first:], strict=False)]
        if scored:
            result.prompt_logprobs[request.request_id] = entries

    def _new_cache(self, num_blocks: int) -> Any:
        model = self.model_config
        if isinstance(self.model, NativeDecoder):
            return self.model.new_cache(num_blocks, self.int8_cache)
        return KVCache.allocate(model.num_layers, num_blocks, self.block_size, model.num_kv_heads, model.head_dim,
                                self.dtype, self.device)

    def _scratch(self, token_ids: list[int]) -> tuple[ScheduledRequest, Any]:
        blocks = -(-len(token_ids) // self.block_size)
        request = Request("scratch", token_ids, SamplingParams(), frozenset(), seed=0,
                          block_table=list(range(blocks)))
        return ScheduledRequest(request, 0, len(token_ids)), self._new_cache(blocks)

    def _check_sanity(self) -> None:
        """One measured pass, prefill and decode: kernels warm up, and broken weights are found now, not by a user."""
        item, cache = self._scratch([1] * 4)
        with torch.inference_mode():
            self._forward([item], cache)
            last = ScheduledRequest(item.request, 3, 1)
            logits = self.model.logits(self._forward([last], cache))
        if not torch.isfinite(logits).all():
            raise NibbleError(f"the model's logits are not finite in {self.dtype}; try --dtype float32, or check the "
                              "checkpoint")


def loader_for(config: EngineConfig, checkpoint: Checkpoint, model: DecoderConfig, dtype: torch.dtype,
               device: torch.device) -> Loader:
    """The loader of the C++ decoder where it can serve this model, else of the torch one."""
    if config.cpu_activations not in ("int8", "bf16"):
        raise NibbleError(f"--cpu-activations {config.cpu_activations!r} is unknown; use int8 or bf16")
    if config.lm_head_bits not in (None, 8, 16):
        raise NibbleError(f"--lm-head-bits {config.lm_head_bits} is not supported; use 8, 16, or leave it out")
    if config.kv_cache_dtype not in ("auto", "int8"):
        raise NibbleError(f"--kv-cache-dtype {config.kv_cache_dtype!r} is unknown; use auto or int8")
    reason = "--cpu-isa none" if config.cpu_isa == "none" else why_not(model, config.block_size, dtype, device)
    if reason is None:
        pool = cpu.Pool(config.num_threads or torch.get_num_threads(), config.cpu_isa)
        keep = config.prepared_cache if config.quantize is None else None  # what is quantized at load has no path
        head_bits = config.lm_head_bits or _head_bits(config, checkpoint)
        cache = PreparedCache.of(checkpoint, keep, f"head {head_bits}") if keep else None
        return NativeLoader(checkpoint, model, dtype, device, pool=pool,
                            int8=config.cpu_activations == "int8", block_size=config.block_size,
                            head_bits=head_bits, cache=cache)
    for flag, given in (("--lm-head-bits 8", config.lm_head_bits == 8),
                        ("--kv-cache-dtype int8", config.kv_cache_dtype == "int8")):
        if given:
            raise NibbleError(f"{flag} needs the C++ decoder, but it cannot serve this model: {reason}")
    if device.type == "cpu":
        level = logging.WARNING if cpu.why_missing() else logging.INFO
        logger.log(level, "torch's operators serve instead of the C++ decoder: %s", reason)
    return Loader(checkpoint, model, dtype, device)


def _head_bits(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """Of a 16-bit output head: 8 beside weights of at most 4 bits and int8 activations, whose own
    error is far larger."""
    weights = checkpoint.scheme.default if checkpoint.scheme else None
    few = weights is not None and weights.kind == "int" and weights.bits <= 4
    return 8 if few and config.cpu_activations == "int8" else 16


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise NibbleError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NibbleError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return device


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own, except that 16-bit CPU work is bfloat16, and bfloat16 needs compute capability 8.0."""
    if name != "auto":
        if name not in _DTYPES:
            raise NibbleError(f"--dtype {name!r} is unknown; use auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    config = checkpoint.config
    stored = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), torch.bfloat16)
    if device.type == "cpu" and stored is torch.float16:
        return torch.bfloat16
    if device.type == "cuda" and stored is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return stored


def _eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """From generation_config.json where it says more than config.json (chat models end turns with their own token)."""
    file = checkpoint.path / "generation_config.json"
    generation_config = read_json(file) if file.is_file() else {}
    found: list[int] = []
    for source in (generation_config, checkpoint.config):
        ids = source.get("eos_token_id")
        found += [] if ids is None else ids if isinstance(ids, list) else [ids]
    return sorted(set(found))
