"""What some blocks read beside the hidden states: the token that they stand at, keys and values of a block before.

It travels behind the hidden states as more columns, so that whoever keeps, splits or runs them needs to know nothing:

    [n, T, hidden | token id | keys | values of the first block that others read | of the next ...]

hidden: num_streams * hidden_size, the streams side by side, which blocks take as [num_streams, n, T, hidden_size].

Hooks on a block take the columns apart before it runs and put them back after.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.base import ModelSpec


@dataclass(slots=True)
class Carried:
    """The columns of one model's activations."""

    model: ModelSpec
    states: int = field(init=False)  # columns of hidden states
    _places: dict[int, int] = field(init=False)  # block whose keys and values are carried -> column
    width: int = field(init=False)  # of a token's activations

    def __post_init__(self) -> None:
        streams = 1 if self.model.alt_up is None else self.model.alt_up.num_streams
        self.states = streams * self.model.hidden_size
        self.width = self.states + (self.model.per_layer_inputs is not None)
        self._places = {}
        mixers = self.model.attention
        sources = {m.kv_source for m in mixers.values() if m.kv_source is not None}
        for source in sorted(sources):
            self._places[source] = self.width
            self.width += 2 * mixers[source].num_kv_heads * mixers[source].head_dim

    def start(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """What enters the first block: hidden [n, T, states], token_ids [n, T]."""
        if self.width == self.states:
            return hidden
        carried = hidden.new_zeros(*hidden.shape[:-1], self.width)
        carried[..., : hidden.shape[-1]] = hidden
        if self.model.per_layer_inputs is not None:
            carried[..., self.states] = token_ids
        return carried

    def hidden(self, activations: Tensor) -> Tensor:
        """The hidden states among them."""
        return activations[..., : self.states]

    def attach(self, block: nn.Module, index: int, told: Callable[[Tensor], Tensor] | None) -> None:
        """Make block `index` take and give all columns. told: token ids -> its inputs of its own."""
        if self.width == self.model.hidden_size:
            return
        states, hidden_size, alt_up = self.states, self.model.hidden_size, self.model.alt_up
        source = self.model.attention[index].kv_source
        kind = block.get_submodule("self_attn").layer_type
        shared: dict[Any, tuple[Tensor, Tensor]] = {}
        columns: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
            activations = args[0]
            columns[:] = [activations[..., states:]]
            shared.clear()
            if source is not None:
                shared[kind] = self._keys_and_values(activations, source)
            kwargs = kwargs | {"shared_kv_states": shared}
            if told is not None:
                kwargs["per_layer_input"] = told(activations[..., states].long())
            hidden = self.hidden(activations)
            if alt_up is not None:
                hidden = hidden.unflatten(-1, (-1, hidden_size)).permute(2, 0, 1, 3)
            return (hidden,), kwargs

        def give(_: nn.Module, __: Any, output: Any) -> Tensor:
            hidden = output[0] if isinstance(output, tuple) else output
            if alt_up is not None:
                hidden = hidden.permute(1, 2, 0, 3).flatten(2)
            activations = torch.cat([hidden, columns.pop()], dim=-1)
            if index in self._places:
                own = torch.stack(shared[kind]).permute(1, 3, 0, 2, 4).flatten(2)
                first = self._places[index]
                activations[..., first : first + own.shape[-1]] = own
            return activations

        block.register_forward_pre_hook(take, with_kwargs=True)
        block.register_forward_hook(give)

    def _keys_and_values(self, activations: Tensor, source: int) -> tuple[Tensor, Tensor]:
        """[n, kv heads, T, head_dim] each."""
        mixer, first = self.model.attention[source], self._places[source]
        width = 2 * mixer.num_kv_heads * mixer.head_dim
        found = activations[..., first : first + width]
        n, length = found.shape[:2]
        keys, values = found.view(n, length, 2, mixer.num_kv_heads, -1).permute(2, 0, 3, 1, 4)
        return keys, values
