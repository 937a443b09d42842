"""What a backend is: the same questions and the same calls for all of them.

    features, why_not   what of a model it computes; what it does not list is refused, in words
    load                consecutive layers of a model, as a Decoder with weights in the backend's own layout
    Decoder             new_cache; forward: tokens (or hidden states) in, hidden states out; logits; sample

A model is one Decoder, or a chain of them (runs.py) where no fast backend takes all of its layers. The first embeds the
tokens; the last gives *normed* hidden states and has the output head.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...architectures.base import LayerSpec, ModelSpec, features
from ...kernels.select import Choice
from ...kernels.spec import LinearSpec
from ...quant.checkpoint import Checkpoint
from ..config import EngineConfig
from ..request import Request
from ..sampler import sample
from ..scheduling.batch import PendingStep, StepResult
from .batch import Batch

Progress = Callable[[int], None]  # told the index of each layer that was loaded


class Cache(Protocol):
    """Keys and values of a decoder's layers, in blocks, and recurrent states, in slots."""

    def clear(self, blocks: Sequence[list[int]], state_slot: int | None) -> None:
        """Zero what a failed request may have left NaN in. blocks: of each KV group."""
        ...


@dataclass(slots=True)
class KernelReport:
    """Which kernels the linears got, and why better ones were refused (one reason a kernel is enough to act on)."""

    used: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, spec: LinearSpec, choice: Choice) -> None:
        self.used[choice.kernel.name] += 1
        if spec.kind != "dense":
            for name, reason in choice.refused:
                self.refused.setdefault(name, reason)

    def merge(self, other: "KernelReport") -> None:
        self.used.update(other.used)
        self.refused = other.refused | self.refused


class Decoder(Protocol):
    """Consecutive layers of a model with their weights."""

    overlaps: bool  # `forward` and `sample` only launch work: the host looks at no hidden states
    looks_ahead: bool  # attention follows Batch.last_seen

    @property
    def report(self) -> KernelReport: ...

    @property
    def weight_bytes(self) -> int:
        """Of weights in memory, mapped ones included."""
        ...

    def new_cache(self, num_blocks: Sequence[int], num_states: int = 1) -> Any:
        """A Cache of its own kind. num_blocks: of each KV group, or one number for one group of all layers; num_states:
        of requests and snapshots, where layers have recurrent states."""
        ...

    def forward(self, batch: Batch, cache: Any, hidden: Tensor | None = None) -> Tensor:
        """Compute the batch's tokens, writing their keys, values and states to `cache`, which this decoder made. hidden
        [T, hidden_size]: what the layers before gave; the first decoder embeds the tokens instead. Returns [T,
        hidden_size]; of the last decoder, normed."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [R, hidden_size] of what the last decoder gave -> float32 [R, vocab_size]."""
        ...

    def sample(
        self, logits: Tensor, requests: list[Request], result: StepResult
    ) -> StepResult | PendingStep:
        """One token for each row of logits, which it may change, written into `result`; or the promise of that."""
        ...

    def warm_up(self, cache: Any, max_model_len: int) -> None:
        """Before the first request: compile and record whatever requests would have to wait for."""
        ...


class HostSampling:
    """What decoders share whose logits the host reads: sampling there, and nothing to warm up."""

    __slots__ = ()
    overlaps = False

    def sample(
        self, logits: Tensor, requests: list[Request], result: StepResult
    ) -> StepResult | PendingStep:
        sample(logits, requests, result)
        return result

    def warm_up(self, cache: Any, max_model_len: int) -> None:
        """Nothing: all of it is compiled."""


class Backend(Protocol):
    """A way to compute decoder layers, on one device in one dtype."""

    name: str
    features: frozenset[str]  # of architectures.base.features

    def unavailable(self) -> str | None:
        """None if it runs on this device with these options, else why not and what would help."""
        ...

    def why_not(self, layer: LayerSpec, model: ModelSpec) -> str | None:
        """None if it computes this layer of the model, else the first thing it does not do."""
        ...

    def load(
        self, checkpoint: Checkpoint, model: ModelSpec, layers: range, progress: Progress
    ) -> Decoder: ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model is computed: what a backend is made with."""

    config: EngineConfig
    dtype: torch.dtype
    device: torch.device


def unknown_feature(known: frozenset[str], layer: LayerSpec, model: ModelSpec) -> str | None:
    """The first thing that a layer and its model ask for and a backend does not list, in words."""
    missing = sorted((features(layer) | features(model)) - known)
    return f"does not compute {missing[0]}" if missing else None
