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

from ..architectures.registry import decoder_config
from ..errors import UserError
from ..quant.at_load import quantized_at_load
from ..quant.checkpoint import Checkpoint, open_checkpoint
from ..quant.checkpoint.headers import read_json
from . import memory
from .backends.choose import load_decoder
from .backends.torch.decoder import Decoder
from .backends.triton.batch import to_device
from .backends.triton.graphs import CudaRecorder, Record
from .config import EngineConfig
from .messages import Ready, TokenLogprobs
from .request import Request, SamplingParams
from .sampler import NOT_FINITE, sample, token_logprobs
from .scheduling.batch import PendingStep, ScheduledBatch, ScheduledRequest, StepResult
from .scheduling.kv_cache_manager import KVGroup

logger = logging.getLogger(__name__)

_LOGITS_ROWS = 256  # rows of prompt logits at a time: a vocabulary is wide
_WARM_UP_TOKENS = (16, 32, 64, 128, 512)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Runner:
    """Loads config.model, then executes batches. Raises UserError on bad input."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] | None = None):
        started = time.perf_counter()
        self.config = config
        self.sampler: Any = None  # a DeviceSampler, where the decoder runs on a device of its own
        tell = progress or (lambda line: None)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        checkpoint = open_checkpoint(config.model, config.revision)
        self.model_config = decoder_config(checkpoint.config)
        self.device = resolve_device(config.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # Triton launches on the current one
        self.dtype = resolve_dtype(config.dtype, checkpoint, self.device)
        before = memory.available_bytes(self.device)
        with quantized_at_load(checkpoint, config.quantize, config.save_quantized) as checkpoint:
            memory.check_weights_fit(checkpoint.nbytes, self.device)
            with torch.inference_mode():
                self.model, self.kernels = load_decoder(
                    config,
                    checkpoint,
                    self.model_config,
                    self.dtype,
                    self.device,
                    lambda done, total: tell(f"loading layer {done}/{total}"),
                )
        memory.release_cached(self.device)
        self.weight_bytes = max(0, before - memory.available_bytes(self.device))
        self.plan = memory.plan(config, self.model_config, self.dtype, self.device)
        self.block_size, self.num_blocks = config.block_size, self.plan.num_blocks
        self.max_model_len, self.vocab_size = self.plan.max_model_len, self.model_config.vocab_size
        self.eos_token_ids = _eos_token_ids(checkpoint)
        self.quantization = checkpoint.scheme.describe() if checkpoint.scheme else "none"
        self.cache = self.model.new_cache(self.num_blocks, config)
        self._check_sanity()
        if self.device.type == "cuda" and not isinstance(self.model, Decoder):
            self._warm_up()
            self._overlap(CudaRecorder(self.device))
        self.load_seconds = time.perf_counter() - started

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """One of all layers: every backend keeps all blocks."""
        return (KVGroup(self.num_blocks),)

    def ready(self) -> Ready:
        ledger = {
            "weights": self.weight_bytes,
            "kv_cache": self.plan.kv_cache,
            "activations": self.plan.activations,
        }
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            dtype=str(self.dtype).split(".")[1],
            device=str(self.device),
            quantization=self.quantization,
            kernels=dict(self.kernels.used),
            ledger=ledger,
            load_seconds=self.load_seconds,
        )

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult | PendingStep:
        """Compute the scheduled tokens and sample for every item that catches up with its request. Where the device
        samples for all of them, the host does not wait for it."""
        items = sorted(batch.items, key=lambda item: item.num_tokens > 1)  # decodes first; stable
        hidden = self._forward(items, self.cache)
        result = StepResult()
        ends: list[int] = []
        sampling: list[ScheduledRequest] = []
        offset = 0
        for item in items:
            rows = hidden[offset : offset + item.num_tokens]
            offset += item.num_tokens
            if self._breaks(item, rows):
                self._fail(item, result)
                continue
            if item.request.params.prompt_logprobs is not None:
                self._score_prompt(item, rows, result)
            if item.samples:
                ends.append(offset - 1)
                sampling.append(item)
        if not sampling:
            return result
        rows = (
            hidden
            if len(ends) == len(hidden)
            else hidden[to_device(ends, torch.int64, self.device)]
        )
        return self._sample(self.model.logits(rows), sampling, result)

    def _sample(
        self, logits: Tensor, items: list[ScheduledRequest], result: StepResult
    ) -> StepResult | PendingStep:
        """On the device whatever it can; a step with a request that it cannot serve is waited for."""
        requests = [item.request for item in items]
        if self.sampler is None:
            self._sample_here(logits, items, result)
            return result
        waits = [
            request.params.logprobs is not None or request.params.prompt_logprobs is not None
            for request in requests
        ]
        if not any(waits):
            return self.sampler.launch(logits, requests, result)
        here = [row for row, wait in enumerate(waits) if wait]
        there = [row for row, wait in enumerate(waits) if not wait]
        self._sample_here(logits[here], [items[row] for row in here], result)
        return self.sampler.launch(logits[there], [requests[row] for row in there], result).result()

    def _sample_here(
        self, logits: Tensor, items: list[ScheduledRequest], result: StepResult
    ) -> None:
        sample(logits, [item.request for item in items], result)
        for item in items:
            if item.request.request_id in result.errors:
                self._fail(item, result)

    def _breaks(self, item: ScheduledRequest, hidden: Tensor) -> bool:
        """Whether a chunk holds what is not a number: said now, before a later step could share its blocks. A decode
        token's is found when it is sampled; and a device of its own reads nothing behind a request's tokens."""
        if self.sampler is not None or (item.samples and item.num_tokens == 1):
            return False
        return not bool(torch.isfinite(hidden).all())

    def _fail(self, item: ScheduledRequest, result: StepResult) -> None:
        """Clear this step's blocks: those before may be shared, and are whole."""
        result.errors[item.request.request_id] = NOT_FINITE
        self.cache.clear(item.request.block_tables[0][item.start // self.block_size :])

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [T, vocab] for every position of one sequence. The scheduler's cache is left alone."""
        item, cache = self._scratch(token_ids)
        hidden = self._forward([item], cache)
        return torch.cat([self.model.logits(rows) for rows in hidden.split(_LOGITS_ROWS)])

    def _forward(self, items: list[ScheduledRequest], cache: Any) -> Tensor:
        """Hidden states [T, hidden] of all tokens, items side by side. cache: one that the model made."""
        if self.sampler is not None:
            return self.model.forward(items, cache, self.sampler.previous)
        return self.model.forward(items, cache)

    def _score_prompt(self, item: ScheduledRequest, hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens start+1 .. end, as far as they are prompt."""
        request = item.request
        scored = request.prompt_token_ids[item.start + 1 : item.end + 1]
        entries: list[TokenLogprobs] = []
        for first in range(0, len(scored), _LOGITS_ROWS):
            rows = hidden[first : min(first + _LOGITS_ROWS, len(scored))]
            logprobs = torch.log_softmax(self.model.logits(rows), -1)
            entries += [
                token_logprobs(row, token, request.params.prompt_logprobs or 0)
                for row, token in zip(logprobs, scored[first:], strict=False)
            ]
        if scored:
            result.prompt_logprobs[request.request_id] = entries

    def _scratch(self, token_ids: list[int]) -> tuple[ScheduledRequest, Any]:
        blocks = -(-len(token_ids) // self.block_size)
        request = Request(
            "scratch",
            token_ids,
            SamplingParams(),
            frozenset(),
            seed=0,
            block_tables=[list(range(blocks))],
        )
        return ScheduledRequest(request, 0, len(token_ids)), self.model.new_cache(
            blocks, self.config
        )

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Prompts of each size that the products have a path of their own for: what is compiled now stalls no request.
        Compiled kernels stay on disk, so this takes seconds once and milliseconds from then on."""
        for tokens in _WARM_UP_TOKENS:
            item, cache = self._scratch(
                [1] * min(tokens, self.config.max_num_batched_tokens, self.max_model_len)
            )
            self._forward([item], cache)

    def _overlap(self, record: Record) -> None:
        """Replay decode steps from graphs and sample on the device: the host need not wait for a step any more."""
        from .backends.triton.sampler import DeviceSampler  # imports Triton

        with torch.inference_mode():
            self.model.capture(record, self.cache, self.config.max_num_seqs, self.max_model_len)
        self.sampler = DeviceSampler(self.vocab_size, self.config.max_num_seqs, self.device)

    def _check_sanity(self) -> None:
        """One measured pass, prefill and decode: kernels warm up, and broken weights are found now, not by a user."""
        item, cache = self._scratch([1] * 4)
        with torch.inference_mode():
            self._forward([item], cache)
            last = ScheduledRequest(item.request, 3, 1)
            logits = self.model.logits(self._forward([last], cache))
        if not torch.isfinite(logits).all():
            raise UserError(
                f"the model's logits are not finite in {self.dtype}; try --dtype float32, or check the "
                "checkpoint"
            )


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return device


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own, except that 16-bit CPU work is bfloat16, and bfloat16 needs compute capability 8.0."""
    if name != "auto":
        if name not in _DTYPES:
            raise UserError(f"--dtype {name!r} is unknown; use auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    config = checkpoint.config
    stored = _DTYPES.get(
        str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), torch.bfloat16
    )
    if device.type == "cpu" and stored is torch.float16:
        return torch.bfloat16
    if (
        device.type == "cuda"
        and stored is torch.bfloat16
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
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
