"""A decoder in float64, one token and one head at a time, written from the ModelSpec's docstrings alone: no paging, no
fusing, no broadcasting over heads. The independent reference of tests/engine/backends/test_declared_features.py."""

import math

import torch
from torch import Tensor

from nibble.architectures.base import Attention, ModelSpec, Rope
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
        q, k, v = (h @ weight(f"{prefix}self_attn.{name}_proj.weight").T for name in "qkv")
        heads = layer.mixer.num_heads
        sinks = weight(f"{prefix}self_attn.sinks") if layer.mixer.sinks else [None] * heads
        outputs = []
        for head in range(heads):
            shared = head // (heads // layer.mixer.num_kv_heads)
            own = slice(head * layer.mixer.head_dim, (head + 1) * layer.mixer.head_dim)
            kv = slice(shared * layer.mixer.head_dim, (shared + 1) * layer.mixer.head_dim)
            queries, keys = q[:, own], k[:, kv]
            if layer.mixer.qk_norm:
                queries = norm(f"{prefix}self_attn.q_norm", queries)
                keys = norm(f"{prefix}self_attn.k_norm", keys)
            outputs.append(attend(queries, keys, v[:, kv], layer.mixer, sinks[head]))
        mixed = torch.cat(outputs, 1) @ weight(f"{prefix}self_attn.o_proj.weight").T
        x = x + norm(named(norms.after_mixer), mixed)
        h = norm(named(norms.before_mlp), x)
        gate, up = (h @ weight(f"{prefix}mlp.{name}_proj.weight").T for name in ("gate", "up"))
        inner = activate(gate, layer.mlp.activation) * up
        x = x + norm(named(norms.after_mlp), inner @ weight(f"{prefix}mlp.down_proj.weight").T)
    x = norm(f"{spec.prefix}norm", x)
    head = embedding if spec.tie_word_embeddings else weight("lm_head.weight")
    return cap(x @ head.T, spec.final_soft_cap)


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
    rows = []
    for t in range(len(q)):
        first = 0 if spec.window is None else max(0, t + 1 - spec.window)
        scores = cap(k[first : t + 1] @ q[t] * spec.scale, spec.soft_cap)
        masses = scores.exp()
        total = masses.sum() + (0.0 if sink is None else sink.exp())
        rows.append(masses / total @ v[first : t + 1])
    return torch.stack(rows)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Features i and i + dim/2 of the token at position t, as a complex number, times exp(i t frequency)."""
    dim = x.shape[1]
    frequencies = torch.tensor([frequency(i, dim, rope) for i in range(dim // 2)]).double()
    angles = torch.arange(len(x)).double()[:, None] * frequencies
    turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), 1)


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
    raise NotImplementedError(rope.scaling)
