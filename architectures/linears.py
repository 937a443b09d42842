"""The linears of a layer as data: which are computed and quantized together, and what may be folded into them."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears that read the same input: computed together, quantized alike. Their outputs stand side by side."""

    KIND: ClassVar = "linear_group"
    modules: tuple[str, ...]  # names within the layer; "*" where there are num_experts of each
    out_features: tuple[int, ...]  # of each
    in_features: int
    parallel: Literal["column", "row"]  # over several devices: outputs are divided, or inputs
    num_experts: int | None = None  # so many of every weight [out, in], one an expert; None: one
    dense: bool = False  # too small and too sensitive to be quantized
    # rows of the (one) weight from .. to, in the order in which its outputs are meant; (): in that in which they lie
    order: tuple[tuple[int, int], ...] = ()

    def members(self) -> "tuple[LinearGroup, ...]":
        """One group for each expert, each with names of its own; of a group without experts, itself."""
        if self.num_experts is None:
            return (self,)
        return tuple(
            replace(
                self,
                modules=tuple(name.replace("*", str(expert)) for name in self.modules),
                num_experts=None,
            )
            for expert in range(self.num_experts)
        )


@dataclass(frozen=True, slots=True)
class Fold:
    """`source` may be divided by a factor per output channel if the columns of `consumers` are multiplied by it:

    norm   y = norm(x) * w       w / s, columns * s (w + 1 where the norm stores an offset)
    rows   up_proj -> down_proj  rows / s, columns * s: what lies between is elementwise and linear in the source
    roots  up_proj -> down_proj  rows / sqrt(s), columns * s: what lies between is relu(x)^2
    heads  v_proj -> o_proj      as rows; every query head that reads a kv channel shares its factor, so it is exact
                                 under grouped-query attention too (softmax weights mix positions, never channels)

    q_norm and k_norm act after q_proj and k_proj, so a fold into the norm before these is exact. A source that holds
    more rows than its consumers have columns (qkv_proj, gate_up_proj) is divided in its last ones: v, up; or in `rows`.
    """

    kind: Literal["norm", "rows", "roots", "heads"]
    source: str
    consumers: tuple[str, ...]
    dense: tuple[str, ...] = ()  # what consumes it as well and is not quantized: routers, gates
    # the module around the consumers, where each of them sees some tokens only
    read_by: str | None = None
    rows: tuple[tuple[int, int], ...] = ()  # from .. to, of the source; (): its last ones

    @property
    def reads(self) -> str:
        """A module whose inputs are the source's outputs, of every token. (An expert sees some of them.)"""
        return self.read_by or (self.dense or self.consumers)[0]
