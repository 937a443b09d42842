"""The decoder of `decoder.py` as one call into the C++ kernels: token ids in, hidden states out.

The weights, norms and tables are handed over once, as plain arrays (kernels/cpu/abi.h); a step hands over its tokens,
what each request computes and its block table. The KV cache has the kernels' own layout (kernels/cpu/kv_cache.h):

    [num_layers, num_blocks, num_kv_heads, bytes]   keys and values of block_size tokens in bfloat16; or in int8, scales
"""

import ctypes
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....architectures.base import DecoderConfig
from ....kernels.cpu import library as lib
from ....kernels.cpu.library import NbBatch, NbLayer, NbModel, Pool
from ....kernels.cpu.prepared import Site, pointer
from ...config import EngineConfig
from ...scheduling.batch import ScheduledRequest
from ..torch.attention import zero_pages
from ..torch.layers import inverse_frequencies

_MAX_SHARED_HEADS, _MAX_HEAD_DIM, _MAX_WIDTH = (
    32,
    1024,
    65536,
)  # what the kernels' scratch memory holds


def why_not(
    config: DecoderConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """None if the C++ decoder can serve this model here, else the reason and what would help."""
    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {dtype}; serve with --dtype bfloat16"
    if reason := lib.why_missing():
        return reason
    if block_size % 16:
        return f"needs KV blocks of a multiple of 16 tokens, not {block_size}"
    shared = config.num_heads // config.num_kv_heads
    if config.head_dim % 16 or config.head_dim > _MAX_HEAD_DIM or shared > _MAX_SHARED_HEADS:
        return f"has no attention for {shared} heads of {config.head_dim} dimensions on one key-value head"
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if any(size % 16 or size > _MAX_WIDTH for size in sizes):
        return f"needs layers in multiples of 16 up to {_MAX_WIDTH}, not {sizes}"
    return None


@dataclass(slots=True)
class NativeLayer:
    """One layer's weights: norms float32, sites in the order q, k, v; o; gate, up; down."""

    input_norm: Tensor
    mlp_norm: Tensor
    qkv: Site
    o: Site
    gate_up: Site
    down: Site
    q_norm: Tensor | None
    k_norm: Tensor | None
    post_attention_norm: Tensor | None
    post_mlp_norm: Tensor | None

    def struct(self, rope: int, window: int | None) -> NbLayer:
        norms = (
            pointer(n)
            for n in (
                self.input_norm,
                self.mlp_norm,
                self.q_norm,
                self.k_norm,
                self.post_attention_norm,
                self.post_mlp_norm,
            )
        )
        sites = (site.struct() for site in (self.qkv, self.o, self.gate_up, self.down))
        return NbLayer(*norms, rope, window or 0, *sites)


@dataclass(slots=True)
class NativeCache:
    """Anonymous pages, so a block costs memory from its first use on."""

    blocks: Tensor  # uint8, shape as in the module's docstring
    int8: bool

    @classmethod
    def allocate(
        cls, config: DecoderConfig, num_blocks: int, block_size: int, int8: bool
    ) -> "NativeCache":
        vector = config.head_dim + 4 if int8 else 2 * config.head_dim
        shape = (config.num_layers, num_blocks, config.num_kv_heads, 2 * block_size * vector)
        return cls(
            torch.frombuffer(zero_pages(math.prod(shape)), dtype=torch.uint8).view(shape), int8
        )

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that a failed request may have left NaN in."""
        self.blocks[:, torch.tensor(blocks)] = 0


@dataclass(slots=True)
class NativeDecoder:
    config: DecoderConfig
    pool: Pool
    embedding: Tensor  # bfloat16 [vocab, hidden]
    layers: list[NativeLayer]
    norm: Tensor
    head: Site
    block_size: int
    _model: NbModel = field(init=False)
    _kept: list = field(init=False)  # what the structures point to

    def __post_init__(self) -> None:
        config = self.config
        kinds = sorted(config.rope)
        frequencies = [
            inverse_frequencies(
                config.head_dim, config.rope[kind].theta, dict(config.rope[kind].scaling)
            )
            for kind in kinds
        ]
        layers = (NbLayer * config.num_layers)(
            *(
                layer.struct(kinds.index(config.layer_types[i]), config.window(i))
                for i, layer in enumerate(self.layers)
            )
        )
        scale = config.attention_scale or config.head_dim**-0.5
        embedding_scale = float(torch.tensor(config.embedding_scale, dtype=torch.bfloat16))
        tables = (ctypes.c_void_p * 2)(*(f.data_ptr() for f in frequencies))
        self._model = NbModel(
            config.hidden_size,
            config.intermediate_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.vocab_size,
            lib.ACTIVATIONS[config.activation],
            config.rms_norm_eps,
            scale,
            embedding_scale,
            self.block_size,
            layers,
            self.embedding.data_ptr(),
            self.norm.data_ptr(),
            tables,
            self.head.struct(),
        )
        self._kept = [frequencies, layers]

    def new_cache(self, num_blocks: int, config: EngineConfig) -> NativeCache:
        return NativeCache.allocate(
            self.config, num_blocks, self.block_size, config.kv_cache_dtype == "int8"
        )

    def forward(self, items: list[ScheduledRequest], cache: NativeCache) -> Tensor:
        """Compute the items' tokens, writing their keys and values to the cache. Returns the hidden states of all,
        float32 [T, hidden], before the final norm."""
        tables = [item.request.block_tables[0] for item in items]
        ends = [0, *itertools.accumulate(map(len, tables))]
        tokens = _int32([token for item in items for token in item.token_ids])
        flat = _int32(
            [
                n
                for item, at in zip(items, ends, strict=False)
                for n in (item.num_tokens, item.start, at)
            ]
        )
        blocks = _int32([block for table in tables for block in table])
        hidden = torch.empty(len(tokens), self.config.hidden_size)
        batch = NbBatch(
            len(tokens),
            len(items),
            ctypes.addressof(tokens),
            ctypes.addressof(flat),
            ctypes.addressof(blocks),
            cache.blocks.data_ptr(),
            cache.blocks.shape[1],
            cache.int8,
        )
        self.pool.library.nb_forward(self.pool.handle, self._model, batch, hidden.data_ptr())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] of the rows that need it -> float32 [R, vocab]."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.config.vocab_size)
        self.pool.library.nb_logits(
            self.pool.handle, self._model, hidden.data_ptr(), len(hidden), logits.data_ptr()
        )
        return logits


def _int32(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)
