"""The norms of a layer, as data."""

from dataclasses import dataclass, field
from typing import ClassVar

_MODULE = {"role": "module"}  # a module's name; whether there is one is the feature


@dataclass(frozen=True, slots=True)
class Norms:
    """Module names of a layer's RMSNorms; None: there is none at that place."""

    KIND: ClassVar = "norms"
    before_mixer: str | None = field(default="input_layernorm", metadata=_MODULE)
    after_mixer: str | None = field(default=None, metadata=_MODULE)
    before_mlp: str | None = field(default="post_attention_layernorm", metadata=_MODULE)
    after_mlp: str | None = field(default=None, metadata=_MODULE)


SANDWICH = Norms(
    after_mixer="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
NORMS_AFTER = Norms(
    before_mixer=None,
    after_mixer="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
