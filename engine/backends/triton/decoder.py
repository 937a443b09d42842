"""Consecutive layers from Triton's kernels, nine or ten launches for most (kernels/fused lists them).

x [T, hidden] runs through the layers as a `Residual`, which every norm adds to and reads in one launch:

    h = input norm(x) -> mixer (mixers.py)     x += (norm of) its output
    h = mlp norm(x)   -> feed-forward          x += (norm of) its output
    ...                                        the final norm of x

A layer may lack any of these, norms too; what some models have beside them (inputs for each layer, a scalar) is
computed by torch's operators in between.

Steps of decodes alone are replayed from CUDA graphs (graphs.py), others are launched as they come. Tokens are sampled
on the device, and the next step may be launched before the host knows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import EngineConfig
from ...request import Request
from ...sampler import is_filtered, sample
from ...scheduling.batch import PendingStep, StepResult
from ..base import KernelReport
from ..batch import Batch
from ..images import with_images
from ..kv_groups import layer_groups
from ..torch.decoder import TorchDecoder, TorchLayer
from ..torch.layers import scaled, soft_cap
from .batch import BatchForm, DeviceBatch, StaticBatch, upload
from .cache import TritonCache
from .feed_forward import feed_forward, warm_up_tokens
from .graphs import CudaRecorder, DecodeGraphs, Record
from .mixers import Step, joined_tables, mix
from .residual import Residual
from .sampler import DeviceSampler

_WARM_UP_TOKENS = (16, 32, 64, 128, 512)


@dataclass(frozen=True, slots=True)
class _Captured:
    """Decode steps over one cache, for the limits of one engine."""

    graphs: DecodeGraphs
    static: StaticBatch
    cache: TritonCache


class TritonDecoder:
    """The weights of a TorchDecoder, run by the kernels."""

    overlaps, looks_ahead = True, False

    def __init__(self, weights: TorchDecoder, config: EngineConfig):
        self.weights, self.config, self.model = weights, config, weights.model
        self.dtype, self.device = weights.dtype, weights.device
        self.sampler = DeviceSampler(self.model.vocab_size, config.max_num_seqs, self.device)
        self.captured: _Captured | None = None
        self.ropes, long = joined_tables(weights.ropes)
        has_states = any(layer.spec.state_shapes for layer in weights.layers)
        self.form = BatchForm(has_states, long)

    @property
    def report(self) -> KernelReport:
        return self.weights.report

    @property
    def weight_bytes(self) -> int:
        return self.weights.weight_bytes

    def new_cache(self, num_blocks: Sequence[int], num_states: int = 1) -> TritonCache:
        specs = [layer.spec for layer in self.weights.layers]
        groups = layer_groups(self.model, specs, len(num_blocks))
        return TritonCache.allocate(
            specs, groups, num_blocks, num_states, self.config, self.dtype, self.device
        )

    def warm_up(self, cache: TritonCache, max_model_len: int) -> None:
        """Prompts of each size that the products have a path of their own for, then graphs of decode steps. Compiled
        kernels stay on disk, so this takes seconds once and milliseconds from then on."""
        most = min(self.config.max_num_batched_tokens, max_model_len)
        mlps = [layer.mlp for layer in self.weights.layers]
        lengths = {*_WARM_UP_TOKENS, *warm_up_tokens(mlps)}
        for count in sorted({min(length, most) for length in lengths}):
            batch = Batch.of_one([1] * count, cache.block_size)
            self.forward(batch, self.new_cache([batch.num_blocks]))
        self.capture(CudaRecorder(self.device), cache, max_model_len)

    def capture(self, record: Record, cache: TritonCache, max_model_len: int) -> None:
        """From now on, steps of decodes over `cache` come from graphs."""
        capacity, max_blocks = self.config.max_num_seqs, -(-max_model_len // cache.block_size)
        groups = cache.num_groups
        static = StaticBatch(capacity, max_blocks, cache.block_size, self.device, self.form, groups)
        graphs = DecodeGraphs(
            capacity, record, lambda size: self._hidden_states(static.view(size), cache)
        )
        self.captured = _Captured(graphs, static, cache)

    def forward(self, batch: Batch, cache: TritonCache, hidden: Tensor | None = None) -> Tensor:
        """As Decoder.forward; what comes from a graph is overwritten by its next replay."""
        has_images = bool(batch.given[0])
        replayed = None if has_images or hidden is not None else self._replayed(batch, cache)
        if replayed is not None:
            return replayed
        uploaded = upload(batch, self.sampler.previous, self.device, self.form, cache.num_groups)
        if has_images and hidden is None:
            hidden = with_images(self._embed(uploaded), batch)
        return self._hidden_states(uploaded, cache, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.weights.head is None:
            raise ValueError("these are not the model's last layers")
        logits = scaled(self.weights.head(hidden).float(), self.model.logits_scale)
        return soft_cap(logits, self.model.final_soft_cap)

    def sample(
        self, logits: Tensor, requests: list[Request], result: StepResult
    ) -> StepResult | PendingStep:
        """On the device whatever it can; a step with a request that wants log-probabilities, or filters that have no
        kernel, is waited for."""
        here = [row for row, request in enumerate(requests) if _is_sampled_here(request)]
        if not here:
            return self.sampler.launch(logits, requests, result)
        there = [row for row in range(len(requests)) if row not in here]
        sample(logits[here], [requests[row] for row in here], result)
        step = self.sampler.launch(logits[there], [requests[row] for row in there], result)
        return step.result()

    def _replayed(self, batch: Batch, cache: TritonCache) -> Tensor | None:
        """The hidden states from a graph; None where there is none for this step."""
        captured = self.captured
        if captured is None or cache is not captured.cache or batch.num_decodes < len(batch):
            return None
        graphs, static = captured.graphs, captured.static
        size = graphs.size_for(len(batch))
        if size is None:
            return None
        if not graphs.is_recorded(size):
            static.clear()  # a state that went through its tokens twice would be another
            if not graphs.record(size):
                return None
        static.load(batch, size, self.sampler.previous)
        return graphs.replay(size)[: len(batch)]

    def _hidden_states(
        self, batch: DeviceBatch, cache: TritonCache, hidden: Tensor | None = None
    ) -> Tensor:
        weights = self.weights
        x = self._embed(batch) if hidden is None else hidden.to(self.device, self.dtype, copy=True)
        told = None
        if weights.per_layer_inputs is not None:
            told = weights.per_layer_inputs(batch.token_ids, x)
        residual = Residual(x, self.model.residual_scale)
        step = Step.of(batch, cache, self.ropes, self.model.norm_eps)
        if weights.alt_up is not None:
            streams = weights.alt_up.start(x)
            for index, layer in enumerate(weights.layers):
                own = None if told is None else told[:, index]
                streams = _streams(layer, streams, residual, index, step, own)
            residual.become(weights.alt_up.end(streams))
            return residual.normed(weights.norm)
        for index, layer in enumerate(weights.layers):
            _compute(layer, residual, index, step)
            if layer.per_layer_input is not None and told is not None:
                x = residual.sum()
                residual.become(x + layer.per_layer_input(x, told[:, index]))
            if layer.scalar is not None:
                residual.become(residual.sum() * layer.scalar)
        return residual.normed(weights.norm)

    def _embed(self, batch: DeviceBatch) -> Tensor:
        if self.weights.embedding is None:
            raise ValueError("these are not the model's first layers")
        x = F.embedding(batch.token_ids, self.weights.embedding)
        if self.weights.embedding_norm is not None:
            x = self.weights.embedding_norm(x)
        if self.model.embedding_scale != 1.0:
            x = x * torch.tensor(self.model.embedding_scale, dtype=x.dtype)
        return x


def _compute(layer: TorchLayer, residual: Residual, index: int, step: Step) -> None:
    """Add what the layer's mixer and feed-forward give."""
    if layer.mixer is not None:
        h = residual.normed(layer.before_mixer)
        residual.add(mix(layer.mixer, h, index, step), layer.after_mixer)
        if layer.laurel is not None:
            residual.become((residual.sum() + layer.laurel(h)) * 2.0**-0.5)
    if layer.mlp is not None:
        h = residual.normed(layer.before_mlp)
        residual.add(feed_forward(layer.mlp, h), layer.after_mlp)


def _streams(
    layer: TorchLayer,
    streams: Tensor,
    residual: Residual,
    index: int,
    step: Step,
    told: Tensor | None,
) -> Tensor:
    """Streams of hidden states after a layer (architectures/alt_up.py), by torch's operators around the kernels."""
    alt_up = layer.alt_up
    if alt_up is None:
        raise ValueError("a layer that moves no streams along")
    predicted = alt_up.predict(streams)
    residual.become(predicted[alt_up.spec.active].clone())  # norms add to it
    _compute(layer, residual, index, step)
    streams = alt_up.correct(predicted, residual.sum())
    if layer.per_layer_input is not None and told is not None:
        streams[1:] += layer.per_layer_input(alt_up.told(streams), told)
    return streams if layer.scalar is None else streams * layer.scalar


def _is_sampled_here(request: Request) -> bool:
    params = request.params
    wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    return wants_logprobs or is_filtered(request)
