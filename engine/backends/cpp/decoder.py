"""Consecutive layers as one call into the C++ kernels: token ids (or hidden states) in, hidden states out.

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

from ....architectures.base import Attention, ModelSpec
from ....kernels.cpu import library as lib
from ....kernels.cpu.library import NbBatch, NbLayer, NbLinearGroup, NbModel, Pool
from ....kernels.cpu.prepared import PreparedGroup, pointer
from ..base import HostSampling, KernelReport
from ..batch import Batch
from ..torch.attention import zero_pages
from ..torch.layers import inverse_frequencies


@dataclass(slots=True)
class CppLayer:
    """One layer's weights: norms float32 or None; groups q, k, v; o; gate, up; down."""

    mixer: Attention
    qkv: PreparedGroup
    o: PreparedGroup
    gate_up: PreparedGroup
    down: PreparedGroup
    before_mixer: Tensor | None
    after_mixer: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    def struct(self, rope: int) -> NbLayer:
        """rope: which of the model's frequencies."""
        norms = (
            self.before_mixer,
            self.before_mlp,
            self.q_norm,
            self.k_norm,
            self.after_mixer,
            self.after_mlp,
        )
        groups = (self.qkv, self.o, self.gate_up, self.down)
        return NbLayer(
            *map(pointer, norms),
            rope,
            self.mixer.window or 0,
            *(group.struct() for group in groups),
        )


@dataclass(slots=True)
class CppCache:
    """Anonymous pages, so a block costs memory from its first use on."""

    blocks: Tensor  # uint8, shape as in the module's docstring
    int8: bool

    @classmethod
    def allocate(
        cls, num_layers: int, num_blocks: int, block_size: int, mixer: Attention, int8: bool
    ) -> "CppCache":
        vector = mixer.head_dim + 4 if int8 else 2 * mixer.head_dim
        shape = (num_layers, num_blocks, mixer.num_kv_heads, 2 * block_size * vector)
        pages = torch.frombuffer(zero_pages(math.prod(shape)), dtype=torch.uint8)
        return cls(pages.view(shape), int8)

    def clear(self, blocks: list[int]) -> None:
        self.blocks[:, torch.tensor(blocks)] = 0


@dataclass(slots=True)
class CppDecoder(HostSampling):
    """Layers of one shape; embedding, norm and head where they are the model's first or last."""

    model: ModelSpec
    pool: Pool
    layers: list[CppLayer]
    block_size: int
    int8_cache: bool
    embedding: Tensor | None  # bfloat16 [vocab, hidden]
    norm: Tensor | None  # float32 [hidden]
    head: PreparedGroup | None
    report: KernelReport
    _struct: NbModel = field(init=False)
    _kept: list[object] = field(init=False)  # what the structures point to

    def __post_init__(self) -> None:
        model, first = self.model, self.layers[0]
        mixer = first.mixer
        ropes = list(dict.fromkeys(layer.mixer.rope for layer in self.layers))
        frequencies = [inverse_frequencies(mixer.head_dim, rope) for rope in ropes]
        beta, length = mixer.query_scaling or (0.0, 0)
        layers = (NbLayer * len(self.layers))(
            *(layer.struct(ropes.index(layer.mixer.rope)) for layer in self.layers)
        )
        self._struct = NbModel(
            model.hidden_size,
            first.down.linears[0].k,
            len(self.layers),
            mixer.num_heads,
            mixer.num_kv_heads,
            mixer.head_dim,
            model.vocab_size,
            lib.ACTIVATIONS[model.layers[0].mlp.activation],
            mixer.qk_norm == "all",
            model.norm_eps,
            mixer.scale,
            float(torch.tensor(model.embedding_scale, dtype=torch.bfloat16)),
            beta,
            length,
            self.block_size,
            layers,
            pointer(self.embedding),
            pointer(self.norm),
            (ctypes.c_void_p * 2)(*(f.data_ptr() for f in frequencies)),
            (ctypes.c_int32 * 2)(*(2 * len(f) for f in frequencies)),
            (ctypes.c_float * 2)(*(rope.attention_factor if rope else 1.0 for rope in ropes)),
            NbLinearGroup() if self.head is None else self.head.struct(),
        )
        self._kept = [frequencies, layers]

    @property
    def weight_bytes(self) -> int:
        groups = [
            g for layer in self.layers for g in (layer.qkv, layer.o, layer.gate_up, layer.down)
        ]
        groups += [] if self.head is None else [self.head]
        embedding = 0 if self.embedding is None else self.embedding.nbytes
        return sum(group.nbytes for group in groups) + embedding

    def new_cache(self, num_blocks: int) -> CppCache:
        mixer = self.layers[0].mixer
        return CppCache.allocate(
            len(self.layers), num_blocks, self.block_size, mixer, self.int8_cache
        )

    def forward(self, batch: Batch, cache: CppCache, hidden: Tensor | None = None) -> Tensor:
        """float32 [T, hidden_size]"""
        if (hidden is None) != (self.embedding is not None):
            raise ValueError("the model's first layers take tokens, the others hidden states")
        tables = batch.block_tables
        starts = [0, *itertools.accumulate(map(len, tables))]
        tokens = _int32(batch.token_ids)
        items = _int32(
            [
                number
                for item, table in zip(batch.items, starts, strict=False)
                for number in (item.num_tokens, item.start, table)
            ]
        )
        blocks = _int32([block for table in tables for block in table])
        if hidden is None:
            out = torch.empty(len(tokens), self.model.hidden_size)
        else:
            out = hidden.to(torch.float32, copy=True).contiguous()
        arguments = NbBatch(
            len(tokens),
            len(batch),
            ctypes.addressof(tokens),
            ctypes.addressof(items),
            ctypes.addressof(blocks),
            cache.blocks.data_ptr(),
            cache.blocks.shape[1],
            cache.int8,
        )
        self.pool.library.nb_forward(self.pool.handle, self._struct, arguments, out.data_ptr())
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            raise ValueError("these are not the model's last layers")
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.model.vocab_size)
        self.pool.library.nb_logits(
            self.pool.handle, self._struct, hidden.data_ptr(), len(hidden), logits.data_ptr()
        )
        if (scale := self.model.logits_scale) != 1.0:
            logits *= scale
        if (cap := self.model.final_soft_cap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits


def _int32(values: list[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)
