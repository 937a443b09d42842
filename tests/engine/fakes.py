"""A runner without a model: the next token is a hash of all tokens so far.

It keeps a KV cache of its own in which every block slot remembers the token that was computed there, and looks at a
request's history only through the blocks in its tables: at all of it in a group of full attention, in a group with a
window at what the window shows. So a block that was released or freed too early, shared wrongly or evicted while in
use is an error here, as it would be wrong tokens with a real model.

With a rope_switch, a slot also remembers whether the request was long when its token was computed.

With max_new_tokens > 1 a step may give several tokens, as if drafts had been verified: all but the last are computed
then, too, so there are at most as many as the request's blocks have room for.

    python tests/engine/fakes.py --fd N      the engine process with this runner in place of a model
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import Ready, TokenLogprobs
from nibble.engine.request import UNKNOWN, Request
from nibble.engine.scheduling.batch import ScheduledBatch, ScheduledRequest, StepResult
from nibble.engine.scheduling.kv_cache_manager import RELEASED, KVGroup
from nibble.errors import UserError

VOCAB_SIZE = 512
EOS = 7


def next_token(history: list[int], vocab_size: int = VOCAB_SIZE) -> int:
    digest = hashlib.sha256(",".join(map(str, history)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % vocab_size


class FakeRunner:
    eos_token_ids = [EOS]
    vision = None

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 64,
        step_seconds: float = 0.0,
        vocab_size: int = VOCAB_SIZE,
        max_new_tokens: int = 1,
        windows: Sequence[KVGroup] = (),
        num_states: int = 0,
        rope_switch: int | None = None,
    ):
        """One group of num_blocks blocks of full attention, and `windows` beside it; num_states slots, if any."""
        self.num_states, self.rope_switch = num_states, rope_switch
        self.states: list[list[int]] = [[] for _ in range(num_states)]  # tokens gone through
        self.kv_groups = [KVGroup(num_blocks), *windows]
        self.block_size, self.max_model_len = block_size, max_model_len
        self.vocab_size = vocab_size
        self.step_seconds, self.max_new_tokens = step_seconds, max_new_tokens
        self.slots = [
            [[(-1, False)] * block_size for _ in range(group.num_blocks)]
            for group in self.kv_groups
        ]
        self.fail_next = 0  # steps that raise
        self.nan_ids: set[str] = set()  # requests whose logits come out as NaN
        self.batches: list[list[tuple[str, int, int]]] = []

    def ready(self) -> Ready:
        return Ready(
            self.max_model_len,
            self.vocab_size,
            self.eos_token_ids,
            self.kv_groups[0].num_blocks,
            self.block_size,
            "float32",
            "fake",
            "none",
            {},
            {},
            tasks=("generate", "embed"),
        )

    def execute(self, batch: ScheduledBatch) -> StepResult:
        time.sleep(self.step_seconds)
        self.batches.append(
            [(item.request.request_id, item.start, item.end) for item in batch.items]
        )
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the device is on fire")
        result = StepResult()
        for item in batch.items:
            self._compute(item, result)
        return result

    def _compute(self, item: ScheduledRequest, result: StepResult) -> None:
        request = item.request
        for position in range(item.start, item.end):
            self._write(request, position, request.token_ids[position])
        self._look(request, item.start, request.token_ids[: item.end])
        if self.num_states:
            self._carry_state(item)
        if request.params.prompt_logprobs is not None:
            scored = request.prompt_token_ids[item.start + 1 : item.end + 1]
            result.prompt_logprobs[request.request_id] = [
                TokenLogprobs(t, -1.0, 1, [], []) for t in scored
            ]
        if request.request_id in self.nan_ids:
            result.errors[request.request_id] = "the logits are not finite"
        elif request.params.pooling is not None:
            self._pool(item, result)
        elif item.samples:
            tokens = self._sample(request, item.start, item.end)
            result.tokens[request.request_id] = tokens
            result.logprobs[request.request_id] = [
                TokenLogprobs(t, -0.5, 1, [], []) for t in tokens
            ]

    def _pool(self, item: ScheduledRequest, result: StepResult) -> None:
        """A prompt's embedding is the prompt, as far as all of it was computed since it last began."""
        request = item.request
        before = [] if item.start == 0 else request.pooled
        request.pooled = before + request.token_ids[item.start : item.end]
        if item.samples:
            result.embeddings[request.request_id] = bytes(request.pooled)

    def _carry_state(self, item: ScheduledRequest) -> None:
        """AssertionError unless the state that it goes on from is that of its tokens so far."""
        request = item.request
        source = request.state_slot if item.state_from is None else item.state_from
        state = self.states[source] if item.start else []
        if state != request.token_ids[: item.start]:
            raise AssertionError(f"the state at {item.start} is that of {state}")
        for position, slot in [*item.snapshots, (item.end, request.state_slot)]:
            if not item.start < position <= item.end:
                raise AssertionError(f"no state at {position} in {item.start} .. {item.end}")
            self.states[slot] = request.token_ids[:position]

    def _sample(self, request: Request, start: int, end: int) -> list[int]:
        tokens = request.token_ids[:end]
        tokens.append(next_token(tokens, self.vocab_size))
        room = min(map(len, request.block_tables)) * self.block_size - end
        for position in range(end, end + min(room, tokens[-1] % self.max_new_tokens)):
            self._write(request, position, tokens[-1])
            self._look(request, start, tokens)
            tokens.append(next_token(tokens, self.vocab_size))
        if self.num_states:
            self.states[request.state_slot] = tokens[:-1]
        return tokens[end:]

    def _is_long(self, request: Request) -> bool:
        return self.rope_switch is not None and request.num_tokens > self.rope_switch

    def _write(self, request: Request, position: int, token: int) -> None:
        kept = token, self._is_long(request)
        for slots, table in zip(self.slots, request.block_tables, strict=True):
            slots[_block(table, position, self.block_size)][position % self.block_size] = kept

    def _look(self, request: Request, start: int, tokens: list[int]) -> None:
        """AssertionError unless the caches hold `tokens`, as far as the queries from `start` on see them."""
        size = self.block_size
        for group, slots, table in zip(
            self.kv_groups, self.slots, request.block_tables, strict=True
        ):
            first = 0 if group.window is None else max(0, start - group.window + 1)
            for position in range(first, len(tokens)):
                found = slots[_block(table, position, size)][position % size]
                wanted = tokens[position], self._is_long(request)
                if found != wanted:
                    raise AssertionError(f"position {position} holds {found}, not {wanted}")


def _block(table: list[int], position: int, size: int) -> int:
    block = table[position // size]
    if block == RELEASED:
        raise AssertionError(f"position {position} is asked for, and its block is released")
    return block


class ComputingRunner(FakeRunner):
    """Its steps use the CPU, as those of a model do."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        end = time.process_time() + self.step_seconds
        while time.process_time() < end:
            pass
        self.step_seconds, seconds = 0.0, self.step_seconds
        try:
            return super().execute(batch)
        finally:
            self.step_seconds = seconds


@dataclass
class FakePending:
    step: StepResult
    fails: bool

    def result(self) -> StepResult:
        if self.fails:
            raise RuntimeError("the device is on fire")
        return self.step


class OverlappingRunner(FakeRunner):
    """Hands results out late, as a GPU does: what the last step sampled, it knows itself, and the host does not yet.
    It fails late, too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampled: dict[str, int] = {}

    def execute(self, batch: ScheduledBatch) -> FakePending:
        fails, self.fail_next = self.fail_next > 0, max(0, self.fail_next - 1)
        unknown = [
            (item.request, self.sampled.get(item.request.request_id, 0))
            for item in batch.items
            if item.request.token_ids[-1] == UNKNOWN
        ]
        for request, token in unknown:
            request.token_ids[-1] = token
        result = super().execute(batch)
        for request, _ in unknown:
            request.token_ids[-1] = UNKNOWN
        self.sampled = {name: tokens[0] for name, tokens in result.tokens.items()}
        return FakePending(result, fails)


def make_core(config: EngineConfig) -> EngineCore:
    """`config.model` says how this engine behaves: "good", "slow", "bad-input", "defect", "dies", "hangs" (in its
    first step), "computes" (for a second of CPU time)."""
    if config.model == "bad-input":
        raise UserError("model.safetensors: is truncated (download it again)")
    if config.model == "defect":
        raise KeyError("something nobody thought of")
    if config.model == "dies":
        sys.exit(9)
    if config.model == "computes":
        return EngineCore(config, ComputingRunner(step_seconds=1.0))
    seconds = {"slow": 0.02, "hangs": 3600.0}.get(config.model, 0.0)
    return EngineCore(config, FakeRunner(step_seconds=seconds))


if __name__ == "__main__":
    from nibble.engine.process import main

    sys.exit(main(make_core=make_core))
