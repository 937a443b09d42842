"""transformers' experts as linears of their own, under the names that checkpoints give them.

transformers holds all experts of a layer in two tensors and calls modules by names of its own; what is converted,
folded, quantized and written is one linear at a time, by the checkpoint's names. So in each block the experts are
replaced by a module that computes the same with one linear each, and what holds them goes by the checkpoint's names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.base import Experts

LEAST_TOKENS = 512  # that each expert is calibrated on


class UnrolledExperts(nn.Module):
    """MLPs "0", "1", ..., one after the other, each on the tokens that chose it.

    While it is calibrated each is shown `least` tokens at least, others evenly spread over the text where too few chose
    it; what it makes of those is thrown away.
    """

    def __init__(self, experts: Any, spec: Experts):
        super().__init__()
        count, hidden, inner = experts.down_proj.shape
        if (
            spec.names.interleaved
        ):  # GPT-OSS, whose matrices lie the other way round and have biases
            hidden, inner = inner, hidden
        self.in_features = hidden
        self.least = 0
        # that chose each, since `forget_tokens`
        self.tokens = torch.zeros(count, dtype=torch.int64, device="cpu")
        for number in range(count):
            mlp = _Mlp(hidden, inner, spec, getattr(experts, "act_fn", None))
            self.add_module(str(number), mlp)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, hidden]; chosen and weights [T, top_k]. Returns [T, hidden]."""
        self.tokens += torch.bincount(chosen.flatten(), minlength=len(self.tokens)).cpu()
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            tokens, places = torch.where(chosen == number)
            shown = torch.cat((tokens, self._more(tokens, len(hidden))))
            if len(shown):
                added = expert(hidden[shown])[: len(tokens)] * weights[tokens, places, None]
                out.index_add_(0, tokens, added.to(out.dtype))
        return out

    def _more(self, tokens: Tensor, total: int) -> Tensor:
        """Tokens to be shown beside these, of `total`."""
        other = torch.ones(total, dtype=torch.bool, device=tokens.device)
        other[tokens] = False
        others = other.nonzero().flatten()
        missing = min(max(0, self.least - len(tokens)), len(others))
        if missing == 0:
            return others[:0]
        places = torch.arange(missing, device=tokens.device) * len(others) // missing
        return others[places]


class _Mlp(nn.Module):
    def __init__(
        self, hidden: int, inner: int, spec: Experts, act_fn: Callable[[Tensor], Tensor] | None
    ):
        super().__init__()
        self.act_fn, self.clamp, names = act_fn, spec.clamp, spec.names
        ups = (names.up,) if spec.plain else (names.gate, names.up)
        self.ups, self.down = tuple(map(_after_number, ups)), _after_number(names.down)
        for name in self.ups:
            self.add_module(name, nn.Linear(hidden, inner, bias=names.interleaved))
        self.add_module(self.down, nn.Linear(inner, hidden, bias=names.interleaved))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(self.down)(
            self._activated(*(self.get_submodule(name)(x) for name in self.ups))
        )
        return y

    def _activated(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """up None: there are no gates, and this is up."""
        if self.clamp is not None and up is not None:
            alpha, limit = self.clamp
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * gate * torch.sigmoid(alpha * gate)
        if self.act_fn is None:
            raise ValueError("experts without an activation")
        return self.act_fn(gate) if up is None else self.act_fn(gate) * up


def unroll(layer: nn.Module, spec: Experts) -> None:
    """Replace the experts of one of transformers' decoder layers, in place, and name what holds them as the checkpoint
    does. Call it on the meta device: the new weights are still to be loaded."""
    if spec.names.all == "experts":
        layer.experts = UnrolledExperts(layer.experts, spec)
        return
    block: Any
    own, block = next(
        (name, child) for name, child in layer.named_children() if hasattr(child, "experts")
    )
    prefix = spec.names.up.removesuffix(f".experts.*.{_after_number(spec.names.up)}")
    block.experts = UnrolledExperts(block.experts, spec)
    router, _, inside = spec.names.router.removeprefix(f"{prefix}.").partition(".")
    if inside:
        setattr(block, router, _Holder(inside, block.get_submodule(router)))
    if own != prefix:
        rename(layer, own, prefix)


def rename(parent: nn.Module, own: str, name: str) -> None:
    """Call a child of one of transformers' modules otherwise, for whoever walks its tree."""
    child = parent._modules.pop(own)
    parent.__dict__[own] = child  # where the module's own code finds it
    parent.add_module(name, child)


class _Holder(nn.Module):
    """A module with a name more."""

    def __init__(self, name: str, module: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.get_submodule(self.name)(x)


def _after_number(name: str) -> str:
    return name.partition(".*.")[2]


def read_by_transformers(model_type: str) -> bool:
    """Whether transformers takes experts of an architecture one by one from a checkpoint."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamed = get_checkpoint_conversion_mapping(model_type) or []
    return any("experts.*." in name for each in renamed for name in each.source_patterns)


@contextmanager
def shown_at_least(block: nn.Module, share: float) -> Iterator[None]:
    """Inside, each expert of a block is shown `share` of LEAST_TOKENS at least."""
    found = unrolled(block)
    for experts in found:
        experts.least = -int(-LEAST_TOKENS * share // 1)
    try:
        yield
    finally:
        for experts in found:
            experts.least = 0


def unrolled(block: nn.Module) -> list[UnrolledExperts]:
    return [module for module in block.modules() if isinstance(module, UnrolledExperts)]


def forget_tokens(block: nn.Module) -> None:
    for experts in unrolled(block):
        experts.tokens.zero_()


def too_few(block: nn.Module) -> str | None:
    """Which experts of a block fewer than LEAST_TOKENS tokens chose, in words; None: each had enough."""
    for experts in unrolled(block):
        few = (experts.tokens < LEAST_TOKENS).nonzero().flatten().tolist()
        if few:
            least = int(experts.tokens.min())
            some = ", ".join(map(str, few[:8])) + (", ..." if len(few) > 8 else "")
            return (
                f"{len(few)} of {len(experts.tokens)} experts ({some}) were chosen by fewer than {LEAST_TOKENS} "
                f"calibration tokens (the least by {least}), and calibrated on others' too"
            )
    return None
