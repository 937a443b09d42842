"""Several streams of hidden states, and a short way around the mixer, as data: what is new in Gemma 3n."""

from dataclasses import dataclass
from typing import ClassVar

from .linears import LinearGroup


@dataclass(frozen=True, slots=True)
class AltUp:
    """A token has num_streams hidden states, of which a layer computes the active one and moves the others along
    (Baykal et al. 2023, "Alternating Updates for Efficient Transformers"):

    streams[0] = embedded, streams[i] = projection i of it, made as long
    of each layer, coefficients being linear in tanh(router(norm(x))):
        predicted[j] = streams[j] + sum over i of coefficient[j, i](streams[active]) * streams[i]
        computed = the layer's mixer and feed-forward on predicted[active]
        streams[j] = predicted[j] + (1 + coefficient[j](computed)) * (computed - predicted[active])
    at the end: the mean of streams[0] and of the others' projections back, made as long

    PerLayerInputs are of streams[active], and added to all streams but the first.
    """

    KIND: ClassVar = "alt_up"
    num_streams: int
    active: int
    scaled: bool = False  # what per-layer gates read is multiplied by a stored vector

    @property
    def projections(self) -> tuple[str, ...]:
        """Modules of the model, hidden -> hidden, that make the streams behind the first."""
        return self._modules("altup_projections")

    @property
    def unprojections(self) -> tuple[str, ...]:
        """The same, back."""
        return self._modules("altup_unembed_projections")

    def _modules(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{i}" for i in range(self.num_streams - 1))


@dataclass(frozen=True, slots=True)
class Laurel:
    """A second way around the mixer, of low rank (Menghani et al. 2024, "LAuReL"), h being what the mixer reads:

    x = (x + mixed + h + norm(right(left(h)))) / sqrt(2)
    """

    KIND: ClassVar = "laurel"
    norm: ClassVar = "laurel.post_laurel_norm"
    rank: int

    def groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup]:
        """left; right."""
        return (
            LinearGroup(("laurel.linear_left",), (self.rank,), hidden_size, "column", dense=True),
            LinearGroup(("laurel.linear_right",), (hidden_size,), self.rank, "row", dense=True),
        )
