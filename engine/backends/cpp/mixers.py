"""Mixers as the C++ kernels take them: weights, and the structures of abi.h that point to them (see layers.py)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ....architectures.base import (
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    Rope,
    ShortConv,
)
from ....architectures.rope import switch_of
from ....kernels.cpu import library as lib
from ....kernels.cpu.library import (
    NbAttention,
    NbDeltaNet,
    NbLatentAttention,
    NbLinearGroup,
    NbMamba2,
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
    # float32 [turned dimensions / 2] each; those of long requests, where these have others
    frequencies: list[tuple[Tensor, Tensor | None]] = field(init=False)
    switch: int | None = field(init=False)  # tokens beyond which a request is long
    struct: ctypes.Array[NbRope] = field(init=False)

    @classmethod
    def of(cls, mixers: Sequence[Attention | LatentAttention]) -> "CppRopes":
        return cls(list(dict.fromkeys(mixer.rotation for mixer in mixers)))

    def __post_init__(self) -> None:
        self.switch = switch_of(rope for rope, _ in self.kinds)
        self.frequencies = [
            (
                inverse_frequencies(dim, rope),
                inverse_frequencies(dim, rope, long=True) if rope and rope.long else None,
            )
            for rope, dim in self.kinds
        ]
        self.struct = (NbRope * len(self.kinds))(
            *(
                NbRope(
                    2 * len(short),
                    1.0 if rope is None else rope.attention_factor,
                    rope is not None and rope.interleaved,
                    pointer(short),
                    pointer(long),
                )
                for (rope, _), (short, long) in zip(self.kinds, self.frequencies, strict=True)
            )
        )

    def index(self, mixer: Attention | LatentAttention) -> int:
        return self.kinds.index(mixer.rotation)


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

    def point(self, ropes: CppRopes) -> NbAttention:
        """Make the structure."""
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
            lib.GATES[spec.output_gate],
            spec.head_gate,
            spec.kv_source is not None,
            spec.keys_are_values,
            pointer(self.q_norm),
            pointer(self.k_norm),
            pointer(self.v_norm),
            pointer(self.sinks),
            self.qkv.struct(),
            self.o.struct(),
        )
        return self.struct


@dataclass(slots=True)
class CppLatentAttention:
    """Groups q or q_a and kv_a, q_b, o; what kv_b does to queries and to latents, a linear a head; norms float32."""

    spec: LatentAttention
    inputs: PreparedGroup
    q_b: PreparedGroup | None
    keys: PreparedGroup
    values: PreparedGroup
    o: PreparedGroup
    q_norm: Tensor | None
    kv_norm: Tensor
    struct: NbLatentAttention = field(init=False)

    @property
    def groups(self) -> list[PreparedGroup]:
        found = [self.inputs, self.keys, self.values, self.o]
        return found if self.q_b is None else [*found, self.q_b]

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """Of the latents of a block of tokens (kernels/cpu/latent_attention.h)."""
        numbers = self.spec.kv_rank + self.spec.rope_dim
        return block_size * (numbers + 8 if int8 else 2 * numbers)

    def point(self, ropes: CppRopes) -> NbLatentAttention:
        """Make the structure."""
        spec = self.spec
        self.struct = NbLatentAttention(
            spec.num_heads,
            spec.q_rank or 0,
            spec.kv_rank,
            spec.nope_dim,
            spec.rope_dim,
            spec.value_dim,
            ropes.index(spec),
            spec.scale,
            spec.norm_eps,
            *(spec.query_scaling or (0.0, 0)),
            pointer(self.q_norm),
            pointer(self.kv_norm),
            self.inputs.struct(),
            NbLinearGroup() if self.q_b is None else self.q_b.struct(),
            self.keys.struct(),
            self.values.struct(),
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

    def point(self, ropes: CppRopes) -> NbDeltaNet:
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

    def point(self, ropes: CppRopes) -> NbMamba2:
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

    def point(self, ropes: CppRopes) -> NbShortConv:
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
