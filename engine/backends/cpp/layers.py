"""The parts of a layer as the C++ kernels take them: weights, and the structures of abi.h that point to them.

A structure lives as long as the part that made it: `struct` is what others may point to.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....architectures.base import (
    Attention,
    Experts,
    GatedDeltaNet,
    Mamba2,
    Mixer,
    PerLayerInputs,
    Rope,
    ShortConv,
)
from ....kernels.cpu import library as lib
from ....kernels.cpu.library import (
    NbAttention,
    NbDeltaNet,
    NbExperts,
    NbGatedMlp,
    NbLayer,
    NbLinearGroup,
    NbMamba2,
    NbPerLayerInput,
    NbPerLayerInputs,
    NbRope,
    NbShortConv,
)
from ....kernels.cpu.prepared import PreparedGroup, pointer
from ..torch.layers import inverse_frequencies
from ..weights import DeltaNetWeights, Mamba2Weights


@dataclass(slots=True)
class CppRopes:
    """The rotations that a model's layers ask for, each once."""

    kinds: list[tuple[Rope | None, int]]  # and the dimensions of a head
    frequencies: list[Tensor] = field(init=False)  # float32 [turned dimensions / 2] each
    struct: ctypes.Array[NbRope] = field(init=False)

    @classmethod
    def of(cls, mixers: Sequence[Attention]) -> "CppRopes":
        return cls(list(dict.fromkeys((mixer.rope, mixer.head_dim) for mixer in mixers)))

    def __post_init__(self) -> None:
        self.frequencies = [inverse_frequencies(dim, rope) for rope, dim in self.kinds]
        self.struct = (NbRope * len(self.kinds))(
            *(
                NbRope(2 * len(each), 1.0 if rope is None else rope.attention_factor, pointer(each))
                for (rope, _), each in zip(self.kinds, self.frequencies, strict=True)
            )
        )

    def index(self, mixer: Attention) -> int:
        return self.kinds.index((mixer.rope, mixer.head_dim))


@dataclass(slots=True)
class CppAttention:
    """Groups q, k, v, gates of heads, and o; norms float32 or None."""

    spec: Attention
    qkv: PreparedGroup
    o: PreparedGroup
    q_norm: Tensor | None
    k_norm: Tensor | None
    v_norm: Tensor | None
    sinks: Tensor | None  # [num_heads]
    struct: NbAttention = field(init=False)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.qkv, self.o]

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """Of the keys and values of a block of tokens (kernels/cpu/kv_cache.h)."""
        if self.spec.kv_source is not None:
            return 0
        vector = self.spec.head_dim + 4 if int8 else 2 * self.spec.head_dim
        return 2 * self.spec.num_kv_heads * block_size * vector

    def point(self, ropes: CppRopes, cache_offset: int) -> NbAttention:
        """Make the structure. cache_offset: of the keys and values that it reads (abi.h)."""
        spec = self.spec
        beta, length = spec.query_scaling or (0.0, 0)
        self.struct = NbAttention(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            ropes.index(spec),
            spec.window or 0,
            spec.qk_norm == "all",
            spec.scale,
            spec.soft_cap or 0.0,
            beta,
            length,
            spec.output_gate,
            spec.head_gate,
            spec.kv_source is not None,
            spec.keys_are_values,
            cache_offset,
            pointer(self.q_norm),
            pointer(self.k_norm),
            pointer(self.v_norm),
            pointer(self.sinks),
            self.qkv.struct(),
            self.o.struct(),
        )
        return self.struct


@dataclass(slots=True)
class CppDeltaNet:
    """Groups q, k, v, z, b, a and out."""

    spec: GatedDeltaNet
    inputs: PreparedGroup
    out: PreparedGroup
    weights: DeltaNetWeights
    struct: NbDeltaNet = field(init=False)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.inputs, self.out]

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """None: it has no keys and values."""
        return 0

    def point(self, ropes: CppRopes, cache_offset: int) -> NbDeltaNet:
        """Make the structure."""
        spec, weights = self.spec, self.weights
        self.struct = NbDeltaNet(
            spec.num_key_heads,
            spec.num_value_heads,
            spec.key_dim,
            spec.value_dim,
            spec.conv_kernel,
            pointer(weights.taps),
            pointer(weights.rate),
            pointer(weights.dt_bias),
            pointer(weights.norm),
            self.inputs.struct(),
            self.out.struct(),
        )
        return self.struct


@dataclass(slots=True)
class CppMamba2:
    """Groups z, x, B, C, dt and out."""

    spec: Mamba2
    inputs: PreparedGroup
    out: PreparedGroup
    weights: Mamba2Weights
    struct: NbMamba2 = field(init=False)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.inputs, self.out]

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """None: it has no keys and values."""
        return 0

    def point(self, ropes: CppRopes, cache_offset: int) -> NbMamba2:
        """Make the structure."""
        spec, weights = self.spec, self.weights
        self.struct = NbMamba2(
            spec.num_heads,
            spec.head_dim,
            spec.state_dim,
            spec.num_groups,
            spec.conv_kernel,
            *spec.time_step_limit,
            pointer(weights.taps),
            pointer(weights.bias),
            pointer(weights.rate),
            pointer(weights.dt_bias),
            pointer(weights.skip),
            pointer(weights.norm),
            self.inputs.struct(),
            self.out.struct(),
        )
        return self.struct


@dataclass(slots=True)
class CppShortConv:
    """Groups B, C, x and out; filters float32 [taps, channels], their bias [channels] or None."""

    spec: ShortConv
    inputs: PreparedGroup
    out: PreparedGroup
    filters: Tensor
    bias: Tensor | None
    struct: NbShortConv = field(init=False)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.inputs, self.out]

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """None: it has no keys and values."""
        return 0

    def point(self, ropes: CppRopes, cache_offset: int) -> NbShortConv:
        """Make the structure."""
        self.struct = NbShortConv(
            self.spec.channels,
            self.spec.conv_kernel,
            pointer(self.filters),
            pointer(self.bias),
            self.inputs.struct(),
            self.out.struct(),
        )
        return self.struct


@dataclass(slots=True)
class CppGatedMlp:
    """Groups gate, up and down; up and down where there is no gate."""

    activation: str
    gate_up: PreparedGroup
    down: PreparedGroup
    clamp: tuple[float, float] | None = None  # of Experts
    struct: NbGatedMlp = field(init=False)

    def __post_init__(self) -> None:
        self.struct = NbGatedMlp(
            self.down.linears[0].k,
            lib.ACTIVATIONS[self.activation],
            *(self.clamp or (0.0, 0.0)),
            self.gate_up.struct(),
            self.down.struct(),
        )

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.gate_up, self.down]


@dataclass(slots=True)
class CppExperts:
    """A router, gated MLPs, and one that every token goes through, where there is one."""

    spec: Experts
    router: Tensor  # float32 [num_experts, hidden]
    router_bias: Tensor | None  # float32 [num_experts]
    correction_bias: Tensor | None  # float32 [num_experts]
    experts: list[CppGatedMlp]
    shared: CppGatedMlp | None
    shared_gate: Tensor | None  # float32 [1, hidden]
    latent: list[
        PreparedGroup
    ]  # into it and out of it; empty where experts read what the norm gives
    array: ctypes.Array[NbGatedMlp] = field(init=False)
    struct: NbExperts = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        self.array = (NbGatedMlp * len(self.experts))(*(each.struct for each in self.experts))
        self.struct = NbExperts(
            spec.num_experts,
            spec.top_k,
            lib.SCORINGS[spec.scoring],
            spec.norm_weights,
            *(spec.limited_groups or (0, 0)),
            spec.routed_scale,
            pointer(self.router),
            pointer(self.router_bias),
            pointer(self.correction_bias),
            self.array,
            None if self.shared is None else ctypes.pointer(self.shared.struct),
            pointer(self.shared_gate),
            spec.latent_size or 0,
            *([group.struct() for group in self.latent] or [NbLinearGroup()] * 2),
        )

    @property
    def groups(self) -> list[PreparedGroup]:
        each = self.experts if self.shared is None else [*self.experts, self.shared]
        return [group for mlp in each for group in mlp.groups] + self.latent


@dataclass(slots=True)
class CppPerLayerInput:
    """Of one layer."""

    gate: PreparedGroup
    projection: PreparedGroup
    norm: Tensor  # float32 [hidden]
    struct: NbPerLayerInput = field(init=False)

    def __post_init__(self) -> None:
        groups = (group.struct() for group in self.groups)
        self.struct = NbPerLayerInput(pointer(self.norm), *groups)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.gate, self.projection]


@dataclass(slots=True)
class CppPerLayerInputs:
    """Of all layers."""

    spec: PerLayerInputs
    table: Tensor  # bfloat16 [vocab, num_layers * width], mapped: a step reads its tokens' rows
    projection: PreparedGroup
    norm: Tensor  # float32 [width]
    struct: NbPerLayerInputs = field(init=False)

    def __post_init__(self) -> None:
        width, hidden = self.spec.width, self.projection.linears[0].k
        self.struct = NbPerLayerInputs(
            width,
            lib.ACTIVATIONS[self.spec.activation],
            hidden**-0.5,
            as_bfloat16(width**0.5),
            pointer(self.table),
            pointer(self.norm),
            self.projection.struct(),
        )


@dataclass(slots=True)
class CppLayer:
    """A mixer and a feed-forward, or one of the two; norms float32 [hidden] or None."""

    mixer: CppAttention | CppDeltaNet | CppMamba2 | CppShortConv | None
    mlp: CppGatedMlp | CppExperts | None
    before_mixer: Tensor | None
    after_mixer: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    per_layer_input: CppPerLayerInput | None
    scalar: float

    @property
    def groups(self) -> list[PreparedGroup]:
        parts = (self.mixer, self.mlp, self.per_layer_input)
        return [group for part in parts if part is not None for group in part.groups]

    @property
    def spec(self) -> Mixer | None:
        """Its mixer's."""
        return None if self.mixer is None else self.mixer.spec

    @property
    def state_size(self) -> int:
        """Numbers that its mixer carries from token to token."""
        return 0 if self.spec is None else sum(map(math.prod, self.spec.state_shapes))

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """Of a block of tokens in its cache."""
        return 0 if self.mixer is None else self.mixer.block_bytes(block_size, int8)

    def struct(self, ropes: CppRopes, cache_offset: int) -> NbLayer:
        norms = (self.before_mixer, self.after_mixer, self.before_mlp, self.after_mlp)
        mixer = None if self.mixer is None else self.mixer.point(ropes, cache_offset)
        told, mlp = self.per_layer_input, self.mlp
        return NbLayer(
            *map(pointer, norms),
            ctypes.pointer(mixer) if isinstance(mixer, NbAttention) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbDeltaNet) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbShortConv) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbMamba2) else None,
            ctypes.pointer(mlp.struct) if isinstance(mlp, CppGatedMlp) else None,
            ctypes.pointer(mlp.struct) if isinstance(mlp, CppExperts) else None,
            None if told is None else ctypes.pointer(told.struct),
            self.scalar,
        )


def as_bfloat16(value: float) -> float:
    """Rounded, as embeddings in bfloat16 are multiplied by it."""
    return float(torch.tensor(value, dtype=torch.bfloat16))
