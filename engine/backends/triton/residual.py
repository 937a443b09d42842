"""x [T, hidden] on its way through the layers.

    x += (norm of) what a mixer or feed-forward gave, times the model's residual_scale;  h = norm(x)

What is to be added is kept aside until the next norm, which adds it and reads the sum in one launch.
"""

from torch import Tensor

from ....kernels.fused.norm import rms_norm
from ..torch.layers import RMSNorm, scaled


class Residual:
    """The sum of what has been added."""

    def __init__(self, x: Tensor, scale: float):
        """x [T, hidden], which becomes the sum. scale: of all that is added."""
        self._x, self._scale = x, scale
        self._added: tuple[Tensor, RMSNorm | None] | None = None

    def add(self, mixed: Tensor, after: RMSNorm | None) -> None:
        """Add mixed [T, hidden], by its norm, if it has one. The last to be added must have been read."""
        self._added = mixed, after

    def normed(self, norm: RMSNorm | None) -> Tensor:
        """[T, hidden] of a norm, or the sum itself."""
        if norm is None:
            return self.sum()
        if self._added is None:
            return rms_norm(self._x, norm.weight, norm.eps)
        (mixed, after), self._added = self._added, None
        return rms_norm(
            mixed,
            norm.weight,
            norm.eps,
            self._x,
            post_weight=None if after is None else after.weight,
            post_eps=None if after is None else after.eps,
            scale=self._scale,
        )

    def sum(self) -> Tensor:
        """[T, hidden], overwritten by the next `normed`."""
        if self._added is not None:
            (mixed, after), self._added = self._added, None
            if after is not None:
                mixed = rms_norm(mixed, after.weight, after.eps)
            self._x = self._x + scaled(mixed, self._scale)
        return self._x

    def become(self, x: Tensor) -> None:
        """Go on from x [T, hidden], made of `sum`."""
        self._x = x
