"""EncoderCore: the engine's loop body for encoders. A step takes the texts that have waited longest, as many as the
token budget lets in, computes them whole and is done with them.

    add -> waiting [ t1 t2 t3 | t4 ... ] -> one batch, of any lengths (batch.py) -> RequestOutputs

There is no cache, so nothing is planned and nothing can be preempted; a text that alone is longer than the budget is
a step of its own (of a minute, on a small machine: the watchdog sees that it computes). A step that fails takes down
the texts that were in it and nobody else, provided that the device still computes: one token is run as a probe, and
only if that fails too is the engine given up.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from ..config import EngineConfig
from ..messages import AddRequest, EngineStats, Ready, RequestOutput
from ..pooling import Pooling
from ..request import FinishReason
from ..sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class EncoderRunnerProtocol(Protocol):
    """What the loop asks of the device side: `runner.EncoderRunner`, or a fake in tests."""

    max_model_len: int
    vocab_size: int
    task: Literal["embed", "score"]

    def ready(self) -> Ready: ...

    def execute(
        self, texts: Sequence[list[int]], asked: Sequence[Pooling]
    ) -> Sequence[bytes | None]:
        """What each is, little-endian float32; None for one that is not finite."""
        ...


class EncoderCore:
    """The queue and the runner of one encoder."""

    grammars = None
    images = None

    def __init__(
        self,
        config: EngineConfig,
        runner: EncoderRunnerProtocol | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        """Loads the model unless a runner is given. UserError on bad input."""
        self.runner = _load_runner(config, progress) if runner is None else runner
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.waiting: dict[str, AddRequest] = {}  # in order of arrival
        self._step_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def ready(self) -> Ready:
        return self.runner.ready()

    def stats(self) -> EngineStats:
        return EngineStats(num_waiting=len(self.waiting), step_tokens=self._step_tokens)

    def add(self, message: AddRequest) -> None:
        """Queue a text. ValueError says, fit for the client to read, why it cannot be served."""
        runner, prompt = self.runner, message.prompt_token_ids
        pooling = message.params.pooling
        if pooling is None or pooling.task != runner.task:
            raise ValueError(f"this model is an encoder, asked for anything but {runner.task}")
        if message.request_id in self.waiting:
            raise ValueError(f"request id {message.request_id!r} is already in use")
        if not prompt:
            raise ValueError("the text is empty")
        if len(prompt) > runner.max_model_len:
            raise ValueError(f"the text has {len(prompt)} tokens, more than {runner.max_model_len}")
        if not 0 <= min(prompt) <= max(prompt) < runner.vocab_size:
            raise ValueError(f"the text has token ids outside of 0 .. {runner.vocab_size - 1}")
        if not 0 <= pooling.second_part <= len(prompt):
            raise ValueError("the second part begins outside of the text")
        self.waiting[message.request_id] = message

    def abort(self, request_id: str) -> None:
        self.waiting.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        """Compute one batch, if there is any. Raises only if the engine cannot go on."""
        batch = self._next()
        self._step_tokens = sum(len(each.prompt_token_ids) for each in batch)
        if not batch:
            return []
        try:
            found = self._execute([(m.prompt_token_ids, m.params) for m in batch])
        except Exception:
            logger.exception("a step of %d texts failed", len(batch))
            self._execute([([0], SamplingParams(pooling=Pooling(task=self.runner.task)))])
            error = "the engine failed while computing this request; its log has the cause"
            return [_failed(message, error) for message in batch]
        return [
            RequestOutput(message.request_id, finish_reason=FinishReason.STOP, embedding=vector)
            if vector is not None
            else _failed(message, "the model's result for this text is not finite")
            for message, vector in zip(batch, found, strict=True)
        ]

    def check_idle(self) -> None:
        """Nothing is held."""

    def _execute(self, texts: list[tuple[list[int], SamplingParams]]) -> Sequence[bytes | None]:
        asked = [params.pooling or Pooling() for _, params in texts]
        return self.runner.execute([tokens for tokens, _ in texts], asked)

    def _next(self) -> list[AddRequest]:
        """The oldest, at least one, of no more tokens than the budget."""
        batch: list[AddRequest] = []
        room = self.max_num_batched_tokens
        for message in self.waiting.values():
            room -= len(message.prompt_token_ids)
            if batch and room < 0:
                break
            batch.append(message)
        for message in batch:
            del self.waiting[message.request_id]
        return batch


def _failed(message: AddRequest, error: str) -> RequestOutput:
    return RequestOutput(message.request_id, finish_reason=FinishReason.ERROR, error=error)


def _load_runner(
    config: EngineConfig, progress: Callable[[str], None] | None
) -> EncoderRunnerProtocol:
    from .runner import EncoderRunner  # torch is imported here, and only to load a model

    return EncoderRunner(config, progress)
