"""How a router's logits are read. Importing this needs no Triton."""

from dataclasses import dataclass

from ..errors import KernelArgumentError

MAX_EXPERTS = 1024  # a token's scores in the registers of one warp


@dataclass(frozen=True, slots=True)
class Routing:
    """As route.py has it. Raises KernelArgumentError where the numbers make no sense."""

    num_experts: int
    top_k: int
    scoring: str  # "softmax" or "sigmoid"
    norm_weights: bool = False  # the chosen scores are divided by their sum
    routed_scale: float = 1.0
    groups: int = 1
    best_groups: int = 1  # of groups, these are left
    group_rank: int = 1  # of a group, so many of its best are summed to rank it

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise KernelArgumentError(f"route: {problem}")

    def _problem(self) -> str | None:
        count, groups, best = self.num_experts, self.groups, self.best_groups
        if not 0 < count <= MAX_EXPERTS:
            return f"{count} experts; at most {MAX_EXPERTS} fit one program"
        if self.scoring not in ("softmax", "sigmoid"):
            return f"scoring is {self.scoring!r}"
        if not groups >= best >= 1 or count % groups:
            return f"{count} experts do not form {groups} groups of which {best} are left"
        if not 1 <= self.group_rank <= count // groups:
            return f"a group has no {self.group_rank} experts"
        if not 1 <= self.top_k <= (left := best * count // groups):
            return f"{self.top_k} experts are chosen, of {left}"
        return None
