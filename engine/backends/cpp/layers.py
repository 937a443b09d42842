"""The parts of a layer as the C++ kernels take them: weights, and the structures of abi.h that point to them.

A structure lives as long as the part that made it: `struct` is what others may point to.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ....architectures.base import Attention, GatedDeltaNet, GatedMlp, Rope
from ....kernels.cpu import library as lib
from ....kernels.cpu.library import NbAttention, NbDeltaNet, NbGatedMlp, NbLayer, NbRope
from ....kernels.cpu.prepared import PreparedGroup, pointer
from ..torch.layers import inverse_frequencies
from ..weights import DeltaNetWeights


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
    """Groups q, k, v and o; norms float32 or None."""

    spec: Attention
    qkv: PreparedGroup
    o: PreparedGroup
    q_norm: Tensor | None
    k_norm: Tensor | None
    struct: NbAttention = field(init=False)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.qkv, self.o]

    def block_bytes(self, block_size: int, int8: bool) -> int:
        """Of the keys and values of a block of tokens (kernels/cpu/kv_cache.h)."""
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
            beta,
            length,
            spec.output_gate,
            pointer(self.q_norm),
            pointer(self.k_norm),
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
class CppGatedMlp:
    """Groups gate, up and down."""

    spec: GatedMlp
    gate_up: PreparedGroup
    down: PreparedGroup
    struct: NbGatedMlp = field(init=False)

    def __post_init__(self) -> None:
        self.struct = NbGatedMlp(
            self.spec.intermediate_size,
            lib.ACTIVATIONS[self.spec.activation],
            self.gate_up.struct(),
            self.down.struct(),
        )

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.gate_up, self.down]


@dataclass(slots=True)
class CppLayer:
    """A mixer and a feed-forward; norms float32 [hidden] or None."""

    mixer: CppAttention | CppDeltaNet
    mlp: CppGatedMlp
    before_mixer: Tensor | None
    after_mixer: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None

    @property
    def groups(self) -> list[PreparedGroup]:
        return self.mixer.groups + self.mlp.groups

    def struct(self, ropes: CppRopes) -> NbLayer:
        norms = (self.before_mixer, self.after_mixer, self.before_mlp, self.after_mlp)
        mixer = self.mixer.point(ropes)
        return NbLayer(
            *map(pointer, norms),
            ctypes.pointer(mixer) if isinstance(mixer, NbAttention) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbDeltaNet) else None,
            ctypes.pointer(self.mlp.struct),
        )
