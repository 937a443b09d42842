"""Nothing is ever silently left out: every field and kind of a ModelSpec, on every backend, is computed as plain
float64 arithmetic says, or refused in words.

The walk is over the dataclasses themselves: a field that is added has no entry in CHANGES and fails here until it has.
"""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nibble.architectures import base
from nibble.architectures.base import (
    NORMS_AFTER,
    SANDWICH,
    AltUp,
    Attention,
    ExpertNames,
    Experts,
    GatedDeltaNet,
    GatedMlp,
    LatentAttention,
    Laurel,
    LayerSpec,
    LongFactors,
    Mamba2,
    MlpBesideExperts,
    ModelSpec,
    Norms,
    PerLayerInputs,
    PlainMlp,
    Rope,
    SharedExpert,
    ShortConv,
    experts_of,
    features,
)
from nibble.architectures.registry import ARCHITECTURES
from nibble.engine.backends.base import Backend, KernelReport, Target
from nibble.engine.backends.batch import Batch
from nibble.engine.backends.choose import assign, load_decoder
from nibble.engine.backends.cpp.loader import CppBackend
from nibble.engine.backends.runs import ChainedDecoder
from nibble.engine.backends.torch.loader import TorchBackend
from nibble.engine.backends.triton.loader import TritonBackend
from nibble.engine.config import EngineConfig
from nibble.engine.request import Request
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import StepResult
from nibble.errors import UnsupportedError
from nibble.quant.checkpoint import FolderCheckpoint

from ...architectures.test_specs import NEEDED
from .plain_decoder import plain_logits

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 199, 3
LLAMA3 = (
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64.0),
)
YARN = (
    ("factor", 4.0),
    ("original_max_position_embeddings", 64.0),
    ("beta_fast", 32.0),
    ("beta_slow", 1.0),
    ("truncate", 1.0),
)
LONGROPE = tuple((str(i), 1.0 + i / 4) for i in range(8))
LONG = LongFactors(30, tuple(3.0 + i / 2 for i in range(8)))  # prompts have 41 tokens
ATTENTION = Attention(HEADS, KV_HEADS, DIM, 0.3, Rope(10000.0))
DELTA_NET = GatedDeltaNet(2, 4, 16, 32, 4)
LATENT = LatentAttention(HEADS, 48, 32, 32, 16, 16, 0.15, Rope(10000.0), 1e-3)
MAMBA = Mamba2(4, 16, 32, 2, 4)
LAYER = LayerSpec(ATTENTION, GatedMlp(INNER, "silu"))
MIXER_ALONE = LayerSpec(ATTENTION, None, Norms(before_mlp=None))
MLP_ALONE = LayerSpec(None, GatedMlp(INNER, "silu"), Norms(before_mixer=None))
READER = replace(ATTENTION, kv_source=0, num_heads=8)
TOLD = PerLayerInputs(16, VOCAB, "gelu_tanh")
STREAMS = AltUp(4, 0)
EXPERTS = Experts(8, 3, 48, "silu")
BESIDE = MlpBesideExperts(GatedMlp(INNER, "silu"), EXPERTS)
SUMMED = replace(SANDWICH, before_mlp=None)
PLAIN_NAMES = ExpertNames(shared_linears=("up_proj", "down_proj"))
MODEL = ModelSpec(HIDDEN, VOCAB, 256, 1e-6, (LAYER,) * LAYERS, False)


def with_layers(**changes) -> ModelSpec:
    return replace(MODEL, layers=(replace(LAYER, **changes),) * LAYERS)


def with_attention(**changes) -> ModelSpec:
    return with_layers(mixer=replace(ATTENTION, **changes))


def with_experts(**changes) -> ModelSpec:
    """In the middle layer of three."""
    experts = replace(LAYER, mlp=replace(EXPERTS, **changes))
    return replace(MODEL, layers=(LAYER, experts, LAYER))


def with_both(**changes) -> ModelSpec:
    """An MLP beside experts in the middle layer of three."""
    both = replace(LAYER, mlp=replace(BESIDE, **changes), norms=SUMMED)
    return replace(MODEL, layers=(LAYER, both, LAYER))


def with_delta_net(**changes) -> ModelSpec:
    """In its first two layers."""
    recurrent = replace(LAYER, mixer=replace(DELTA_NET, **changes))
    return replace(MODEL, layers=(recurrent, recurrent, LAYER))


def with_short_conv(**changes) -> ModelSpec:
    """In its first two layers."""
    recurrent = replace(LAYER, mixer=replace(ShortConv(HIDDEN, 3), **changes))
    return replace(MODEL, layers=(recurrent, recurrent, LAYER))


def with_latents(**changes) -> ModelSpec:
    """In its last two layers."""
    latent = replace(LAYER, mixer=replace(LATENT, **changes))
    return replace(MODEL, layers=(LAYER, latent, latent))


def with_mamba(**changes) -> ModelSpec:
    """In its first two layers."""
    recurrent = replace(LAYER, mixer=replace(MAMBA, **changes))
    return replace(MODEL, layers=(recurrent, recurrent, LAYER))


# (class, field) -> models in which it has another value than in MODEL
CHANGES: dict[tuple[str, str], list[ModelSpec]] = {
    ("Rope", "theta"): [with_attention(rope=Rope(500.0))],
    ("Rope", "scaling"): [
        with_attention(rope=Rope(10000.0, "linear", (("factor", 4.0),))),
        with_attention(rope=Rope(10000.0, "llama3", LLAMA3)),
        with_attention(rope=Rope(10000.0, "yarn", YARN)),
        with_attention(rope=Rope(10000.0, "proportional", (("share", 0.5), ("factor", 2.0)))),
        with_attention(rope=Rope(10000.0, "longrope", LONGROPE)),
        with_attention(rope=Rope(10000.0, "dynamic")),
    ],
    ("Rope", "parameters"): [with_attention(rope=Rope(10000.0, "linear", (("factor", 2.0),)))],
    ("Rope", "dim"): [with_attention(rope=Rope(10000.0, dim=8))],
    ("Rope", "attention_factor"): [with_attention(rope=Rope(10000.0, attention_factor=1.3))],
    ("Rope", "interleaved"): [
        with_attention(rope=Rope(10000.0, interleaved=True)),
        with_attention(rope=Rope(10000.0, dim=8, interleaved=True)),
        with_latents(rope=Rope(10000.0, interleaved=True)),
    ],
    ("Rope", "long"): [
        with_attention(rope=Rope(10000.0, "longrope", LONGROPE, long=LONG)),
        with_latents(rope=Rope(10000.0, "longrope", LONGROPE, attention_factor=1.3, long=LONG)),
        replace(  # beside a layer that has no others
            MODEL,
            layers=(
                LAYER,
                replace(LAYER, mixer=replace(ATTENTION, rope=Rope(500.0, long=LONG))),
                replace(LAYER, mixer=replace(ATTENTION, rope=None)),
            ),
        ),
    ],
    ("LongFactors", "beyond"): [
        with_attention(rope=Rope(10000.0, "longrope", LONGROPE, long=replace(LONG, beyond=n)))
        for n in (40, 41)
    ],
    ("LongFactors", "factors"): [
        with_attention(rope=Rope(10000.0, long=replace(LONG, factors=(2.0,) * 8)))
    ],
    ("Attention", "num_heads"): [with_attention(num_heads=6)],
    ("Attention", "num_kv_heads"): [with_attention(num_kv_heads=4)],
    ("Attention", "head_dim"): [with_attention(head_dim=32), with_attention(head_dim=8)],
    ("Attention", "scale"): [with_attention(scale=0.1)],
    ("Attention", "rope"): [
        replace(
            MODEL,
            layers=tuple(
                replace(LAYER, mixer=replace(ATTENTION, rope=Rope(theta)))
                for theta in (10000.0, 100.0, 1e6)
            ),
        ),
        with_attention(rope=None),
        replace(MODEL, layers=(LAYER, replace(LAYER, mixer=replace(ATTENTION, rope=None)), LAYER)),
    ],
    ("Attention", "window"): [with_attention(window=7)],
    ("Attention", "qk_norm"): [with_attention(qk_norm="head"), with_attention(qk_norm="all")],
    ("Attention", "query_scaling"): [with_attention(query_scaling=(0.5, 8))],
    ("Attention", "fused"): [with_attention(fused=True)],
    ("Attention", "soft_cap"): [with_attention(soft_cap=0.7)],
    ("Attention", "sinks"): [with_attention(sinks=True)],
    ("Attention", "v_norm"): [with_attention(v_norm=True)],
    ("Attention", "keys_are_values"): [
        with_attention(keys_are_values=True, qk_norm="head", v_norm=True),
        with_attention(keys_are_values=True, qk_norm="all"),
    ],
    ("Attention", "kv_source"): [
        replace(MODEL, layers=(LAYER, replace(LAYER, mixer=READER), replace(LAYER, mixer=READER))),
        replace(
            MODEL,
            layers=(LAYER, replace(LAYER, mixer=replace(READER, soft_cap=0.7, window=9)), LAYER),
        ),
    ],
    ("Attention", "output_gate"): [
        with_attention(output_gate="q_proj"),
        with_attention(output_gate="q_proj", qk_norm="head"),
        with_attention(output_gate="gate_proj"),
        with_attention(output_gate="gate_proj", qk_norm="all"),
        with_attention(output_gate="gate_proj", qk_norm="head", keys_are_values=True),
    ],
    ("LatentAttention", "num_heads"): [with_latents(num_heads=20)],
    ("LatentAttention", "q_rank"): [with_latents(q_rank=None), with_latents(q_rank=32)],
    ("LatentAttention", "kv_rank"): [with_latents(kv_rank=48)],
    ("LatentAttention", "nope_dim"): [with_latents(nope_dim=16), with_latents(nope_dim=24)],
    ("LatentAttention", "rope_dim"): [with_latents(rope_dim=32)],
    ("LatentAttention", "value_dim"): [with_latents(value_dim=48)],
    ("LatentAttention", "scale"): [with_latents(scale=0.4)],
    ("LatentAttention", "rope"): [
        with_latents(rope=Rope(100.0)),
        with_latents(rope=Rope(10000.0, "yarn", YARN, attention_factor=1.3)),
    ],
    ("LatentAttention", "norm_eps"): [with_latents(norm_eps=0.3)],
    ("LatentAttention", "query_scaling"): [with_latents(query_scaling=(0.5, 8))],
    ("Attention", "head_gate"): [
        with_attention(head_gate=True),
        with_attention(head_gate=True, qk_norm="all", window=7),
    ],
    ("Attention", "gate"): [with_attention(head_gate=True, gate="self_attn.g")],
    ("GatedDeltaNet", "num_key_heads"): [with_delta_net(num_key_heads=4)],
    ("GatedDeltaNet", "num_value_heads"): [with_delta_net(num_value_heads=6)],
    ("GatedDeltaNet", "key_dim"): [with_delta_net(key_dim=32), with_delta_net(key_dim=8)],
    ("GatedDeltaNet", "value_dim"): [with_delta_net(value_dim=16)],
    ("GatedDeltaNet", "conv_kernel"): [with_delta_net(conv_kernel=2)],
    ("GatedDeltaNet", "fused"): [with_delta_net(fused=True)],
    ("ShortConv", "channels"): [replace(with_short_conv(channels=80), hidden_size=80)],
    ("ShortConv", "conv_kernel"): [with_short_conv(conv_kernel=2), with_short_conv(conv_kernel=5)],
    ("ShortConv", "bias"): [with_short_conv(bias=True)],
    ("Mamba2", "num_heads"): [with_mamba(num_heads=6)],
    ("Mamba2", "head_dim"): [
        with_mamba(head_dim=32),
        with_mamba(head_dim=80),
        with_mamba(head_dim=8),
    ],
    ("Mamba2", "state_dim"): [with_mamba(state_dim=16), with_mamba(state_dim=24)],
    ("Mamba2", "num_groups"): [with_mamba(num_groups=1), with_mamba(num_groups=4)],
    ("Mamba2", "conv_kernel"): [with_mamba(conv_kernel=2)],
    ("Mamba2", "conv_bias"): [with_mamba(conv_bias=True)],
    ("Mamba2", "time_step_limit"): [with_mamba(time_step_limit=(0.5, 1.0))],
    ("Mamba2", "module"): [with_mamba(module="mixer")],
    ("Attention", "module"): [with_attention(module="mixer", out="mixer.o_proj")],
    ("Attention", "out"): [with_attention(out="self_attn.out_proj")],
    ("Attention", "head_norms"): [
        with_attention(qk_norm="head", head_norms=("qn", "kn")),
        replace(with_attention(qk_norm="head", head_norms=None), norm_offset=True),
    ],
    ("GatedMlp", "names"): [
        with_layers(mlp=GatedMlp(INNER, "silu", names=("w1", "w3", "w2"))),
        with_layers(mlp=GatedMlp(INNER, "silu", names=("gate_up", "down"))),
    ],
    ("PlainMlp", "intermediate_size"): [with_layers(mlp=PlainMlp(48, "relu2"))],
    ("PlainMlp", "activation"): [
        with_layers(mlp=PlainMlp(INNER, name))  # type: ignore[arg-type]
        for name in ("silu", "gelu_tanh", "relu2", "mish")
    ],
    ("PlainMlp", "names"): [with_layers(mlp=PlainMlp(INNER, "relu2", ("mixer.up", "mixer.down")))],
    ("ModelSpec", "embedding"): [replace(MODEL, embedding="embeddings")],
    ("ModelSpec", "final_norm"): [replace(MODEL, final_norm="embedding_norm")],
    ("GatedMlp", "intermediate_size"): [with_layers(mlp=GatedMlp(48, "silu"))],
    ("GatedMlp", "activation"): [
        with_layers(mlp=GatedMlp(INNER, "gelu_tanh")),
        with_layers(mlp=GatedMlp(INNER, "relu2")),
        with_layers(mlp=GatedMlp(INNER, "mish")),  # type: ignore[arg-type]
    ],
    ("GatedMlp", "sparsity"): [
        with_layers(mlp=GatedMlp(INNER, "gelu_tanh", 0.8)),
        with_layers(mlp=GatedMlp(INNER, "silu", 0.5)),
        with_both(mlp=GatedMlp(48, "gelu_tanh", 0.3)),
    ],
    ("Experts", "num_experts"): [with_experts(num_experts=5)],
    ("Experts", "top_k"): [with_experts(top_k=1), with_experts(top_k=8)],
    ("Experts", "intermediate_size"): [with_experts(intermediate_size=80)],
    ("Experts", "activation"): [
        with_experts(activation="gelu_tanh"),
        with_experts(activation="relu2"),
    ],
    ("Experts", "plain"): [
        with_experts(plain=True, activation="relu2"),
        with_experts(plain=True, shared=SharedExpert(32), names=PLAIN_NAMES),
    ],
    ("Experts", "latent_size"): [
        with_experts(latent_size=32),
        with_experts(latent_size=80, shared=SharedExpert(32, gated=True)),
        replace(with_layers(mlp=replace(EXPERTS, latent_size=32), norms=SANDWICH)),
    ],
    ("Experts", "scoring"): [
        with_experts(scoring="sigmoid"),
        with_experts(scoring="tanh"),
    ],
    ("Experts", "norm_weights"): [
        with_experts(norm_weights=True),
        with_experts(norm_weights=True, scoring="sigmoid"),
    ],
    ("Experts", "routed_scale"): [with_experts(routed_scale=2.5)],
    ("Experts", "clamp"): [with_experts(clamp=(1.7, 0.4))],
    ("Experts", "correction_bias"): [
        with_experts(correction_bias=True),
        with_experts(correction_bias=True, scoring="sigmoid", norm_weights=True),
    ],
    ("Experts", "limited_groups"): [
        with_experts(limited_groups=(4, 2)),
        with_experts(limited_groups=(2, 1), correction_bias=True, scoring="sigmoid"),
    ],
    ("Experts", "group_rank"): [
        with_experts(limited_groups=(4, 2), group_rank=1),
        with_experts(limited_groups=(2, 1), group_rank=3),
    ],
    ("Experts", "shared"): [with_experts(shared=SharedExpert(80))],
    ("Experts", "names"): [
        with_experts(
            names=ExpertNames(
                "moe.w1.*", "moe.w3.*", "moe.w2.*", "moe.router", shared="s", shared_gate="g"
            ),
            shared=SharedExpert(32, gated=True),
        ),
        with_experts(
            names=ExpertNames(shared="s", shared_linears=("gate_up", "down")),
            shared=SharedExpert(32),
        ),
    ],
    ("MlpBesideExperts", "mlp"): [
        with_both(),
        with_both(mlp=GatedMlp(48, "gelu_tanh")),
        replace(with_both(), norm_offset=True, norm_eps=0.1, residual_scale=0.3),
    ],
    ("MlpBesideExperts", "experts"): [
        with_both(experts=replace(EXPERTS, norm_weights=True, shared=SharedExpert(32))),
        with_both(experts=replace(EXPERTS, scoring="sigmoid", correction_bias=True)),
    ],
    ("MlpBesideExperts", "norms"): [with_both(norms=("n1", "n2", "n3", "n4"))],
    ("MlpBesideExperts", "router_scale"): [with_both(router_scale="s")],
    ("MlpBesideExperts", "expert_scales"): [with_both(expert_scales="s")],
    ("SharedExpert", "intermediate_size"): [with_experts(shared=SharedExpert(32))],
    ("SharedExpert", "gated"): [with_experts(shared=SharedExpert(80, gated=True))],
    ("Norms", "before_mixer"): [with_layers(norms=Norms(before_mixer=None))],
    ("Norms", "after_mixer"): [with_layers(norms=SANDWICH)],
    ("Norms", "before_mlp"): [with_layers(norms=Norms(before_mlp=None))],
    ("Norms", "after_mlp"): [with_layers(norms=Norms(after_mlp="post_feedforward_layernorm"))],
    ("LayerSpec", "mixer"): [  # layers that differ, so that backends must split them or refuse
        replace(
            MODEL, layers=(LAYER, replace(LAYER, mixer=replace(ATTENTION, soft_cap=0.7)), LAYER)
        ),
        replace(MODEL, layers=(LAYER, LAYER, replace(LAYER, mixer=replace(ATTENTION, sinks=True)))),
        with_mamba(),
        replace(MODEL, layers=(MLP_ALONE, LAYER, MLP_ALONE)),
        replace(MODEL, layers=(LAYER, replace(MLP_ALONE, mlp=EXPERTS), MIXER_ALONE)),
        replace(
            MODEL,
            layers=(
                replace(MLP_ALONE, norms=replace(SANDWICH, before_mixer=None, after_mixer=None)),
            )
            * 3,
            residual_scale=0.3,
        ),
    ],
    ("LayerSpec", "mlp"): [
        replace(MODEL, layers=(LAYER, LAYER, replace(LAYER, mlp=GatedMlp(48, "silu")))),
        with_layers(mlp=EXPERTS),
        replace(with_layers(mlp=EXPERTS, norms=SANDWICH), residual_scale=0.3),
        replace(MODEL, layers=(MIXER_ALONE, MIXER_ALONE, MLP_ALONE), residual_scale=0.3),
        replace(
            MODEL,
            layers=(replace(MIXER_ALONE, norms=replace(SANDWICH, before_mlp=None, after_mlp=None)),)
            * 3,
            residual_scale=0.3,
        ),
    ],
    ("LayerSpec", "norms"): [
        replace(MODEL, layers=(replace(LAYER, mlp=BESIDE, norms=Norms(before_mlp=None)),)),
        with_layers(norms=NORMS_AFTER),
        replace(MODEL, layers=(replace(LAYER, norms=SANDWICH), LAYER, LAYER)),
    ],
    ("LayerSpec", "scalar"): [with_layers(scalar=True)],
    ("ModelSpec", "hidden_size"): [replace(MODEL, hidden_size=80)],
    ("ModelSpec", "vocab_size"): [replace(MODEL, vocab_size=131)],
    ("ModelSpec", "max_position_embeddings"): [replace(MODEL, max_position_embeddings=128)],
    ("ModelSpec", "norm_eps"): [replace(MODEL, norm_eps=0.1)],
    ("ModelSpec", "layers"): [replace(MODEL, layers=(LAYER,))],
    ("ModelSpec", "tie_word_embeddings"): [replace(MODEL, tie_word_embeddings=True)],
    ("ModelSpec", "norm_offset"): [replace(MODEL, norm_offset=True)],
    ("ModelSpec", "final_norm_offset"): [
        replace(MODEL, norm_offset=True, final_norm_offset=False),
        replace(MODEL, final_norm_offset=True),
    ],
    ("ModelSpec", "after_norm_eps"): [replace(with_layers(norms=SANDWICH), after_norm_eps=0.1)],
    ("ModelSpec", "embedding_norm"): [
        replace(MODEL, embedding_norm=True),
        replace(with_layers(norms=SANDWICH), embedding_norm=True, per_layer_inputs=TOLD),
    ],
    ("ModelSpec", "embedding_scale"): [replace(MODEL, embedding_scale=3.0)],
    ("ModelSpec", "residual_scale"): [
        replace(MODEL, residual_scale=0.3),
        replace(with_layers(norms=SANDWICH), residual_scale=0.3),
    ],
    ("ModelSpec", "logits_scale"): [replace(MODEL, logits_scale=0.2, final_soft_cap=0.5)],
    ("ModelSpec", "final_soft_cap"): [replace(MODEL, final_soft_cap=0.5)],
    ("ModelSpec", "head"): [replace(MODEL, head="language_model.lm_head")],
    ("ModelSpec", "headless"): [replace(MODEL, prefix="", headless=True)],
    ("ModelSpec", "prefix"): [replace(MODEL, prefix="language_model.model.")],
    ("ModelSpec", "num_draft_layers"): [replace(MODEL, num_draft_layers=1)],
    ("ModelSpec", "alt_up"): [
        replace(MODEL, alt_up=STREAMS),
        replace(with_layers(scalar=True), alt_up=STREAMS, embedding_norm=True),
        replace(MODEL, layers=(MLP_ALONE, LAYER, MIXER_ALONE), alt_up=STREAMS, norm_offset=True),
    ],
    ("AltUp", "num_streams"): [
        replace(MODEL, alt_up=replace(STREAMS, num_streams=2)),
        replace(MODEL, alt_up=replace(STREAMS, num_streams=17)),
    ],
    ("AltUp", "active"): [replace(MODEL, alt_up=replace(STREAMS, active=2), per_layer_inputs=TOLD)],
    ("AltUp", "scaled"): [
        replace(
            with_layers(norms=SANDWICH),
            alt_up=replace(STREAMS, scaled=True),
            per_layer_inputs=TOLD,
            residual_scale=0.3,
        )
    ],
    ("LayerSpec", "laurel"): [
        with_layers(laurel=Laurel(16)),
        replace(with_layers(laurel=Laurel(16), norms=NORMS_AFTER), residual_scale=0.3),
        replace(MODEL, layers=(replace(MIXER_ALONE, laurel=Laurel(32)), LAYER, MLP_ALONE)),
        replace(MODEL, layers=(replace(LAYER, mixer=MAMBA, laurel=Laurel(16)), LAYER)),
    ],
    ("Laurel", "rank"): [with_layers(laurel=Laurel(48)), with_layers(laurel=Laurel(8))],
    ("ModelSpec", "per_layer_inputs"): [replace(MODEL, per_layer_inputs=TOLD)],
    ("PerLayerInputs", "width"): [
        replace(with_layers(norms=SANDWICH), per_layer_inputs=replace(TOLD, width=32)),
        replace(MODEL, per_layer_inputs=replace(TOLD, width=8)),
    ],
    ("PerLayerInputs", "vocab_size"): [
        replace(MODEL, per_layer_inputs=replace(TOLD, vocab_size=VOCAB + 5)),
        replace(MODEL, per_layer_inputs=replace(TOLD, vocab_size=VOCAB // 2)),
    ],
    ("PerLayerInputs", "activation"): [
        replace(MODEL, per_layer_inputs=replace(TOLD, activation="silu"))
    ],
}
CASES = [
    (f"{kind}.{name}", i, spec)
    for (kind, name), specs in CHANGES.items()
    for i, spec in enumerate(specs)
]


def asked(spec: ModelSpec) -> frozenset[str]:
    """All features of a model and its layers."""
    return features(spec).union(*map(features, spec.layers))


def test_every_field_has_a_case() -> None:
    classes = [ModelSpec, LayerSpec, Norms, Attention, GatedDeltaNet, GatedMlp, Experts]
    classes += [LatentAttention, Mamba2, ShortConv, PlainMlp, SharedExpert, MlpBesideExperts]
    classes += [Rope, LongFactors, PerLayerInputs, AltUp, Laurel]
    described = [
        value
        for value in vars(base).values()
        if isinstance(value, type) and hasattr(value, "KIND") and value is not base.LinearGroup
    ]
    assert set(described) == set(classes), "a new kind needs cases of its own"
    assert {(c.__name__, f.name) for c in classes for f in dataclasses.fields(c)} == set(CHANGES)


def checkpoint_of(spec: ModelSpec, folder: Path) -> FolderCheckpoint:
    """Random float32 weights for everything that the spec names."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 0.15) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {
        f"{spec.prefix}{spec.embedding}.weight": normal(
            spec.vocab_size, spec.hidden_size, scale=1.0
        ),
        f"{spec.prefix}{spec.final_norm}.weight": 1 + normal(spec.hidden_size),
    }
    if not spec.tie_word_embeddings:
        tensors[f"{spec.head}.weight"] = normal(spec.vocab_size, spec.hidden_size)
    for index, layer in enumerate(spec.layers):
        prefix = f"{spec.layer_name(index)}."
        for group in spec.groups(index):
            for member in group.members():
                for name, out in zip(member.modules, member.out_features, strict=True):
                    tensors[f"{prefix}{name}.weight"] = normal(out, group.in_features)
        if layer.laurel is not None:
            for group in layer.laurel.groups(spec.hidden_size):
                name, shape = group.modules[0], (group.out_features[0], group.in_features)
                tensors[f"{prefix}{name}.weight"] = normal(*shape)
            tensors[f"{prefix}{layer.laurel.norm}.weight"] = 1 + normal(spec.hidden_size)
        if (experts := experts_of(layer.mlp)) is not None:
            router, *gate = (f"{prefix}{name}" for name in experts.routers)
            tensors[f"{router}.weight"] = normal(experts.num_experts, spec.hidden_size)
            tensors |= {f"{name}.weight": normal(1, spec.hidden_size) for name in gate}
            if experts.correction_bias:
                bias = normal(experts.num_experts)
                tensors[f"{prefix}{experts.names.correction_bias}"] = bias
        if isinstance(both := layer.mlp, MlpBesideExperts):
            tensors |= {f"{prefix}{n}.weight": 1 + normal(spec.hidden_size) for n in both.norms}
            tensors[f"{prefix}{both.router_scale}"] = 8 * (1 + normal(spec.hidden_size))
            tensors[f"{prefix}{both.expert_scales}"] = 1 + normal(both.experts.num_experts)
        for each in dataclasses.fields(layer.norms):
            if (name := getattr(layer.norms, each.name)) is not None:
                tensors[f"{prefix}{name}.weight"] = 1 + normal(spec.hidden_size)
        if isinstance(mixer := layer.mixer, ShortConv):
            filters = normal(mixer.channels, 1, mixer.conv_kernel, scale=0.5)
            tensors[f"{prefix}conv.conv.weight"] = filters
            if mixer.bias:
                tensors[f"{prefix}conv.conv.bias"] = normal(mixer.channels)
            continue
        if isinstance(mixer := layer.mixer, GatedDeltaNet):
            heads, own = mixer.num_value_heads, f"{prefix}linear_attn."
            tensors[f"{own}conv1d.weight"] = normal(mixer.channels, 1, mixer.conv_kernel, scale=0.5)
            tensors |= {f"{own}{name}": normal(heads, scale=1.0) for name in ("A_log", "dt_bias")}
            tensors[f"{own}norm.weight"] = 1 + normal(mixer.value_dim)
            continue
        if isinstance(mixer := layer.mixer, LatentAttention):
            own = f"{prefix}self_attn."
            if mixer.q_rank is not None:
                tensors[f"{own}q_a_layernorm.weight"] = 1 + normal(mixer.q_rank)
            tensors[f"{own}kv_a_layernorm.weight"] = 1 + normal(mixer.kv_rank)
            continue
        if isinstance(mixer, Mamba2):
            own, taps = f"{prefix}{mixer.module}.", mixer.conv_kernel
            tensors[f"{own}conv1d.weight"] = normal(mixer.channels, 1, taps, scale=0.5)
            if mixer.conv_bias:
                tensors[f"{own}conv1d.bias"] = normal(mixer.channels)
            names = ("A_log", "dt_bias", "D")
            tensors |= {f"{own}{name}": normal(mixer.num_heads, scale=1.0) for name in names}
            tensors[f"{own}norm.weight"] = 1 + normal(mixer.values)
            continue
        if layer.scalar:
            tensors[f"{prefix}layer_scalar"] = 1 + normal(1)
        if layer.mixer is None:
            continue
        if layer.mixer.qk_norm and layer.mixer.head_norms is not None:
            q_norm, k_norm = layer.mixer.head_norms
            counts = {q_norm: layer.mixer.num_heads}
            if layer.mixer.kv_source is None:
                counts[k_norm] = layer.mixer.num_kv_heads
            for name, count in counts.items():
                width = layer.mixer.head_dim * (count if layer.mixer.qk_norm == "all" else 1)
                tensors[f"{prefix}{name}.weight"] = 1 + normal(width)
        if layer.mixer.sinks:
            tensors[f"{prefix}self_attn.sinks"] = normal(layer.mixer.num_heads, scale=1.0)
    if (streams := spec.alt_up) is not None:
        n, hidden = streams.num_streams, spec.hidden_size
        for names in (streams.projections, streams.unprojections):
            for i, name in enumerate(names):  # what the first gives is too short to be made as long
                scale = 0.15 if i else 1e-4
                tensors[f"{spec.prefix}{name}.weight"] = normal(hidden, hidden, scale=scale)
        for index in range(spec.num_layers):
            prefix = f"{spec.layer_name(index)}.altup."
            tensors[f"{prefix}router_norm.weight"] = 1 + normal(hidden)
            tensors[f"{prefix}modality_router.weight"] = normal(n, hidden, scale=5.0)
            tensors[f"{prefix}prediction_coefs.weight"] = normal(n * n, n)
            tensors[f"{prefix}correction_coefs.weight"] = normal(n, n)
            tensors[f"{prefix}correct_output_scale"] = 1 + normal(hidden)
    if (told := spec.per_layer_inputs) is not None:
        all_inputs = spec.num_layers * told.width
        tensors[f"{spec.prefix}embed_tokens_per_layer.weight"] = normal(told.vocab_size, all_inputs)
        projection = normal(all_inputs, spec.hidden_size)
        tensors[f"{spec.prefix}per_layer_model_projection.weight"] = projection
        tensors[f"{spec.prefix}per_layer_projection_norm.weight"] = 1 + normal(told.width)
        for index in range(spec.num_layers):
            prefix = f"{spec.layer_name(index)}."
            gate, back = normal(told.width, spec.hidden_size), normal(spec.hidden_size, told.width)
            tensors[f"{prefix}per_layer_input_gate.weight"] = gate
            tensors[f"{prefix}per_layer_projection.weight"] = back
            tensors[f"{prefix}post_per_layer_input_norm.weight"] = 1 + normal(spec.hidden_size)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return FolderCheckpoint(folder)


def target(folder: Path, dtype: torch.dtype, **options) -> Target:
    config = EngineConfig(model=str(folder), prepared_cache=None, max_num_seqs=4, **options)
    return Target(config, dtype, torch.device("cpu"))


def prompt(spec: ModelSpec) -> list[int]:
    return torch.randint(
        0, spec.vocab_size, (41,), generator=torch.Generator().manual_seed(1)
    ).tolist()


CHUNKS = ((0, 20), (20, 18), (38, 1), (39, 1), (40, 1))


def decoded_logits(decoder, ids: list[int], chunks: tuple = CHUNKS) -> torch.Tensor:
    """The tokens computed in chunks (start, count)."""
    cache = decoder.new_cache([4])
    rows = []
    with torch.inference_mode():
        for start, count in chunks:
            batch = Batch.of_one(ids, 16, start, count)
            rows.append(decoder.logits(decoder.forward(batch, cache)))
    return torch.cat(rows).double()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def typical_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the median token: in 16 bits a few tokens choose another expert, which says nothing of arithmetic."""
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).median())


@pytest.mark.parametrize(("name", "i", "spec"), CASES, ids=[f"{name}-{i}" for name, i, _ in CASES])
def test_a_model_is_computed_rightly_or_refused(
    name: str, i: int, spec: ModelSpec, tmp_path: Path
) -> None:
    checkpoint, ids = checkpoint_of(spec, tmp_path / "model"), prompt(spec)
    try:
        plain = load_decoder(target(tmp_path, torch.float32, cpu_isa="none"), checkpoint, spec)
    except UnsupportedError as refusal:
        assert "does not compute" in str(refusal)
        return
    want = plain_logits(spec, checkpoint, ids)
    assert error(decoded_logits(plain, ids), want) < 1e-5
    routed = any(experts_of(layer.mlp) is not None for layer in spec.layers)
    measure = typical_error if routed else error
    rounded = load_decoder(target(tmp_path, torch.bfloat16, cpu_isa="none"), checkpoint, spec)
    bound = (3.0 if routed else 1.25) * measure(decoded_logits(rounded, ids), want)
    fast = load_decoder(target(tmp_path, torch.bfloat16), checkpoint, spec)
    assert measure(decoded_logits(fast, ids), want) <= bound


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # an infinity, as on a card
@pytest.mark.parametrize(
    "spec",
    [spec for _, _, spec in CASES if asked(spec) != asked(MODEL)],
    ids=lambda spec: str(sorted(asked(spec) - asked(MODEL))),
)
def test_triton_computes_what_it_does_not_refuse(spec: ModelSpec, tmp_path: Path) -> None:
    """Every feature, in the interpreter, on a short prompt. (Sizes: test_triton_decoder.py.)"""
    pytest.importorskip("triton")

    backend = TritonBackend(target(tmp_path, torch.float16))
    if any(backend.why_not(layer, spec) for layer in spec.layers):
        return
    checkpoint, ids = checkpoint_of(spec, tmp_path / "model"), prompt(spec)[:11]
    torchs = TorchBackend(target(tmp_path, torch.float16)).load(
        checkpoint, spec, range(spec.num_layers), lambda index: None
    )
    want, chunks = plain_logits(spec, checkpoint, ids), ((0, 10), (10, 1))
    ours = backend.load(checkpoint, spec, range(spec.num_layers), lambda index: None)
    theirs = error(decoded_logits(torchs, ids, chunks), want)
    assert error(decoded_logits(ours, ids, chunks), want) <= 1.5 * theirs + 1e-3


def test_runs_of_layers_are_computed_where_they_can_be(tmp_path: Path) -> None:
    """C++ takes the first and the last layer, torch the one between: the dtype and the values of the stream agree."""
    narrow = replace(LAYER, mixer=replace(ATTENTION, head_dim=8))
    spec = replace(MODEL, layers=(LAYER, narrow, LAYER))
    assignment = assign(target(tmp_path, torch.bfloat16), spec)
    names = [(run.backend.name, run.layers) for run in assignment.runs]
    assert names == [("cpp", range(1)), ("torch", range(1, 2)), ("cpp", range(2, 3))]
    assert assignment.refused is not None and "heads of 8 dimensions" in assignment.refused


def test_a_chain_samples_on_the_host_whatever_its_parts_do() -> None:
    """The first part embeds the tokens, so none may stay on the device of the last; nor is a part warmed up alone."""

    class OnItsDevice:
        overlaps, looks_ahead, report = True, True, KernelReport()

    chain = ChainedDecoder([OnItsDevice(), OnItsDevice()])
    assert not chain.overlaps
    chain.warm_up(None, 8)
    result = StepResult()
    request = Request("r", [1], SamplingParams(temperature=0.0), frozenset(), seed=0)
    assert chain.sample(torch.tensor([[0.0, 2.0, 1.0]]), [request], result) is result
    assert result.tokens == {"r": [1]}


@pytest.mark.parametrize("kind", [TorchBackend, CppBackend, TritonBackend])
def test_a_backend_lists_no_feature_that_no_model_can_ask_for(kind: type[Backend]) -> None:
    assert kind.features <= frozenset().union(*(asked(spec) for _, _, spec in CASES))


def test_what_architectures_ask_for_is_computed_by_the_plain_backend() -> None:
    """So a config.json that gives a ModelSpec can be served: conversion relies on it."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes |= {"vocab_size": 199, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    sizes |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    for entry in ARCHITECTURES:
        from nibble.architectures.config import Config

        spec = entry.spec(Config(sizes | NEEDED.get(entry.model_type, {})))
        backend = TorchBackend(target(Path(), torch.float32))
        assert not any(backend.why_not(layer, spec) for layer in spec.layers)
