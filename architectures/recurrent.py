"""Mixers that carry a state from token to token instead of keys and values, as data."""

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

from .linears import Fold, LinearGroup


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """Linear attention whose state each token decays and corrects (gated delta rule, Yang et al. 2024), per value head:

    [q k v] = silu(conv(qkv)), z, b, a: linears of x; conv: causal, one filter of conv_kernel taps for each channel
    q = q / |q| / sqrt(key_dim), k = k / |k|, beta = sigmoid(b), decay = exp(-exp(A_log) * softplus(a + dt_bias))
    S = decay * S;  S = S + k (beta * (v - S^T k))^T;  o = S^T q     S [key_dim, value_dim], zeros before token 0
    out(norm(o) * w * silu(z))

    Each key head serves num_value_heads / num_key_heads consecutive value heads. What a request carries from token to
    token: S, and the last conv_kernel - 1 inputs of the convolution.
    """

    KIND: ClassVar = "gated_delta_net"
    as_stored: ClassVar = ("linear_attn.A_log", "linear_attn.dt_bias")  # exponents, never rounded
    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int
    conv_kernel: int  # taps, the token's own included
    # the linears of x are two, their rows those of one key head and its value heads after the other: q, k, v, z; b, a
    fused: bool = field(default=False, metadata={"role": "detail"})

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values side by side."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what a request carries, in float32: the convolution's last inputs, oldest first, and S of every value
        head."""
        return (
            (self.conv_kernel - 1, self.channels),
            (self.num_value_heads, self.key_dim, self.value_dim),
        )

    def groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup, LinearGroup]:
        """q, k, v and z; b, a; out."""
        values = self.num_value_heads * self.value_dim
        out = LinearGroup(("linear_attn.out_proj",), (hidden_size,), values, "row")
        if self.fused:
            return (*self._fused_groups(hidden_size), out)
        names = tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a"))
        return (
            LinearGroup(names[:2], (self.channels, values), hidden_size, "column"),
            LinearGroup(names[2:], (self.num_value_heads,) * 2, hidden_size, "column", dense=True),
            out,
        )

    def _fused_groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup]:
        shared = self.num_value_heads // self.num_key_heads
        found = []
        for name, sizes, dense in (
            ("qkvz", (self.key_dim, self.key_dim, *[shared * self.value_dim] * 2), False),
            ("ba", (shared, shared), True),
        ):
            of_head = sum(sizes)
            order = tuple(
                (head * of_head + sum(sizes[:i]), head * of_head + sum(sizes[: i + 1]))
                for i in range(len(sizes))
                for head in range(self.num_key_heads)
            )
            module, rows = f"linear_attn.in_proj_{name}", (self.num_key_heads * of_head,)
            found.append(LinearGroup((module,), rows, hidden_size, "column", None, dense, order))
        return found[0], found[1]

    def folds(self, norm: str | None) -> tuple[Fold, ...]:
        """norm: before it."""
        qkv_z, b_a, _ = self.groups(1)
        return () if norm is None else (Fold("norm", norm, qkv_z.modules, b_a.modules),)


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A state space that each token decays and writes to (Mamba-2, Dao and Gu 2024), per head:

    [z | x B C | dt] = in(h), rows side by side;  [x B C] = silu(conv([x B C])), conv as in GatedDeltaNet
    dt = softplus(dt + dt_bias), within time_step_limit;  decay = exp(-exp(A_log) * dt)
    S = decay * S + B (dt * x)^T;  y = S^T C + D * x           S [state_dim, head_dim], zeros before token 0
    out(norm(y * silu(z)) * w)                                 norm: RMS of the heads of one group side by side

    Each of num_groups B and C serves num_heads / num_groups consecutive heads. What a request carries from token to
    token: S, and the last conv_kernel - 1 inputs of the convolution.
    """

    KIND: ClassVar = "mamba2"
    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_kernel: int  # taps, the token's own included
    conv_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, inf)
    module: str = field(default="mamba", metadata={"role": "detail"})

    @property
    def as_stored(self) -> tuple[str, ...]:
        """Exponents and what is added to them, never rounded."""
        return tuple(f"{self.module}.{name}" for name in ("A_log", "dt_bias", "D"))

    @property
    def values(self) -> int:
        """Numbers of x, of all heads."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C side by side."""
        return self.values + 2 * self.num_groups * self.state_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Of what a request carries, in float32: the convolution's last inputs, oldest first, and S of every head."""
        return (
            (self.conv_kernel - 1, self.channels),
            (self.num_heads, self.state_dim, self.head_dim),
        )

    def groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup]:
        """z, x, B, C and dt; out.

        The rows of dt choose how fast a state decays, and would rather be exact. But checkpoints have one matrix for
        all, two thirds of the mixer's weights, and no format keeps some of a matrix's rows in 16 bits. Rows have
        scales of their own, so that its many others cost those of dt nothing. vLLM reads in_proj quantized.
        """
        rows = self.values + self.channels + self.num_heads
        return (
            LinearGroup((f"{self.module}.in_proj",), (rows,), hidden_size, "column"),
            LinearGroup((f"{self.module}.out_proj",), (hidden_size,), self.values, "row"),
        )

    def folds(self, norm: str | None) -> tuple[Fold, ...]:
        """norm: before it. The gated norm's own factor is the last thing before out."""
        inputs, out = self.groups(1)
        before = () if norm is None else (Fold("norm", norm, inputs.modules),)
        return (*before, Fold("norm", f"{self.module}.norm", out.modules))


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A causal convolution of a few taps, one filter a channel, gated before and after: B, C, x = parts of in(h);
    out(C * conv(B * x)). What a request carries: the last conv_kernel - 1 of B * x."""

    KIND: ClassVar = "short_conv"
    as_stored: ClassVar = ()
    channels: int  # the hidden size
    conv_kernel: int  # taps, the token's own included
    bias: bool = False  # of the convolution

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what a request carries, in float32: the convolution's last inputs, oldest first."""
        return ((self.conv_kernel - 1, self.channels),)

    def groups(self, hidden_size: int) -> tuple[LinearGroup, LinearGroup]:
        """B, C, x; out."""
        return (
            LinearGroup(("conv.in_proj",), (3 * self.channels,), hidden_size, "column"),
            LinearGroup(("conv.out_proj",), (hidden_size,), self.channels, "row"),
        )

    def folds(self, norm: str | None) -> tuple[Fold, ...]:
        """norm: before it. x, the last third of in's rows, goes through the convolution channel by channel."""
        inputs, out = self.groups(1)
        found = () if norm is None else (Fold("norm", norm, inputs.modules),)
        return found if self.bias else (*found, Fold("rows", inputs.modules[0], out.modules))
