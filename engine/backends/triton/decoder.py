"""Consecutive layers from Triton's kernels, nine or ten launches a layer (kernels/fused lists them).

x [T, hidden] runs through the layers as `residual`, which every norm adds to and reads in one launch:

    residual = embedding             h = input norm(residual)
    qkv -> (q, k norms), RoPE, K and V to their pages -> paged attention -> o
    residual += (norm of) o          h = mlp norm(residual)
    gate_up -> act(gate) * up -> down
    residual += (norm of) down       h = next layer's input norm(residual), or the final norm

Steps of decodes alone are replayed from CUDA graphs (graphs.py), others are launched as they come. Tokens are sampled
on the device, and the next step may be launched before the host knows them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Attention
from ....kernels.attention.cache import PagedCache, allocate_scales
from ....kernels.attention.paged import AttentionSpec, PagedBatch, paged_attention
from ....kernels.fused.norm import rms_norm
from ....kernels.fused.rope import rope_and_cache
from ...config import EngineConfig
from ...request import Request
from ...sampler import sample
from ...scheduling.batch import PendingStep, StepResult
from ..base import KernelReport
from ..batch import Batch
from ..torch.decoder import TorchDecoder
from ..torch.layers import RMSNorm, position_factors, scaled, soft_cap
from ..torch.mixers import TorchAttention
from .batch import DeviceBatch, StaticBatch, upload
from .feed_forward import feed_forward
from .graphs import CudaRecorder, DecodeGraphs, Record
from .sampler import DeviceSampler

_CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_WARM_UP_TOKENS = (16, 32, 64, 128, 512)


@dataclass(slots=True)
class TritonCache:
    """Keys and values of each layer, [num_kv_heads, num_blocks, block_size, head_dim]; in 8 bits with a float32 scale
    for each token and head."""

    layers: list[PagedCache]
    block_size: int

    @classmethod
    def allocate(
        cls,
        mixers: list[Attention],
        num_blocks: int,
        config: EngineConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "TritonCache":
        stored = _CACHE_DTYPES.get(config.kv_cache_dtype, dtype)
        bits8 = stored.itemsize == 1

        def layer(mixer: Attention) -> PagedCache:
            shape = (2, mixer.num_kv_heads, num_blocks, config.block_size, mixer.head_dim)
            zeros = torch.zeros(shape, dtype=torch.uint8 if bits8 else stored, device=device)
            keys, values = zeros.view(stored)
            scales = [
                allocate_scales(num_blocks, config.block_size, mixer.num_kv_heads, device)
                if bits8
                else None
                for _ in range(2)
            ]
            return PagedCache(keys, values, *scales)

        return cls([layer(mixer) for mixer in mixers], config.block_size)

    def clear(self, blocks: list[int], state_slot: int | None) -> None:
        """Nothing: the attention kernel never reads behind a request's last token."""


@dataclass(frozen=True, slots=True)
class _Captured:
    """Decode steps over one cache, for the limits of one engine."""

    graphs: DecodeGraphs
    static: StaticBatch
    cache: TritonCache


class TritonDecoder:
    """The weights of a TorchDecoder, run by the kernels."""

    overlaps = True

    def __init__(self, weights: TorchDecoder, config: EngineConfig):
        self.weights, self.config, self.model = weights, config, weights.model
        self.dtype, self.device = weights.dtype, weights.device
        self.sampler = DeviceSampler(self.model.vocab_size, config.max_num_seqs, self.device)
        self.captured: _Captured | None = None

    @property
    def report(self) -> KernelReport:
        return self.weights.report

    @property
    def weight_bytes(self) -> int:
        return self.weights.weight_bytes

    def new_cache(self, num_blocks: int, num_states: int = 1) -> TritonCache:
        specs = [layer.spec.mixer for layer in self.weights.layers]
        mixers = [mixer for mixer in specs if isinstance(mixer, Attention)]
        return TritonCache.allocate(mixers, num_blocks, self.config, self.dtype, self.device)

    def warm_up(self, cache: TritonCache, max_model_len: int) -> None:
        """Prompts of each size that the products have a path of their own for, then graphs of decode steps. Compiled
        kernels stay on disk, so this takes seconds once and milliseconds from then on."""
        for tokens in _WARM_UP_TOKENS:
            count = min(tokens, self.config.max_num_batched_tokens, max_model_len)
            batch = Batch.of_one([1] * count, cache.block_size)
            self.forward(batch, self.new_cache(batch.num_blocks))
        self.capture(CudaRecorder(self.device), cache, max_model_len)

    def capture(self, record: Record, cache: TritonCache, max_model_len: int) -> None:
        """From now on, steps of decodes over `cache` come from graphs."""
        capacity = self.config.max_num_seqs
        static = StaticBatch(
            capacity, -(-max_model_len // cache.block_size), cache.block_size, self.device
        )
        graphs = DecodeGraphs(
            capacity, record, lambda size: self._hidden_states(static.view(size), cache)
        )
        self.captured = _Captured(graphs, static, cache)

    def forward(self, batch: Batch, cache: TritonCache, hidden: Tensor | None = None) -> Tensor:
        """As Decoder.forward; what comes from a graph is overwritten by its next replay."""
        replayed = self._replayed(batch, cache) if hidden is None else None
        if replayed is not None:
            return replayed
        return self._hidden_states(upload(batch, self.sampler.previous, self.device), cache, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.weights.head is None:
            raise ValueError("these are not the model's last layers")
        logits = scaled(self.weights.head(hidden).float(), self.model.logits_scale)
        return soft_cap(logits, self.model.final_soft_cap)

    def sample(
        self, logits: Tensor, requests: list[Request], result: StepResult
    ) -> StepResult | PendingStep:
        """On the device whatever it can; a step with a request that wants log-probabilities is waited for."""
        here = [row for row, request in enumerate(requests) if _wants_logprobs(request)]
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
        size = captured.graphs.size_for(len(batch))
        if size is None:
            return None
        captured.static.load(batch, size, self.sampler.previous)
        hidden = captured.graphs.replay(size)
        return None if hidden is None else hidden[: len(batch)]

    def _hidden_states(
        self, batch: DeviceBatch, cache: TritonCache, hidden: Tensor | None = None
    ) -> Tensor:
        weights, eps, scale = self.weights, self.model.norm_eps, self.model.residual_scale
        given = None if hidden is None else hidden.to(self.device, self.dtype, copy=True)
        residual = self._embed(batch) if given is None else given  # norms add to it
        paged = PagedBatch(
            batch.tables,
            batch.starts,
            batch.lengths,
            batch.num_decodes,
            max_context=batch.tables.shape[1] * cache.block_size,
        )
        h = rms_norm(residual.clone(), _needed(weights.layers[0].before_mixer), eps)
        following = [layer.before_mixer for layer in weights.layers[1:]] + [weights.norm]
        for layer, pages, next_norm in zip(weights.layers, cache.layers, following, strict=True):
            if not isinstance(layer.mixer, TorchAttention):
                raise TypeError(f"{layer.spec.mixer} was refused, and is loaded")
            mixed = scaled(self._attention(layer.mixer, h, batch, pages, paged), scale)
            after = _weight(layer.after_mixer)
            h = rms_norm(mixed, _needed(layer.before_mlp), eps, residual, post_weight=after)
            mixed, after_mlp = scaled(feed_forward(layer.mlp, h), scale), layer.after_mlp
            if next_norm is None:  # more layers follow elsewhere
                return residual + (mixed if after_mlp is None else after_mlp(mixed))
            h = rms_norm(mixed, next_norm.weight, eps, residual, post_weight=_weight(after_mlp))
        return h

    def _embed(self, batch: DeviceBatch) -> Tensor:
        if self.weights.embedding is None:
            raise ValueError("these are not the model's first layers")
        x = F.embedding(batch.token_ids, self.weights.embedding)
        if self.model.embedding_scale != 1.0:
            x = x * torch.tensor(self.model.embedding_scale, dtype=x.dtype)
        return x

    def _attention(
        self,
        mixer: TorchAttention,
        hidden: Tensor,
        batch: DeviceBatch,
        cache: PagedCache,
        paged: PagedBatch,
    ) -> Tensor:
        spec = mixer.spec
        heads = spec.num_heads
        qkv = mixer.qkv(hidden).view(-1, heads + 2 * spec.num_kv_heads, spec.head_dim)
        if spec.query_scaling is not None:  # a rotation keeps it
            factors = position_factors(batch.positions, spec.query_scaling)
            qkv[:, :heads] *= factors.to(qkv)
        table = self.weights.ropes[spec.rope, spec.head_dim]
        rope_and_cache(
            qkv,
            heads,
            table.cos,
            table.sin,
            batch.positions,
            batch.slots,
            cache,
            q_weight=_weight(mixer.q_norm),
            k_weight=_weight(mixer.k_norm),
            eps=self.model.norm_eps,
        )
        how = AttentionSpec(spec.scale, spec.window, spec.soft_cap, mixer.sinks)
        return mixer.o(paged_attention(qkv[:, :heads], cache, paged, how).flatten(1))


def _needed(norm: RMSNorm | None) -> Tensor:
    if norm is None:
        raise ValueError("a layer that why_not refuses")
    return norm.weight


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _wants_logprobs(request: Request) -> bool:
    return request.params.logprobs is not None or request.params.prompt_logprobs is not None
