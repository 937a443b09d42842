"""The parts of a layer as the C++ kernels take them: weights, and the structures of abi.h that point to them.

A structure lives as long as the part that made it: `struct` is what others may point to.
"""

import ctypes
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....architectures.base import (
    Experts,
    Mixer,
    PerLayerInputs,
)
from ....kernels.cpu import library as lib
from ....kernels.cpu.library import (
    NbAttention,
    NbDeltaNet,
    NbExperts,
    NbGatedMlp,
    NbLatentAttention,
    NbLayer,
    NbLinearGroup,
    NbMamba2,
    NbPerLayerInput,
    NbPerLayerInputs,
    NbShortConv,
)
from ....kernels.cpu.prepared import PreparedGroup, pointer
from .alt_up import CppAltUpLayer, CppLaurel
from .mixers import (
    CppAttention,
    CppDeltaNet,
    CppLatentAttention,
    CppMamba2,
    CppRopes,
    CppShortConv,
)


@dataclass(slots=True)
class CppGatedMlp:
    """Groups gate, up and down; up and down where there is no gate."""

    activation: str
    gate_up: PreparedGroup
    down: PreparedGroup
    clamp: tuple[float, float] | None = None  # of Experts
    deviations: float | None = None  # of GatedMlp
    struct: NbGatedMlp = field(init=False)

    def __post_init__(self) -> None:
        self.struct = NbGatedMlp(
            self.down.linears[0].k,
            lib.ACTIVATIONS[self.activation],
            self.deviations is not None,
            self.deviations or 0.0,
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
    # into the latent space and out of it; empty where experts read what the norm gives
    latent: list[PreparedGroup]
    norm: Tensor | None = None  # float32 [hidden] of what they read, but not the router
    scales: Tensor | None = None  # float32 [num_experts]
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
            spec.group_rank,
            spec.routed_scale,
            pointer(self.router),
            pointer(self.router_bias),
            pointer(self.correction_bias),
            self.array,
            None if self.shared is None else ctypes.pointer(self.shared.struct),
            pointer(self.shared_gate),
            spec.latent_size or 0,
            *([group.struct() for group in self.latent] or [NbLinearGroup()] * 2),
            pointer(self.norm),
            pointer(self.scales),
        )

    @property
    def groups(self) -> list[PreparedGroup]:
        each = self.experts if self.shared is None else [*self.experts, self.shared]
        return [group for mlp in each for group in mlp.groups] + self.latent


@dataclass(slots=True)
class CppMlpBesideExperts:
    """Norms float32 [hidden]."""

    mlp: CppGatedMlp
    experts: CppExperts
    after_mlp: Tensor
    after_experts: Tensor
    before_router: Tensor

    @property
    def groups(self) -> list[PreparedGroup]:
        return self.mlp.groups + self.experts.groups


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
            len(self.table),
            hidden**-0.5,
            as_bfloat16(width**0.5),
            pointer(self.table),
            pointer(self.norm),
            self.projection.struct(),
        )


@dataclass(slots=True)
class CppLayer:
    """A mixer and a feed-forward, or one of the two; norms float32 [hidden] or None."""

    mixer: CppAttention | CppLatentAttention | CppDeltaNet | CppMamba2 | CppShortConv | None
    mlp: CppGatedMlp | CppExperts | CppMlpBesideExperts | None
    before_mixer: Tensor | None
    after_mixer: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    per_layer_input: CppPerLayerInput | None
    scalar: float
    laurel: CppLaurel | None
    alt_up: CppAltUpLayer | None

    @property
    def groups(self) -> list[PreparedGroup]:
        parts = (self.mixer, self.mlp, self.per_layer_input, self.laurel)
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

    def struct(self, ropes: CppRopes) -> NbLayer:
        norms = (self.before_mixer, self.after_mixer, self.before_mlp, self.after_mlp)
        mixer = None if self.mixer is None else self.mixer.point(ropes)
        mlp, experts = self.mlp, self.mlp
        between: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(self.mlp, CppMlpBesideExperts):
            both = self.mlp
            mlp, experts = both.mlp, both.experts
            between = both.after_mlp, both.after_experts, both.before_router
        return NbLayer(
            *map(pointer, (*norms, *between)),
            ctypes.pointer(mixer) if isinstance(mixer, NbAttention) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbLatentAttention) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbDeltaNet) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbShortConv) else None,
            ctypes.pointer(mixer) if isinstance(mixer, NbMamba2) else None,
            ctypes.pointer(mlp.struct) if isinstance(mlp, CppGatedMlp) else None,
            ctypes.pointer(experts.struct) if isinstance(experts, CppExperts) else None,
            *(
                None if part is None else ctypes.pointer(part.struct)
                for part in (self.per_layer_input, self.laurel, self.alt_up)
            ),
            self.scalar,
        )


def as_bfloat16(value: float) -> float:
    """Rounded, as embeddings in bfloat16 are multiplied by it."""
    return float(torch.tensor(value, dtype=torch.bfloat16))
