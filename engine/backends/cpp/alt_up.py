"""Streams of hidden states and the way around a mixer as the C++ kernels take them (kernels/cpu/alt_up.h)."""

import ctypes
from dataclasses import dataclass, field

from torch import Tensor

from ....architectures.base import AltUp
from ....kernels.cpu.library import NbAltUp, NbAltUpLayer, NbLaurel, NbLinearGroup
from ....kernels.cpu.prepared import PreparedGroup, pointer
from ..weights import AltUpWeights


@dataclass(slots=True)
class CppAltUp:
    """Of the model."""

    spec: AltUp
    into: PreparedGroup
    back: list[PreparedGroup]
    array: ctypes.Array[NbLinearGroup] = field(init=False)
    struct: NbAltUp = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        self.array = (NbLinearGroup * len(self.back))(*(group.struct() for group in self.back))
        self.struct = NbAltUp(spec.num_streams, spec.active, self.into.struct(), self.array)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.into, *self.back]


@dataclass(slots=True)
class CppAltUpLayer:
    """Of one layer."""

    weights: AltUpWeights
    struct: NbAltUpLayer = field(init=False)

    def __post_init__(self) -> None:
        own = self.weights
        matrices = (own.router, own.predictions, own.corrections, own.scale)
        self.struct = NbAltUpLayer(*map(pointer, matrices))


@dataclass(slots=True)
class CppLaurel:
    """x = (x + mixed + h + norm(right(left(h)))) / sqrt(2)"""

    left: PreparedGroup
    right: PreparedGroup
    norm: Tensor  # float32 [hidden]
    struct: NbLaurel = field(init=False)

    def __post_init__(self) -> None:
        groups = (group.struct() for group in self.groups)
        self.struct = NbLaurel(self.right.linears[0].k, pointer(self.norm), *groups)

    @property
    def groups(self) -> list[PreparedGroup]:
        return [self.left, self.right]
