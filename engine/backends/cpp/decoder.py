"""Consecutive layers as one call into the C++ kernels: token ids (or hidden states) in, hidden states out.

The weights, norms and tables are handed over once, as plain arrays (kernels/cpu/abi.h); a step hands over its tokens,
what each request computes and its block table. The KV cache has the kernels' own layout (kernels/cpu/kv_cache.h):

    of each layer [blocks of its KV group, num_kv_heads, bytes]   keys and values of block_size tokens; int8: scales too
    or            [blocks of its KV group, bytes]                 latents (kernels/cpu/latent_attention.h)

Recurrent states lie beside it, float32 (kernels/cpu/delta_net.h):

    of each layer that has one [num_states, numbers]
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Attention, LatentAttention, ModelSpec
from ....kernels.cpu.library import NbBatch, NbLayer, NbLinearGroup, NbModel, Pool
from ....kernels.cpu.prepared import PreparedGroup, pointer
from ..base import HostSampling, KernelReport
from ..batch import Batch
from ..images import with_images
from ..kv_groups import layer_groups
from ..torch.attention import zero_pages
from .alt_up import CppAltUp
from .layers import CppLayer, CppPerLayerInputs, as_bfloat16
from .mixers import CppRopes


@dataclass(slots=True)
class CppCache:
    """Anonymous pages, so a block and a state cost memory from their first use on."""

    pages: Tensor  # uint8
    # of these, each layer's [blocks, bytes of a block]; 0 bytes where it has none of its own
    layers: list[Tensor]
    groups: ctypes.Array[ctypes.c_int32]  # KV group of each layer; 0 where it sees no cache
    # of each layer's cache in pages, or of that which it reads
    offsets: ctypes.Array[ctypes.c_int64]
    num_groups: int
    int8: bool
    states: Tensor  # float32
    state_layers: list[Tensor]  # of these, [num_states, numbers] of each layer that has one
    num_states: int

    @classmethod
    def allocate(
        cls,
        num_blocks: Sequence[int],
        groups: list[int],
        block_bytes: list[int],
        sources: list[int],
        int8: bool,
        num_states: int,
        state_sizes: list[int],
    ) -> "CppCache":
        """num_blocks: of each KV group. groups, block_bytes, sources (whose keys and values it reads): of each layer;
        state_sizes (in numbers): of each that has a state."""
        counts = [num_blocks[group] for group in groups]
        sizes = [count * size for count, size in zip(counts, block_bytes, strict=True)]
        pages = _zeros(sum(sizes), torch.uint8)
        layers = [
            part.view(count, size)
            for part, count, size in zip(pages.split(sizes), counts, block_bytes, strict=True)
        ]
        before = list(itertools.accumulate(sizes, initial=0))
        states = _zeros(num_states * sum(state_sizes), torch.float32)
        state_layers = [
            part.view(num_states, -1)
            for part in states.split([num_states * n for n in state_sizes])
        ]
        return cls(
            pages,
            layers,
            _int32(groups),
            (ctypes.c_int64 * len(sources))(*(before[source] for source in sources)),
            len(num_blocks),
            int8,
            states,
            state_layers,
            num_states,
        )

    def clear(self, blocks: Sequence[list[int]], state_slot: int | None) -> None:
        for layer, group in zip(self.layers, self.groups, strict=True):
            layer[torch.tensor(blocks[group])] = 0
        for layer in self.state_layers:
            if state_slot is not None:
                layer[state_slot] = 0


@dataclass(slots=True)
class CppDecoder(HostSampling):
    """Embedding, norm and head where the layers are the model's first or last."""

    looks_ahead = True

    model: ModelSpec
    pool: Pool
    layers: list[CppLayer]
    first_layer: int  # of the model's
    block_size: int
    int8_cache: bool
    embedding: Tensor | None  # bfloat16 [vocab, hidden]
    embedding_norm: Tensor | None  # float32 [hidden]
    norm: Tensor | None  # float32 [hidden]
    head: PreparedGroup | None
    per_layer_inputs: CppPerLayerInputs | None
    alt_up: CppAltUp | None
    report: KernelReport
    ropes: CppRopes = field(init=False)
    layer_structs: ctypes.Array[NbLayer] = field(init=False)
    _struct: NbModel = field(init=False)  # points to the two above
    _told: NbModel = field(init=False)  # the same, told hidden states in place of tokens

    def __post_init__(self) -> None:
        model = self.model
        mixers = [layer.spec for layer in self.layers]
        self.ropes = CppRopes.of(
            [mixer for mixer in mixers if isinstance(mixer, (Attention, LatentAttention))]
        )
        self.layer_structs = (NbLayer * len(self.layers))(
            *(layer.struct(self.ropes) for layer in self.layers)
        )
        told, alt_up = self.per_layer_inputs, self.alt_up
        self._struct = NbModel(
            model.hidden_size,
            len(self.layers),
            len(self.ropes.struct),
            model.vocab_size,
            model.norm_eps,
            model.norm_eps if model.after_norm_eps is None else model.after_norm_eps,
            as_bfloat16(model.embedding_scale),
            self.block_size,
            self.layer_structs,
            self.ropes.struct,
            pointer(self.embedding),
            pointer(self.embedding_norm),
            pointer(self.norm),
            None if told is None else ctypes.pointer(told.struct),
            None if alt_up is None else ctypes.pointer(alt_up.struct),
            NbLinearGroup() if self.head is None else self.head.struct(),
        )
        self._told = NbModel.from_buffer_copy(self._struct)
        self._told.embedding = None

    @property
    def groups(self) -> list[PreparedGroup]:
        groups = [group for layer in self.layers for group in layer.groups]
        told, head = self.per_layer_inputs, self.head
        groups += [] if told is None else [told.projection]
        groups += [] if self.alt_up is None else self.alt_up.groups
        return groups if head is None else [*groups, head]

    @property
    def weight_bytes(self) -> int:
        told = self.per_layer_inputs
        tables = [self.embedding, None if told is None else told.table]
        embeddings = sum(table.nbytes for table in tables if table is not None)
        return sum(group.nbytes for group in self.groups) + embeddings

    def new_cache(self, num_blocks: Sequence[int], num_states: int = 1) -> CppCache:
        specs = self.model.layers[self.first_layer : self.first_layer + len(self.layers)]
        groups = layer_groups(self.model, specs, len(num_blocks))
        mixers = [layer.spec for layer in self.layers]
        sources = [mixer.kv_source if isinstance(mixer, Attention) else None for mixer in mixers]
        return CppCache.allocate(
            num_blocks,
            [groups.get(index, 0) for index in range(len(mixers))],
            [layer.block_bytes(self.block_size, self.int8_cache) for layer in self.layers],
            [index if source is None else source for index, source in enumerate(sources)],
            self.int8_cache,
            num_states,
            [layer.state_size for layer in self.layers if layer.state_size],
        )

    def forward(self, batch: Batch, cache: CppCache, hidden: Tensor | None = None) -> Tensor:
        """float32 [T, hidden_size]"""
        if (hidden is None) != (self.embedding is not None):
            raise ValueError("the model's first layers take tokens, the others hidden states")
        if batch.given[0] and hidden is None:
            hidden = with_images(self._embedded(batch), batch)
        tables = [table for group in range(cache.num_groups) for table in batch.block_tables(group)]
        starts = _int32([0, *itertools.accumulate(map(len, tables))])
        tokens = _int32(batch.token_ids)
        switch = self.ropes.switch
        longer = [False] * len(batch) if switch is None else batch.longer(switch)
        items = _int32(
            [
                number
                for item, is_long in zip(batch.items, longer, strict=True)
                for number in (item.num_tokens, item.start, is_long)
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
            ctypes.addressof(starts),
            ctypes.addressof(cache.groups),
            cache.pages.data_ptr(),
            ctypes.addressof(cache.offsets),
            cache.int8,
        )
        if cache.state_layers:
            items_states = _int32([n for each in batch.states for n in each])
            snapshots = _int32([n for each in batch.snapshots for n in each])
            arguments.states, arguments.num_slots = cache.states.data_ptr(), cache.num_states
            arguments.item_states = ctypes.addressof(items_states)
            arguments.snapshots = ctypes.addressof(snapshots)
        if batch.last_seen is not None:
            last_seen = _int32(batch.last_seen)
            arguments.last_seen = ctypes.addressof(last_seen)
        struct = self._struct if hidden is None else self._told
        self.pool.library.nb_forward(self.pool.handle, struct, arguments, out.data_ptr())
        return out

    def _embedded(self, batch: Batch) -> Tensor:
        """float32 [T, hidden_size]: the tokens as the kernels embed them, for models that see."""
        if self.embedding is None or self.embedding_norm is not None:
            raise ValueError("a model whose embeddings the kernels alone make")
        x = F.embedding(torch.tensor(batch.token_ids), self.embedding).float()
        return x * as_bfloat16(self.model.embedding_scale)

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


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(zero_pages(count * dtype.itemsize), dtype=dtype)


def _int32(values: list[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)
