"""Latent attention as data: keys and values of all heads are made from one short vector of a token."""

from dataclasses import dataclass
from typing import ClassVar

from .linears import Fold, LinearGroup
from .rope import Rope


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1):

    [c r] = kv_a(x);  c = norm(c) [kv_rank], r = rotate(r) [rope_dim]     kept of a token, the same for all heads
    [q p] of each head = q_b(norm(q_a(x))), or q(x) where q_rank is None;  p = rotate(p)
    [k v] of each head = kv_b(c)
    out(softmax(scale * (q . k + p . r)) v)                               over everything up to the token

    q and k have nope_dim dimensions, p rope_dim, v value_dim. As q . k = (q W_k) . c, with W_k the rows of kv_b that
    make k, and likewise for v, the latents may themselves be attended to, as the keys and values of one head.
    """

    KIND: ClassVar = "latent_attention"
    as_stored: ClassVar = ()
    num_heads: int
    q_rank: int | None  # None: queries are made at once
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    norm_eps: float  # of the norms of q_a's and kv_a's outputs
    # (beta, length): queries are multiplied by 1 + beta * log(1 + position // length)
    query_scaling: tuple[float, int] | None = None

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: it has latents instead."""
        return ()

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """(vectors, dimensions) in the cache for each token."""
        return (1, self.kv_rank), (1, self.rope_dim)

    @property
    def rotation(self) -> tuple[Rope, int]:
        """And how many dimensions it is meant for."""
        return self.rope, self.rope_dim

    @property
    def numbers_per_token(self) -> int:
        """What the heads of a token have beside what the widest linear gives: queries in float32, queries as wide as a
        latent, and what these find."""
        return self.num_heads * (2 * self.head_dim + 2 * self.kv_rank + self.rope_dim)

    @property
    def head_dim(self) -> int:
        """Of a query."""
        return self.nope_dim + self.rope_dim

    def groups(self, hidden_size: int) -> tuple[LinearGroup, ...]:
        """q_a (or q), kv_a; q_b, if there is one; kv_b; out."""
        queries, latents = self.num_heads * self.head_dim, self.kv_rank + self.rope_dim
        first, width = ("q_proj", queries) if self.q_rank is None else ("q_a_proj", self.q_rank)
        found = [
            (("self_attn.q_b_proj",), (queries,), width),
            (
                ("self_attn.kv_b_proj",),
                (self.num_heads * (self.nope_dim + self.value_dim),),
                self.kv_rank,
            ),
        ]
        names = f"self_attn.{first}", "self_attn.kv_a_proj_with_mqa"
        out = ("self_attn.o_proj",), (hidden_size,), self.num_heads * self.value_dim
        return (
            LinearGroup(names, (width, latents), hidden_size, "column"),
            *(LinearGroup(*each, "column") for each in found[self.q_rank is None :]),
            LinearGroup(*out, "row"),
        )

    def folds(self, norm: str | None) -> tuple[Fold, ...]:
        """norm: before it. The rows of kv_b that make values go into the columns of out head by head."""
        inputs, *middle, out = self.groups(1)
        before = () if norm is None else (Fold("norm", norm, inputs.modules),)
        norms = ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")[self.q_rank is None :]
        inside = (
            Fold("norm", name, each.modules) for name, each in zip(norms, middle, strict=True)
        )
        size = self.nope_dim + self.value_dim
        values = tuple((i * size + self.nope_dim, (i + 1) * size) for i in range(self.num_heads))
        return (*before, *inside, Fold("rows", middle[-1].modules[0], out.modules, rows=values))
