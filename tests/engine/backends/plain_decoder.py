"""A decoder in float64, one token and one head at a time, written from the ModelSpec's docstrings alone: no paging, no
fusing, no broadcasting over heads. The independent reference of tests/engine/backends/test_declared_features.py."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nibble.architectures.base import (
    Attention,
    Experts,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    MlpBesideExperts,
    ModelSpec,
    PlainMlp,
    Rope,
    ShortConv,
)
from nibble.quant.checkpoint import Checkpoint


def plain_logits(spec: ModelSpec, checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    """float64 [T, vocab]"""

    def weight(name: str) -> Tensor:
        return checkpoint.tensor(name).double()

    def norm(name: str | None, x: Tensor, eps: float | None = None) -> Tensor:
        if name is None:
            return x
        factor = weight(f"{name}.weight") + (1.0 if spec.norm_offset else 0.0)
        return plain_norm(x, spec.norm_eps if eps is None else eps) * factor

    embedding = weight(f"{spec.prefix}{spec.embedding}.weight")
    x = embedding[torch.tensor(ids)] * spec.embedding_scale
    if spec.embedding_norm:
        x = plain_norm(x, spec.norm_eps)
    told = per_layer_inputs(spec, weight, x, ids)
    streams = start_streams(spec, weight, x)
    kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the layers that have their own
    for index, layer in enumerate(spec.layers):
        prefix, norms = f"{spec.layer_name(index)}.", layer.norms

        def named(name: str | None, prefix: str = prefix) -> str | None:
            return None if name is None else prefix + name

        mixer, mlp = layer.mixer, layer.mlp
        if spec.alt_up is not None:
            predicted = predict(spec, weight, norm, prefix, streams)
            x = predicted[spec.alt_up.active]
        h = norm(named(norms.before_mixer), x)
        if mixer is None:
            mixed = torch.zeros_like(x)
        elif isinstance(mixer, ShortConv):
            mixed = short_conv(h, mixer, weight, f"{prefix}conv.")
        elif isinstance(mixer, LatentAttention):
            mixed = latent_attention(h, mixer, weight, f"{prefix}self_attn.")
        elif isinstance(mixer, GatedDeltaNet):
            mixed = gated_delta_net(h, mixer, spec.norm_eps, weight, f"{prefix}linear_attn.")
        elif isinstance(mixer, Mamba2):
            mixed = mamba2(h, mixer, spec.norm_eps, weight, f"{prefix}{mixer.module}.")
        else:
            shared = None if mixer.kv_source is None else kept[mixer.kv_source]
            mixed, kept[index] = attention(h, mixer, weight, norm, prefix, shared, spec.norm_eps)
        x = x + spec.residual_scale * norm(named(norms.after_mixer), mixed, spec.after_norm_eps)
        if layer.laurel is not None:
            back = h @ weight(f"{prefix}laurel.linear_left.weight").T
            back = back @ weight(f"{prefix}laurel.linear_right.weight").T
            x = (x + h + norm(f"{prefix}laurel.post_laurel_norm", back)) / math.sqrt(2)
        h = norm(named(norms.before_mlp), x)

        def inside(name: str, prefix: str = prefix) -> Tensor:
            return weight(prefix + name)

        if mlp is None:
            added = torch.zeros_like(x)
        elif isinstance(mlp, Experts):
            added = torch.stack([expert_sum(row, mlp, inside) for row in h])
        elif isinstance(mlp, MlpBesideExperts):
            added = both(h, mlp, inside, lambda n, x, p=prefix: norm(p + n, x), spec.norm_eps)
        else:
            added = dense_mlp(h, mlp.names, mlp, inside)
        x = x + spec.residual_scale * norm(named(norms.after_mlp), added, spec.after_norm_eps)
        reads = x
        if spec.alt_up is not None:
            streams = correct(spec, weight, norm, prefix, predicted, x)
            reads = streams[spec.alt_up.active]
            if spec.alt_up.scaled:
                reads = reads * weight(f"{prefix}altup.correct_output_scale")
        if spec.per_layer_inputs is not None:
            gate = activate(
                reads @ weight(f"{prefix}per_layer_input_gate.weight").T,
                spec.per_layer_inputs.activation,
            )
            back = (gate * told[:, index]) @ weight(f"{prefix}per_layer_projection.weight").T
            back = norm(f"{prefix}post_per_layer_input_norm", back)
            x = x + back
            streams = [s + back if i else s for i, s in enumerate(streams)]
        if layer.scalar:
            x = x * weight(f"{prefix}layer_scalar")
            streams = [s * weight(f"{prefix}layer_scalar") for s in streams]
    if spec.alt_up is not None:
        x = end_streams(spec, weight, streams)
    offset = spec.norm_offset if spec.final_norm_offset is None else spec.final_norm_offset
    factor = weight(f"{spec.prefix}{spec.final_norm}.weight") + (1.0 if offset else 0.0)
    x = plain_norm(x, spec.norm_eps) * factor
    head = embedding if spec.tie_word_embeddings else weight(f"{spec.head}.weight")
    return cap(x @ head.T * spec.logits_scale, spec.final_soft_cap)


def plain_norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def both(
    x: Tensor, spec: MlpBesideExperts, weight: Callable[[str], Tensor], norm: Any, eps: float
) -> Tensor:
    before_mlp, after_mlp, before_experts, after_experts = spec.norms
    seen = plain_norm(x, eps) * weight(spec.router_scale) / math.sqrt(x.shape[1])
    rows = zip(norm(before_experts, x), seen, strict=True)
    scales = weight(spec.expert_scales).tolist()
    routed = [expert_sum(row, spec.experts, weight, what, scales) for row, what in rows]
    mlp = dense_mlp(norm(before_mlp, x), spec.mlp.names, spec.mlp, weight)
    return norm(after_mlp, mlp) + norm(after_experts, torch.stack(routed))


def as_long(x: Tensor, like: Tensor) -> Tensor:
    rows = []
    for row, other in zip(x, like, strict=True):
        wanted, found = (sum(number**2 for number in each.tolist()) for each in (other, row))
        rows.append(row * math.sqrt(wanted / max(found, 1e-5 * len(row))))
    return torch.stack(rows)


def start_streams(spec: ModelSpec, weight: Any, x: Tensor) -> list[Tensor]:
    if spec.alt_up is None:
        return []
    names = (f"{spec.prefix}{name}.weight" for name in spec.alt_up.projections)
    return [x, *(as_long(x @ weight(name).T, x) for name in names)]


def end_streams(spec: ModelSpec, weight: Any, streams: list[Tensor]) -> Tensor:
    x = streams[0]
    for stream, name in zip(streams[1:], spec.alt_up.unprojections, strict=True):
        x = x + as_long(stream @ weight(f"{spec.prefix}{name}.weight").T, streams[0])
    return x / len(streams)


def router(spec: ModelSpec, weight: Any, norm: Any, prefix: str, x: Tensor) -> Tensor:
    """[T, streams]"""
    normed = norm(f"{prefix}altup.router_norm", x) / spec.hidden_size
    return torch.tanh(normed @ weight(f"{prefix}altup.modality_router.weight").T)


def predict(spec: ModelSpec, weight: Any, norm: Any, prefix: str, streams: list[Tensor]) -> Any:
    n, seen = len(streams), router(spec, weight, norm, prefix, streams[spec.alt_up.active])
    said = seen @ weight(f"{prefix}altup.prediction_coefs.weight").T
    return [
        streams[to] + sum(said[:, to * n + i, None] * streams[i] for i in range(n))
        for to in range(n)
    ]


def correct(
    spec: ModelSpec, weight: Any, norm: Any, prefix: str, predicted: list[Tensor], x: Tensor
) -> list[Tensor]:
    said = router(spec, weight, norm, prefix, x)
    said = 1 + said @ weight(f"{prefix}altup.correction_coefs.weight").T
    news = x - predicted[spec.alt_up.active]
    return [stream + said[:, i, None] * news for i, stream in enumerate(predicted)]


def per_layer_inputs(spec: ModelSpec, weight: Any, x: Tensor, ids: list[int]) -> Tensor | None:
    """[T, layers, width], from what is embedded, and the token's own."""
    if (told := spec.per_layer_inputs) is None:
        return None
    seen = x @ weight(f"{spec.prefix}per_layer_model_projection.weight").T / math.sqrt(x.shape[1])
    seen = seen.view(len(ids), spec.num_layers, told.width)
    seen = seen / (seen.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
    factor = weight(f"{spec.prefix}per_layer_projection_norm.weight")
    rows = torch.tensor([token if token < told.vocab_size else 0 for token in ids])
    own = weight(f"{spec.prefix}embed_tokens_per_layer.weight")[rows]
    own = own.view(seen.shape) * math.sqrt(told.width)
    return (seen * (factor + (1.0 if spec.norm_offset else 0.0)) + own) / math.sqrt(2)


def dense_mlp(
    x: Tensor, names: tuple[str, ...], of: Any, weight: Callable[[str], Tensor]
) -> Tensor:
    """By the names of its modules; of: what says its activation, and whether it is plain."""
    *ups, down = (weight(f"{name}.weight") for name in names)
    if isinstance(of, PlainMlp) or getattr(of, "plain", False):
        return activate(x @ ups[0].T, of.activation) @ down.T
    gate, up = ups if len(ups) == 2 else ups[0].chunk(2)
    return gated_mlp(x, gate, up, down, of.activation, getattr(of, "sparsity", 0.0))


def gated_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str, sparsity: float = 0.0
) -> Tensor:
    gates = x @ gate.T
    if sparsity:
        where = torch.distributions.Normal(0, 1).icdf(torch.tensor(sparsity).double())
        spread = gates.var(1, correction=0, keepdim=True).sqrt()
        gates = (gates - gates.mean(1, keepdim=True) - where * spread).clamp(min=0)
    return (activate(gates, activation) * (x @ up.T)) @ down.T


def expert_sum(
    x: Tensor,
    spec: Experts,
    weight: Callable[[str], Tensor],
    routed: Tensor | None = None,
    scales: list[float] | None = None,
) -> Tensor:
    """Of one token [hidden]. routed: what the router reads, if not x; scales: of the experts' weights."""
    logits = (weight(f"{spec.names.router}.weight") @ (x if routed is None else routed)).tolist()
    if spec.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    elif spec.scoring == "softmax":
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    else:
        raise NotImplementedError(spec.scoring)
    bias = [0.0] * len(scores)
    if spec.correction_bias:
        bias = weight(spec.names.correction_bias).tolist()
    ranks = [score + more for score, more in zip(scores, bias, strict=True)]
    allowed = list(range(len(ranks)))
    if spec.limited_groups is not None:
        count, best = spec.limited_groups
        size = len(ranks) // count
        groups = [range(g * size, (g + 1) * size) for g in range(count)]
        groups.sort(key=lambda group: -sum(sorted(ranks[e] for e in group)[-spec.group_rank :]))
        allowed = [expert for group in groups[:best] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -ranks[expert])[: spec.top_k]
    total = sum(scores[expert] for expert in chosen) if spec.norm_weights else 1.0

    def mlp(x: Tensor, *names: str) -> Tensor:
        if spec.clamp is None:
            return dense_mlp(x, names, spec, weight)
        alpha, limit = spec.clamp
        gate, up, down = (weight(f"{name}.weight") for name in names)
        g, u = (x @ gate.T).clamp(max=limit), (x @ up.T).clamp(-limit, limit)
        return ((u + 1) * g / (1 + torch.exp(-alpha * g))) @ down.T

    latent = spec.latent_size is not None
    read = weight(f"{spec.names.latent[0]}.weight") @ x if latent else x
    y = torch.zeros_like(read)
    for e in chosen:
        names = (spec.names.gate, spec.names.up, spec.names.down)[spec.plain :]
        share = spec.routed_scale * scores[e] / total * (1.0 if scales is None else scales[e])
        y = y + share * mlp(read, *(name.replace("*", str(e)) for name in names))
    if latent:
        y = weight(f"{spec.names.latent[1]}.weight") @ y
    if spec.shared is not None:
        added = mlp(x, *(f"{spec.names.shared}.{name}" for name in spec.names.shared_linears))
        if spec.shared.gated:
            added = added / (1 + torch.exp(-weight(f"{spec.names.shared_gate}.weight") @ x))
        y = y + added
    return y


def attention(
    h: Tensor,
    spec: Attention,
    weight: Any,
    norm: Any,
    layer: str,
    shared: tuple[list[Tensor], list[Tensor]] | None,
    eps: float,
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
    """[T, hidden] -> [T, hidden], and the rotated keys and the values of each head; weight and norm: by name. shared:
    those of another layer."""
    heads, dim, gates = spec.num_heads, spec.head_dim, None
    prefix = f"{layer}{spec.module}."
    names = spec.head_norms or (None, None)
    q_norm, k_norm = (None if name is None else layer + name for name in names)
    if spec.fused:
        qkv = h @ weight(f"{prefix}qkv_proj.weight").T
        q, k, v = qkv.split([count * dim for count in (heads, *[spec.num_kv_heads] * 2)], 1)
    else:
        q = h @ weight(f"{prefix}q_proj.weight").T
        if shared is None:
            k = v = h @ weight(f"{prefix}k_proj.weight").T
            if not spec.keys_are_values:
                v = h @ weight(f"{prefix}v_proj.weight").T
    if spec.output_gate == "q_proj":
        pairs = q.split(dim, 1)
        q, gates = torch.cat(pairs[::2], 1), pairs[1::2]
    elif spec.output_gate is not None:
        gates = (h @ weight(f"{prefix}gate_proj.weight").T).split(dim, 1)
    if spec.head_gate:
        gates = (h @ weight(f"{layer}{spec.gate}.weight").T).split(1, 1)
    if spec.qk_norm == "all":
        q, k = norm(q_norm, q), norm(k_norm, k)
    queries = list(q.split(dim, 1))

    def norm_head(name: str | None, x: Tensor) -> Tensor:
        return plain_norm(x, eps) if name is None else norm(name, x)

    if spec.qk_norm == "head":
        queries = [norm_head(q_norm, each) for each in queries]
    if shared is None:
        keys, values = list(k.split(dim, 1)), list(v.split(dim, 1))
        if spec.qk_norm == "head":
            keys = [norm_head(k_norm, each) for each in keys]
        if spec.v_norm:
            values = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in values]
        shared = [rotate(each, spec.rope) for each in keys], values
    sinks = weight(f"{prefix}sinks") if spec.sinks else [None] * heads
    outputs = []
    for head, query in enumerate(queries):
        at = head // (heads // spec.num_kv_heads)
        mixed = attend(query, shared[0][at], shared[1][at], spec, sinks[head])
        outputs.append(mixed if gates is None else mixed / (1 + torch.exp(-gates[head])))
    return torch.cat(outputs, 1) @ weight(f"{layer}{spec.out}.weight").T, shared


def latent_attention(h: Tensor, spec: LatentAttention, weight: Any, prefix: str) -> Tensor:
    """[T, hidden] -> [T, hidden]; weight: by name. Keys and values of every head are made of the latents."""

    def norm(name: str, x: Tensor) -> Tensor:
        unit = x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
        return unit * weight(f"{prefix}{name}.weight")

    if spec.q_rank is None:
        queries = h @ weight(f"{prefix}q_proj.weight").T
    else:
        low = norm("q_a_layernorm", h @ weight(f"{prefix}q_a_proj.weight").T)
        queries = low @ weight(f"{prefix}q_b_proj.weight").T
    made = h @ weight(f"{prefix}kv_a_proj_with_mqa.weight").T
    latents = norm("kv_a_layernorm", made[:, : spec.kv_rank])
    shared = rotate(made[:, spec.kv_rank :], spec.rope)
    pairs = (latents @ weight(f"{prefix}kv_b_proj.weight").T).chunk(spec.num_heads, 1)
    outputs = []
    for query, pair in zip(queries.chunk(spec.num_heads, 1), pairs, strict=True):
        q, p = query[:, : spec.nope_dim], rotate(query[:, spec.nope_dim :], spec.rope)
        keys, values = pair[:, : spec.nope_dim], pair[:, spec.nope_dim :]
        rows = []
        for t in range(len(h)):
            growth = 1.0
            if spec.query_scaling is not None:
                beta, length = spec.query_scaling
                growth += beta * math.log(1 + t // length)
            scores = keys[: t + 1] @ q[t] + shared[: t + 1] @ p[t]
            rows.append((scores * spec.scale * growth).softmax(0) @ values[: t + 1])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, 1) @ weight(f"{prefix}o_proj.weight").T


def short_conv(h: Tensor, spec: ShortConv, weight: Any, prefix: str) -> Tensor:
    """[T, hidden] -> [T, hidden]; weight: by name."""
    before, after, x = (h @ weight(f"{prefix}in_proj.weight").T).chunk(3, 1)
    gated, filters = before * x, weight(f"{prefix}conv.weight")[:, 0]
    mixed = torch.zeros_like(gated)
    for t in range(len(h)):
        for back in range(min(t + 1, spec.conv_kernel)):
            mixed[t] += filters[:, spec.conv_kernel - 1 - back] * gated[t - back]
    if spec.bias:
        mixed += weight(f"{prefix}conv.bias")
    return (after * mixed) @ weight(f"{prefix}out_proj.weight").T


def by_key_head(h: Tensor, spec: GatedDeltaNet, weight, prefix: str) -> tuple[Tensor, ...]:
    """q k v, z, b, a, of which each key head's lie together."""
    K, V = spec.key_dim, spec.num_value_heads // spec.num_key_heads * spec.value_dim
    parts: list[list[Tensor]] = [[] for _ in range(6)]
    both = h @ weight(f"{prefix}in_proj_qkvz.weight").T, h @ weight(f"{prefix}in_proj_ba.weight").T
    for qkvz, ba in zip(*(x.chunk(spec.num_key_heads, 1) for x in both), strict=True):
        found = (*qkvz.split((K, K, V, V), 1), *ba.chunk(2, 1))
        for part, x in zip(parts, found, strict=True):
            part.append(x)
    q, k, v, z, b, a = (torch.cat(part, 1) for part in parts)
    return torch.cat((q, k, v), 1), z, b, a


def gated_delta_net(h: Tensor, spec: GatedDeltaNet, eps: float, weight, prefix: str) -> Tensor:
    """[T, hidden] -> [T, hidden]; weight: by name."""
    if spec.fused:
        qkv, z, b, a = by_key_head(h, spec, weight, prefix)
    else:
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


def mamba2(h: Tensor, spec: Mamba2, eps: float, weight, prefix: str) -> Tensor:
    """[T, hidden] -> [T, hidden]; weight: by name."""
    H, P, N, G = spec.num_heads, spec.head_dim, spec.state_dim, spec.num_groups
    rows = h @ weight(f"{prefix}in_proj.weight").T
    z, xbc, steps = rows.split((H * P, H * P + 2 * G * N, H), 1)
    filters = weight(f"{prefix}conv1d.weight")[:, 0]
    convolved = torch.zeros_like(xbc)
    for t in range(len(h)):
        for back in range(min(t + 1, spec.conv_kernel)):
            convolved[t] += filters[:, spec.conv_kernel - 1 - back] * xbc[t - back]
    if spec.conv_bias:
        convolved += weight(f"{prefix}conv1d.bias")
    xbc = activate(convolved, "silu")
    rates, biases, skips = (weight(f"{prefix}{name}") for name in ("A_log", "dt_bias", "D"))
    outputs = []
    for head in range(H):
        group = head // (H // G)
        x = xbc[:, head * P :][:, :P]
        b, c = (xbc[:, H * P + (first + group) * N :][:, :N] for first in (0, G))
        state, ys = torch.zeros(N, P).double(), []
        for t in range(len(h)):
            step = math.log1p(math.exp(steps[t, head] + biases[head]))
            step = min(max(step, spec.time_step_limit[0]), spec.time_step_limit[1])
            decay = math.exp(-math.exp(rates[head]) * step)
            state = decay * state + torch.outer(b[t], step * x[t])
            ys.append(c[t] @ state + skips[head] * x[t])
        outputs.append(torch.stack(ys) * activate(z[:, head * P :][:, :P], "silu"))
    groups = torch.cat(outputs, 1).chunk(G, 1)
    normed = [y / (y.square().mean(1, keepdim=True) + eps).sqrt() for y in groups]
    normed = torch.cat(normed, 1) * weight(f"{prefix}norm.weight")
    return normed @ weight(f"{prefix}out_proj.weight").T


def cap(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else limit * torch.tanh(x / limit)


def activate(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu2":
        return x * x * (x > 0)
    raise NotImplementedError(name)


def attend(q: Tensor, k: Tensor, v: Tensor, spec: Attention, sink: Tensor | None) -> Tensor:
    """One head, [T, head_dim] each; keys have been rotated."""
    q = rotate(q, spec.rope)
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
    """Features i and i + dim/2 (2 i and 2 i + 1, interleaved) of the token at position t, as a complex number, times
    exp(i t frequency): that of the long factors, where there are any and more tokens than the others are for."""
    if rope is None:
        return x
    dim = rope.dim or x.shape[1]
    if rope.interleaved:
        order = [*range(0, dim, 2), *range(1, dim, 2), *range(dim, x.shape[1])]
        back = torch.tensor(order).argsort()
        return rotate(x[:, order], replace(rope, interleaved=False))[:, back]
    frequencies = torch.tensor([frequency(i, dim, rope) for i in range(dim // 2)]).double()
    if rope.long is not None and len(x) > rope.long.beyond:
        plain = [rope.theta ** (-2 * i / dim) for i in range(dim // 2)]
        frequencies = torch.tensor(plain).double() / torch.tensor(rope.long.factors)
    angles = torch.arange(len(x)).double()[:, None] * frequencies
    turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 : dim]) * torch.exp(1j * angles)
    return torch.cat(
        (turned.real * rope.attention_factor, turned.imag * rope.attention_factor, x[:, dim:]), 1
    )


def frequency(i: int, dim: int, rope: Rope) -> float:
    plain, given = rope.theta ** (-2 * i / dim), dict(rope.parameters)
    if rope.scaling == "default":
        return plain
    if rope.scaling == "longrope":
        return plain / given[str(i)]
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
    if rope.scaling == "proportional":
        return plain / given["factor"] if 2 * i < given["share"] * dim else 0.0
    if rope.scaling == "yarn":
        context = given["original_max_position_embeddings"]

        def index(turns: float) -> float:  # of the frequency that turns so often in the context
            return dim / 2 * math.log(context / (2 * math.pi * turns)) / math.log(rope.theta)

        low, high = max(0, math.floor(index(32.0))), min(dim - 1, math.ceil(index(1.0)))
        share = min(1.0, max(0.0, (i - low) / (high - low)))
        return (1 - share) * plain + share * plain / given["factor"]
    raise NotImplementedError(rope.scaling)
