"""Sampling on the device: what `sampler.py` computes, by the kernels of kernels/sampling, without a host wait.

    logits -> grammars, logit_bias, min_tokens -> penalties, temperature, filters, race -> tokens, still on the device

Penalties need to know what a request has said. A row of `state` holds that for each request that asks for them: filled
from its tokens once, then kept by the kernel. Rows are taken back from requests that are gone or not in the step.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....kernels.sampling import sample as kernels
from ...grammar import masking
from ...request import Request
from ...sampler import NOT_FINITE, is_penalized, stop_ids_forbidden
from ...scheduling.batch import StepResult
from .batch import SampledTokens
from .transfer import to_device


@dataclass(slots=True)
class DeviceStep:
    """A PendingStep: tokens on their way to the host."""

    requests: list[Request]
    positions: list[int]  # of the tokens, in each request's output
    tokens: Tensor  # int64 [B], pinned where `done` is given; -1: the logits were not numbers
    done: "torch.cuda.Event | None"
    step: StepResult

    def result(self) -> StepResult:
        requests, self.requests = self.requests, []
        if not requests:  # it has been asked for before
            return self.step
        if self.done is not None:
            self.done.synchronize()
        rows = zip(requests, self.positions, self.tokens.tolist(), strict=True)
        for request, position, token in rows:
            if token < 0:
                self.step.errors.setdefault(request.request_id, NOT_FINITE)
            else:
                self.step.tokens[request.request_id] = [token]
                masking.accept(request, token, position, self.step)
        return self.step


class DeviceSampler:
    """Chooses tokens for requests that want no log-probabilities."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self.previous: SampledTokens | None = None  # of the last step
        self._max_rows = max_num_seqs
        self._last: DeviceStep | None = None
        # request -> its row of `_state`, tokens that row has taken in
        self._rows: WeakKeyDictionary[Request, tuple[int, int]] = WeakKeyDictionary()
        self._state: Tensor | None = None  # made when somebody first asks for penalties

    def launch(self, logits: Tensor, requests: list[Request], step: StepResult) -> DeviceStep:
        """One token per row of logits (float32 [B, vocab]; changed in place)."""
        self._constrain(logits, requests, step)
        self._add_biases(logits, requests)
        if any(request.params.temperature > 0 or is_penalized(request) for request in requests):
            tokens = kernels.sample(logits, self._sampling_rows(requests))
        else:
            tokens = kernels.greedy(logits)
        rows = {request.request_id: row for row, request in enumerate(requests)}
        self.previous = SampledTokens(tokens.clamp(min=0), rows)
        host, done = tokens, None
        if self.device.type == "cuda":
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        positions = [request.num_output_tokens for request in requests]
        self._last = DeviceStep(requests, positions, host, done, step)
        return self._last

    def _constrain(self, logits: Tensor, requests: list[Request], step: StepResult) -> None:
        """What a grammar does not allow next becomes impossible. Which that is follows from the token before, for which
        the host waits here, while the device is busy with this step's layers."""
        if all(request.grammar is None for request in requests):
            return
        if self._last is not None:
            self._last.result()
        found = masking.masks(requests, logits.shape[1], step)
        if found is not None:
            rows, bitmask = found
            kernels.apply_bitmask(
                logits,
                to_device(rows, torch.int64, self.device),
                to_device(bitmask, torch.int32, self.device),
            )

    def _add_biases(self, logits: Tensor, requests: list[Request]) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        biases: list[float] = []
        for row, request in enumerate(requests):
            bias = dict(request.params.logit_bias or {}) | dict.fromkeys(
                stop_ids_forbidden(request), float("-inf")
            )
            rows += [row] * len(bias)
            tokens += bias.keys()
            biases += bias.values()
        if rows:
            kernels.add_bias(
                logits,
                to_device(rows, torch.int64, self.device),
                to_device(tokens, torch.int64, self.device),
                to_device(biases, torch.float32, self.device),
            )

    def _sampling_rows(self, requests: list[Request]) -> kernels.SamplingRows:
        asked = [request.params for request in requests]
        filters = [[p.temperature, max(0, p.top_k), p.top_p, p.min_p] for p in asked]
        keys = [kernels.race_key(request.seed, request.num_tokens) for request in requests]
        of_all = (
            to_device(filters, torch.float32, self.device),
            to_device(keys, torch.int32, self.device),
        )
        if not any(is_penalized(request) for request in requests):
            return kernels.SamplingRows(*of_all)
        penalties = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in asked]
        state_rows = [
            self._row(request, requests) if is_penalized(request) else -1 for request in requests
        ]
        return kernels.SamplingRows(
            *of_all,
            to_device(penalties, torch.float32, self.device),
            to_device(state_rows, torch.int32, self.device),
            self._state,
        )

    def _row(self, request: Request, requests: list[Request]) -> int:
        """The state row that knows the request's tokens; the kernel adds the one that is chosen now."""
        if self._state is None:
            self._state = kernels.new_state(self._max_rows, self.vocab_size, self.device)
        row, known = self._rows.get(request, (-1, 0))
        if known != request.num_tokens:
            row = row if row >= 0 else self._free_row(requests)
            kernels.record(
                self._state,
                row,
                to_device(request.prompt_token_ids, torch.int64, self.device),
                to_device(request.output_token_ids, torch.int64, self.device),
            )
        self._rows[request] = row, request.num_tokens + 1
        return row

    def _free_row(self, requests: list[Request]) -> int:
        free = set(range(self._max_rows)).difference(row for row, _ in self._rows.values())
        if free:
            return free.pop()
        return self._rows.pop(next(holder for holder in self._rows if holder not in requests))[0]
