"""Runner: owns the model and the KV cache on one device, and computes what the scheduler decided.

It keeps no state of requests: positions, blocks, penalties and random numbers all follow from the Request itself, so a
preempted request resumes anywhere, and a batch is only a list. (A decoder that samples on its device remembers what it
can also make anew from the Request.)
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..architectures.config import eos_token_ids
from ..architectures.multimodal import is_multimodal, text_config
from ..architectures.registry import model_spec
from ..errors import CheckpointError, UnsupportedError, UserError
from ..quant import canary
from ..quant.at_load import quantized_at_load
from ..quant.card_file import read_card
from ..quant.checkpoint import Checkpoint, open_checkpoint
from ..quant.checkpoint.headers import read_json
from ..quant.device import named_device
from . import memory
from .backends.base import Target
from .backends.batch import Batch
from .backends.choose import load_decoder
from .backends.kv_groups import group_windows
from .backends.triton.transfer import to_device
from .backends.weights import ModelWeights
from .config import EngineConfig
from .messages import Ready, TokenLogprobs
from .pooler import Pooler
from .pooling import Task
from .sampler import NOT_FINITE, token_logprobs
from .scheduling.batch import PendingStep, ScheduledBatch, ScheduledRequest, StepResult
from .scheduling.kv_cache_manager import KVGroup

if TYPE_CHECKING:
    from .vision.tower import VisionTower

logger = logging.getLogger(__name__)

_LOGITS_ROWS = 256  # rows of prompt logits at a time: a vocabulary is wide
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Runner:
    """Loads config.model, then executes batches. Raises UserError on bad input."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] | None = None):
        started = time.perf_counter()
        self.config = config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        checkpoint = open_checkpoint(config.model, config.revision)
        self.spec = model_spec(checkpoint.config, checkpoint.names())
        self.device = resolve_device(config.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # Triton launches on the current one
        self.dtype = resolve_dtype(config.dtype, checkpoint, self.device)
        self._load(checkpoint, progress or (lambda line: None))
        self.vision = _vision(checkpoint, self.dtype, self.device, self.model.looks_ahead)
        self.windows = group_windows(self.spec)
        reserved = 0 if self.vision is None else memory.VISION_BYTES
        self.plan = memory.plan(
            config, self.spec, self.dtype, self.device, self.windows, reserved=reserved
        )
        self.block_size, self.num_blocks = config.block_size, self.plan.num_blocks
        self.num_states, self.rope_switch = self.plan.num_states, self.spec.rope_switch
        self.max_model_len, self.vocab_size = self.plan.max_model_len, self.spec.vocab_size
        self.eos_token_ids = _eos_token_ids(checkpoint)
        self.cache = self.model.new_cache(self.plan.blocks, self.num_states)
        self.pooler = _pooler(checkpoint, self.spec.hidden_size, self.device)
        self._check_sanity()
        self._check_canary(checkpoint)
        self._card = read_card(checkpoint.path)
        with torch.inference_mode():
            self.model.warm_up(self.cache, self.max_model_len)
        self.load_seconds = time.perf_counter() - started

    def _load(self, checkpoint: Checkpoint, tell: Callable[[str], None]) -> None:
        config = self.config
        kind, save, dense = config.quantize, config.save_quantized, self.spec.dense_modules()
        with quantized_at_load(checkpoint, kind, save, dense) as reading:
            memory.check_weights_fit(reading.nbytes, self.spec, self.device)
            ModelWeights(reading, self.spec).check_depth()
            with torch.inference_mode():
                self.model = load_decoder(
                    Target(config, self.dtype, self.device),
                    reading,
                    self.spec,
                    lambda done, total: tell(f"loading layer {done}/{total}"),
                )
            self.quantization = reading.scheme.describe() if reading.scheme else "none"
        memory.release_cached(self.device)

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Those that the decoder's cache has."""
        groups = zip(self.plan.blocks, self.windows, strict=True)
        return tuple(KVGroup(min(count, self.num_blocks), window) for count, window in groups)

    def ready(self) -> Ready:
        ledger = {
            "weights": self.model.weight_bytes,
            "kv_cache": self.plan.kv_cache,
            "activations": self.plan.activations,
        }
        if self.plan.states:
            ledger["recurrent_states"] = self.plan.states
        if self.vision is not None:
            ledger["vision"] = self.vision.nbytes + memory.VISION_BYTES
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            dtype=str(self.dtype).split(".")[1],
            device=str(self.device),
            quantization=self.quantization,
            kernels=dict(self.model.report.used),
            ledger=ledger,
            load_seconds=self.load_seconds,
            tasks=self._tasks(),
            embedding=None if self.pooler is None else self.pooler.info,
            vision=None if self.vision is None else self.vision.info,
            card=self._card,
        )

    def _tasks(self) -> tuple[Task, ...]:
        generating: tuple[Task, ...] = () if self.spec.headless else ("generate",)
        return generating if self.pooler is None else (*generating, "embed")

    @torch.inference_mode()
    def execute(self, scheduled: ScheduledBatch) -> StepResult | PendingStep:
        """Compute the scheduled tokens and sample for every item that catches up with its request. Where the device
        samples for all of them, the host does not wait for it."""
        batch = Batch(scheduled.items, self.block_size)
        hidden = self.model.forward(batch, self.cache)
        result = StepResult()
        ends: list[int] = []
        sampling: list[ScheduledRequest] = []
        for item, start, end in zip(
            batch.items, batch.query_start_loc, batch.query_start_loc[1:], strict=False
        ):
            if self._breaks(item, hidden[start:end]):
                self._fail(item, result)
                continue
            if item.request.params.prompt_logprobs is not None:
                self._score_prompt(item, hidden[start:end], result)
            if item.request.params.pooling is not None and self.pooler is not None:
                self.pooler.take(item, hidden[start:end], result)
                if item.request.request_id in result.errors:
                    self._fail(item, result)
            elif item.samples:
                ends.append(end - 1)
                sampling.append(item)
        if not sampling:
            return result
        rows = hidden
        if len(ends) < len(hidden):
            rows = hidden[to_device(ends, torch.int64, hidden.device)]
        step = self.model.sample(self.model.logits(rows), [i.request for i in sampling], result)
        for item in sampling:
            if item.request.request_id in result.errors:
                self._fail(item, result)
        return step

    def _breaks(self, item: ScheduledRequest, hidden: Tensor) -> bool:
        """Whether a chunk holds what is not a number: said now, before a later step could share its blocks. A decode
        token's is found when it is sampled; and what need not be waited for reads nothing behind a request's tokens."""
        if self.model.overlaps or (item.samples and item.num_tokens == 1):
            return False
        return not bool(torch.isfinite(hidden).all())

    def _fail(self, item: ScheduledRequest, result: StepResult) -> None:
        """Clear this step's blocks (those before may be shared, and are whole), and the state."""
        result.errors.setdefault(item.request.request_id, NOT_FINITE)
        first = item.start // self.block_size
        blocks = [table[first:] for table in item.request.block_tables]
        self.cache.clear(blocks, item.request.state_slot)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [T, vocab] for every position of one sequence. The scheduler's cache is left alone."""
        batch = Batch.of_one(token_ids, self.block_size)
        hidden = self.model.forward(batch, self.model.new_cache([batch.num_blocks]))
        return torch.cat([self.model.logits(rows) for rows in hidden.split(_LOGITS_ROWS)])

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

    @torch.inference_mode()
    def _check_sanity(self) -> None:
        """One measured pass, prefill and decode: kernels warm up, and broken weights are found now, not by a user."""
        tokens = [1] * 4
        cache = self.model.new_cache([1 + len(tokens) // self.block_size])
        self.model.forward(Batch.of_one(tokens, self.block_size), cache)
        last = Batch.of_one(tokens, self.block_size, start=3)
        logits = self.model.logits(self.model.forward(last, cache))
        if not torch.isfinite(logits).all():
            raise UserError(
                f"the model's logits are not finite in {self.dtype}; try --dtype float32, or check the "
                "checkpoint"
            )

    def _check_canary(self, checkpoint: Checkpoint) -> None:
        """What the conversion kept of one prompt, asked again: damage that leaves numbers finite is found now."""
        if self.config.quantize is not None or not checkpoint.path.is_dir():
            return  # other weights than those that were converted
        kept = canary.read(checkpoint.path, self.vocab_size)
        if kept is not None:
            canary.check(kept, self.logits(kept.prompt), checkpoint.path)


def resolve_device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises UserError where torch has no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return named_device(name)


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own, except that 16-bit CPU work is bfloat16, and bfloat16 needs compute capability 8.0."""
    if name != "auto":
        if name not in _DTYPES:
            raise UserError(f"--dtype {name!r} is unknown; use auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    stored = checkpoint.stored_dtype
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
    return sorted(
        {
            *eos_token_ids(generation_config, file),
            *eos_token_ids(text_config(checkpoint.config), checkpoint.path),
        }
    )


def _pooler(checkpoint: Checkpoint, width: int, device: torch.device) -> Pooler | None:
    """None where the checkpoint wants its embeddings made in a way that is not computed: it generates all the same."""
    try:
        return Pooler.load(checkpoint.path, "lasttoken", width, device)
    except UnsupportedError as error:
        logger.warning("the model will not embed: %s", error)
        return None


def _vision(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, looks_ahead: bool
) -> "VisionTower | None":
    """None where the model does not see, or cannot: it is served for text all the same. looks_ahead: of its decoder."""
    if not is_multimodal(checkpoint.config):
        return None
    from .vision.tower import VisionTower  # which needs transformers, and the time to import it

    try:
        vision = VisionTower.load(checkpoint, dtype, device)
        if vision is not None and vision.is_whole and not looks_ahead:
            logger.warning(
                "the model will not see: tokens of its images see each other, which the Triton kernels do not compute; "
                "--device cpu does"
            )
            return None
        return vision
    except CheckpointError as error:
        logger.warning("the model will not see: %s", error)
        return None
