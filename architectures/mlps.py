"""Feed-forwards without experts, as data."""

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import ClassVar, Literal

from .linears import Fold, LinearGroup

Activation = Literal["silu", "gelu_tanh", "relu2"]  # relu2: relu(x)^2

FUSED = ("mlp.gate_up_proj", "mlp.down_proj")  # Phi's


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)). Sparse: what is activated of a token's gates is how far they are above a
    cutoff, relu(gate - mean - deviations * their standard deviation), which a share of normally distributed ones are
    not."""

    KIND: ClassVar = "gated_mlp"
    intermediate_size: int
    activation: Activation
    sparsity: float = 0.0  # that share; 0: gates are activated as they are
    # gate, up, down; of two, the first holds the rows of gate and then those of up
    names: tuple[str, ...] = field(
        default=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), metadata={"role": "detail"}
    )

    @property
    def deviations(self) -> float | None:
        """Where the cutoff of sparse gates lies; None: there is none."""
        return NormalDist().inv_cdf(self.sparsity) if self.sparsity else None

    def groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup]:
        """gate, up; down."""
        inner, (*inputs, down) = self.intermediate_size, self.names
        sizes = (2 * inner // len(inputs),) * len(inputs)
        return (
            LinearGroup(tuple(inputs), sizes, hidden_size, "column"),
            LinearGroup((down,), (hidden_size,), inner, "row"),
        )

    def folds(self, norm: str | None) -> tuple[Fold, ...]:
        """norm: before it."""
        gate_up, down = self.groups(1)
        rows = Fold("rows", gate_up.modules[-1], down.modules)
        return (rows,) if norm is None else (Fold("norm", norm, gate_up.modules), rows)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what lies between up and down, in each kind of MLP that there is."""
        return (self.intermediate_size,)

    def numbers_per_token(self, hidden_size: int) -> int:
        """What a token has between norm and sum, at most: beside 4 * hidden_size."""
        return 3 * self.intermediate_size


@dataclass(frozen=True, slots=True)
class PlainMlp:
    """down(activation(up(x)))."""

    KIND: ClassVar = "plain_mlp"
    intermediate_size: int
    activation: Activation
    names: tuple[str, str] = field(  # up, down
        default=("mlp.up_proj", "mlp.down_proj"), metadata={"role": "detail"}
    )

    def groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup]:
        """up; down."""
        inner, (up, down) = self.intermediate_size, self.names
        return (
            LinearGroup((up,), (inner,), hidden_size, "column"),
            LinearGroup((down,), (hidden_size,), inner, "row"),
        )

    def folds(self, norm: str | None) -> tuple[Fold, ...]:
        """norm: before it."""
        before = () if norm is None else (Fold("norm", norm, self.names[:1]),)
        return before + up_down_folds(self.activation, *self.names)

    @property
    def widths(self) -> tuple[int, ...]:
        """As GatedMlp's."""
        return (self.intermediate_size,)

    def numbers_per_token(self, hidden_size: int) -> int:
        """As GatedMlp's."""
        return 2 * self.intermediate_size


def up_down_folds(activation: Activation, up: str, down: str) -> tuple[Fold, ...]:
    """From up into down where no gate lies between: relu2 takes a factor out, squared; the others take none."""
    return (Fold("roots", up, (down,)),) if activation == "relu2" else ()
