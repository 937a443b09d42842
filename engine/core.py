"""EngineCore: the engine's loop body. One `step` schedules, computes and takes in the result; nothing else happens.

    add / abort  ->  Scheduler  -- ScheduledBatch -->  Runner  -- StepResult -->  Scheduler  ->  RequestOutputs

Where the runner only launches work (a GPU), the loop is one step ahead: while the device computes step n, step n + 1 is
scheduled and launched, its newest tokens still UNKNOWN to the host, and only then n's result is taken in.

    device   [ step n           ][ step n + 1       ][ ...
    host     schedule, launch n+1 | take in n, send | schedule, launch n+2 | ...

A step that fails takes down the requests that were in it and nobody else, provided that the device still computes:
one token is run as a probe, and only if that fails too is the engine given up. Whenever no request is left, all blocks
are free and `check_idle` says so.
"""

import logging
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from .config import EngineConfig
from .grammar.structured_outputs import to_grammar
from .messages import AddRequest, EngineStats, Ready, RequestOutput
from .request import ImageSpan, Request
from .sampling_params import SamplingParams
from .scheduling.batch import PendingStep, ScheduledBatch, ScheduledRequest, StepResult
from .scheduling.kv_cache_manager import KVCacheManager, KVGroup
from .scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from torch import Tensor

    from .grammar.compiler import GrammarCompiler
    from .vision.encoder import ImageEncoder
    from .vision.tower import VisionTower

logger = logging.getLogger(__name__)

_Launched = tuple[ScheduledBatch, StepResult | PendingStep]


class RunnerProtocol(Protocol):
    """What the loop asks of the device side: `runner.Runner`, or a fake in tests."""

    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_states: int  # slots for recurrent states; 0: the model has none
    rope_switch: int | None  # tokens of a request beyond which all its positions turn otherwise

    @property
    def kv_groups(self) -> Sequence[KVGroup]: ...

    @property
    def vision(self) -> "VisionTower | None":
        """None: the model does not see."""
        ...

    def ready(self) -> Ready: ...

    def execute(self, batch: ScheduledBatch) -> StepResult | PendingStep: ...

    def logits(self, token_ids: list[int]) -> "Tensor": ...


class EngineCore:
    """The scheduler and the runner of one model."""

    def __init__(
        self,
        config: EngineConfig,
        runner: RunnerProtocol | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        """Loads the model unless a runner is given. `progress` hears a line at each stage of loading. UserError on
        bad input."""
        self.runner = _load_runner(config, progress) if runner is None else runner
        self.scheduler = Scheduler(
            KVCacheManager(
                self.runner.kv_groups,
                self.runner.block_size,
                config.enable_prefix_caching,
                self.runner.num_states,
            ),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            rope_switch=self.runner.rope_switch,
        )
        self._open: _Launched | None = None  # the step whose result has not been taken in
        self._eos = frozenset(self.runner.eos_token_ids)
        self._tasks = frozenset(self.runner.ready().tasks)
        self._random = random.Random(config.seed)
        self._config = config

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._open is not None

    def ready(self) -> Ready:
        ready = self.runner.ready()
        ready.max_model_len = self.scheduler.max_model_len
        ready.num_blocks = self.scheduler.kv_cache.num_blocks
        return ready

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    @cached_property
    def grammars(self) -> "GrammarCompiler":
        """Compiles grammars for this model's tokenizer."""
        from .grammar.compiler import GrammarCompiler
        from .text.tokenizer import Tokenizer

        def read_tokenizer() -> Tokenizer:
            return Tokenizer.from_pretrained(self._config.model, self._config.revision)

        return GrammarCompiler(read_tokenizer, self.runner.vocab_size, self.runner.eos_token_ids)

    @cached_property
    def images(self) -> "ImageEncoder | None":
        """Embeds images; None where the model does not see."""
        if self.runner.vision is None:
            return None
        from .vision.encoder import ImageEncoder

        return ImageEncoder(self.runner.vision)

    def add(self, message: AddRequest) -> None:
        """Admit a request. ValueError says, fit for the client to read, why it cannot be served. Waits for a grammar
        that is not compiled yet, and for images that are not encoded."""
        vocab_size = self.runner.vocab_size
        message.params.verify(vocab_size)
        pooling = message.params.pooling
        task = "generate" if pooling is None else pooling.task
        if task not in self._tasks:
            raise ValueError(f"this model does not {task}")
        prompt = message.prompt_token_ids
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"the prompt has token ids outside of 0 .. {vocab_size - 1}")
        seed = message.params.seed
        asked = message.params.structured_outputs
        grammar = None if asked is None else self.grammars.state(to_grammar(asked))
        self.scheduler.add(
            Request(
                request_id=message.request_id,
                prompt_token_ids=prompt,
                params=message.params,
                eos_token_ids=self._eos,
                seed=self._random.getrandbits(63) if seed is None else seed,
                arrival_time=message.arrival_time,
                extra_keys=(message.cache_salt,),
                images=self._images(message),
                grammar=grammar,
            )
        )

    def _images(self, message: AddRequest) -> tuple[ImageSpan, ...]:
        if not message.images:
            return ()
        if self.images is None:
            raise ValueError("this model does not see images")
        return self.images.spans(message.prompt_token_ids, message.images)

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Compute one batch, if there is any; the news of its requests, or of those of the step before. Raises only if
        the engine cannot go on."""
        batch = self.scheduler.schedule()
        if batch is None:
            if self._open is None and self.has_work:
                raise RuntimeError("requests are waiting, but none can be scheduled")
            return self._advance(None)
        try:
            launched = batch, self.runner.execute(batch)
        except Exception:
            return self._advance(None) + self._fail(batch)
        self.scheduler.launched(batch)
        outputs = self._advance(launched)
        return outputs if isinstance(launched[1], PendingStep) else outputs + self._advance(None)

    def check_idle(self) -> None:
        """RuntimeError if a block is still held although no request is left, or any other invariant is broken."""
        self.scheduler.check_integrity()

    def _advance(self, launched: _Launched | None) -> list[RequestOutput]:
        """`launched` is the open step now. Returns the news of the one that was, if one was."""
        before, self._open = self._open, launched
        if before is None:
            return []
        batch, result = before
        if isinstance(result, PendingStep):
            try:
                result = result.result()
            except Exception:
                return self._fail(batch)
        return self.scheduler.update(batch, result)

    def _fail(self, batch: ScheduledBatch) -> list[RequestOutput]:
        logger.exception("a step of %d requests failed", len(batch.items))
        error = "the engine failed while computing this request; its log has the cause"
        outputs = self.scheduler.update(
            batch, StepResult(errors={i.request.request_id: error for i in batch.items})
        )
        if self._open is None:  # else that step is the probe
            self._probe()
        return outputs

    def _probe(self) -> None:
        """Run one token through the model; raises what the runner raises if the device is beyond use."""
        probe = Request(
            "probe", [0], SamplingParams(max_tokens=1, temperature=0.0), self._eos, seed=0
        )
        if not self.scheduler.kv_cache.admit(
            probe, num_cached=0, end=1
        ):  # the next step is the probe
            return
        try:
            result = self.runner.execute(ScheduledBatch([ScheduledRequest(probe, 0, 1)]))
            if isinstance(result, PendingStep):
                result.result()
        finally:
            self.scheduler.kv_cache.free(probe)


def _load_runner(config: EngineConfig, progress: Callable[[str], None] | None) -> RunnerProtocol:
    from .runner import Runner  # torch is imported here, and only where the model really is loaded

    return Runner(config, progress)
