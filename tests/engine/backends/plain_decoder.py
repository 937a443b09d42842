"""A decoder in float64, one token and one head at a time, written from the ModelSpec's docstrings alone: no paging, no
fusing, no broadcasting over heads. The independent reference of tests/engine/backends/test_declared_features.py."""

import math

import torch
from torch import Tensor

from nibble.architectures.base import Attention, GatedDeltaNet, ModelSpec, Rope
from nibble.quant.checkpoint import Checkpoint


def plain_logits(spec: ModelSpec, checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    """float64 [T, vocab]"""

    def weight(name: str) -> Tensor:
        return checkpoint.tensor(name).double()

    def norm(name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return x
        factor = weight(f"{name}.weight") + (1.0 if spec.norm_offset else 0.0)
        return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * factor

    embedding = weight(f"{spec.prefix}embed_tokens.weight")
    x = embedding[torch.tensor(ids)] * spec.embedding_scale
    for index, layer in enumerate(spec.layers):
        prefix, norms = f"{spec.layer_name(index)}.", layer.norms

        def named(name: str | None, prefix: str = prefix) -> str | None:
            return None if name is None else prefix + name

        h = norm(named(norms.before_mixer), x)
        if isinstance(layer.mixer, GatedDeltaNet):
            mixed = gated_delta_net(h, layer.mixer, spec.norm_eps, weight, f"{prefix}linear_attn.")
        else:
            mixed = attention(h, layer.mixer, weight, norm, f"{prefix}self_attn.")
        x = x + spec.residual_scale * norm(named(norms.after_mixer), mixed)
        h = norm(named(norms.before_mlp), x)
        if layer.mlp.fused:
            gate, up = (h @ weight(f"{prefix}mlp.gate_up_proj.weight").T).chunk(2, 1)
        else:
            gate, up = (h @ weight(f"{prefix}mlp.{name}_proj.weight").T for name in ("gate", "up"))
        inner = activate(gate, layer.mlp.activation) * up
        added = norm(named(norms.after_mlp), inner @ weight(f"{prefix}mlp.down_proj.weight").T)
        x = x + spec.residual_scale * added
    x = norm(f"{spec.prefix}norm", x)
    head = embedding if spec.tie_word_embeddings else weight("lm_head.weight")
    return cap(x @ head.T * spec.logits_scale, spec.final_soft_cap)


def attention(h: Tensor, spec: Attention, weight, norm, prefix: str) -> Tensor:
    """[T, hidden] -> [T, hidden]; weight and norm: by name."""
    heads, widths = spec.num_heads, [spec.num_heads, *[spec.num_kv_heads] * 2]
    if spec.fused:
        qkv = h @ weight(f"{prefix}qkv_proj.weight").T
        q, k, v = qkv.split([width * spec.head_dim for width in widths], 1)
    else:
        q, k, v = (h @ weight(f"{prefix}{name}_proj.weight").T for name in "qkv")
    if spec.qk_norm == "all":
        q = norm(f"{prefix}q_norm", q)
        k = norm(f"{prefix}k_norm", k)
    sinks = weight(f"{prefix}sinks") if spec.sinks else [None] * heads
    outputs = []
    for head in range(heads):
        shared, dim = head // (heads // spec.num_kv_heads), spec.head_dim
        own = q[:, head * dim :][:, :dim]
        if spec.output_gate:
            own, gate = q[:, 2 * head * dim :][:, : 2 * dim].split(dim, 1)
        keys, values = (x[:, shared * dim : (shared + 1) * dim] for x in (k, v))
        if spec.qk_norm == "head":
            own, keys = norm(f"{prefix}q_norm", own), norm(f"{prefix}k_norm", keys)
        mixed = attend(own, keys, values, spec, sinks[head])
        outputs.append(mixed / (1 + torch.exp(-gate)) if spec.output_gate else mixed)
    return torch.cat(outputs, 1) @ weight(f"{prefix}o_proj.weight").T


def gated_delta_net(h: Tensor, spec: GatedDeltaNet, eps: float, weight, prefix: str) -> Tensor:
    """[T, hidden] -> [T, hidden]; weight: by name."""
    qkv, z, b, a = (h @ weight(f"{prefix}in_proj_{x}.weight").T for x in ("qkv", "z", "b", "a"))
    filters = weight(f"{prefix}conv1d.weight")[:, 0]
    convolved = torch.zeros_like(qkv)
    for t in range(len(h)):
        for back in range(min(t + 1, spec.conv_kernel)):
            convolved[t] += filters[:, spec.conv_kernel - 1 - back] * qkv[t - back]
    qkv = activate(convolved, "silu")
    rates, biases = weight(f"{prefix}A_log").exp(), weight(f"{prefix}dt_bias")
    K, V, keys = spec.key_dim, spec.value_dim, spec.num_key_heads
    outputs = []
    for head in range(spec.num_value_heads):
        shared = head // (spec.num_value_heads // keys)
        q, k = (qkv[:, (first + shared) * K :][:, :K] for first in (0, keys))
        q, k = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        v = qkv[:, 2 * keys * K + head * V :][:, :V]
        state, rows = torch.zeros(K, V).double(), []
        for t in range(len(h)):
            decay = torch.exp(-rates[head] * torch.log1p(torch.exp(a[t, head] + biases[head])))
            state = decay * state
            missing = (v[t] - k[t] @ state) / (1 + torch.exp(-b[t, head]))
            state = state + torch.outer(k[t], missing)
            rows.append(q[t] / math.sqrt(K) @ state)
        o = torch.stack(rows)
        o = o / (o.square().mean(1, keepdim=True) + eps).sqrt() * weight(f"{prefix}norm.weight")
        outputs.append(o * activate(z[:, head * V :][:, :V], "silu"))
    return torch.cat(outputs, 1) @ weight(f"{prefix}out_proj.weight").T


def cap(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else limit * torch.tanh(x / limit)


def activate(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise NotImplementedError(name)


def attend(q: Tensor, k: Tensor, v: Tensor, spec: Attention, sink: Tensor | None) -> Tensor:
    """One head, [T, head_dim] each."""
    q, k = rotate(q, spec.rope), rotate(k, spec.rope)
    if spec.query_scaling is not None:
        beta, length = spec.query_scaling
        growth = [1 + beta * math.log(1 + t // length) for t in range(len(q))]
        q = q * torch.tensor(growth).double()[:, None]
    rows = []
    for t in range(len(q)):
        first = 0 if spec.window is None else max(0, t + 1 - spec.window)
        scores = cap(k[first : t + 1] @ q[t] * spec.scale, spec.soft_cap)
        masses = scores.exp()
        total = masses.sum() + (0.0 if sink is None else sink.exp())
        rows.append(masses / total @ v[first : t + 1])
    return torch.stack(rows)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Features i and i + dim/2 of the token at position t, as a complex number, times exp(i t frequency)."""
    if rope is None:
        return x
    dim = rope.dim or x.shape[1]
    frequencies = torch.tensor([frequency(i, dim, rope) for i in range(dim // 2)]).double()
    angles = torch.arange(len(x)).double()[:, None] * frequencies
    turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 : dim]) * torch.exp(1j * angles)
    return torch.cat(
        (turned.real * rope.attention_factor, turned.imag * rope.attention_factor, x[:, dim:]), 1
    )


def frequency(i: int, dim: int, rope: Rope) -> float:
    plain, given = rope.theta ** (-2 * i / dim), dict(rope.parameters)
    if rope.scaling == "default":
        return plain
    if rope.scaling == "linear":
        return plain / given["factor"]
    if rope.scaling == "llama3":
        context = given["original_max_position_embeddings"]
        turns = context * plain / (2 * math.pi)
        smooth = (turns - given["low_freq_factor"]) / (
            given["high_freq_factor"] - given["low_freq_factor"]
        )
        smooth = min(1.0, max(0.0, smooth))
        return (1 - smooth) * plain / given["factor"] + smooth * plain
    if rope.scaling == "yarn":
        context = given["original_max_position_embeddings"]

        def index(turns: float) -> float:  # of the frequency that turns so often in the context
            return dim / 2 * math.log(context / (2 * math.pi * turns)) / math.log(rope.theta)

        low, high = max(0, math.floor(index(32.0))), min(dim - 1, math.ceil(index(1.0)))
        share = min(1.0, max(0.0, (i - low) / (high - low)))
        return (1 - share) * plain + share * plain / given["factor"]
    raise NotImplementedError(rope.scaling)
