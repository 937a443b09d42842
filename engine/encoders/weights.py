"""An encoder's tensors as its spec names them, each checked against the shape that the spec implies."""

from dataclasses import dataclass

from torch import Tensor

from ...architectures.encoder import EncoderSpec
from ...architectures.linears import LinearGroup
from ...errors import CheckpointError
from ...quant.checkpoint import Checkpoint
from ..backends.weights import FIX, Linear, check_shape, checked_linear

_OLDER = {"weight": "gamma", "bias": "beta"}  # of norms, in BERT's first checkpoints


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Reads lazily: nothing is held."""

    checkpoint: Checkpoint
    spec: EncoderSpec

    def table(self, module: str, rows: int, columns: int) -> Tensor:
        """An embedding, float32 [rows, columns]. module: behind the prefix."""
        name = f"{self.spec.prefix}{module}.weight"
        check_shape(self.checkpoint, name, (rows, columns))
        return self.checkpoint.tensor(name).float()

    def norm(self, module: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a LayerNorm, float32 [hidden_size]. module: its full name."""
        weight = self._vector(module, "weight")
        if weight is None:
            raise CheckpointError(
                "is missing", file=self.checkpoint.path, tensor=f"{module}.weight", fix=FIX
            )
        return weight, self._vector(module, "bias")

    def _vector(self, module: str, part: str) -> Tensor | None:
        for name in (f"{module}.{part}", f"{module}.{_OLDER[part]}"):
            if self.checkpoint.has(name):
                check_shape(self.checkpoint, name, (self.spec.hidden_size,))
                return self.checkpoint.tensor(name).float()
        return None

    def group(self, layer: int, group: LinearGroup) -> list[Linear]:
        prefix = self.spec.layer_name(layer)
        return [
            self.linear(f"{prefix}.{module}", out, group.in_features)
            for module, out in zip(group.modules, group.out_features, strict=True)
        ]

    def linear(self, module: str, out_features: int, in_features: int) -> Linear:
        """By its full name."""
        weight = checked_linear(self.checkpoint, module, (out_features, in_features))
        bias = self.checkpoint.bias(module)
        if bias is not None:
            check_shape(self.checkpoint, f"{module}.bias", (out_features,))
        return Linear(weight, bias)

    def check_depth(self) -> None:
        """That the model has every layer that there are weights of. CheckpointError."""
        beyond = f"{self.spec.layer_name(self.spec.num_layers)}."
        for name in self.checkpoint.names():
            if name.startswith(beyond):
                raise CheckpointError(
                    f"is of layer {self.spec.num_layers}, config.json says that there are so many, from 0 on",
                    file=self.checkpoint.path,
                    tensor=name,
                    fix=FIX,
                )
