"""Experts in C++ against float64 (plain_decoder.py), on every instruction set.

Attention gives nothing here, so the router sees embeddings and nothing that was rounded: the tokens are those
whose choice is not close, and no rounding changes it.
"""

import ctypes
import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nibble.architectures.base import (
    Attention,
    Experts,
    GatedMlp,
    LayerSpec,
    ModelSpec,
    Norms,
    Rope,
    SharedExpert,
)
from nibble.engine.backends.base import Target
from nibble.engine.backends.batch import Batch
from nibble.engine.backends.cpp.loader import CppBackend
from nibble.engine.config import EngineConfig
from nibble.kernels.cpu import library
from nibble.kernels.cpu.library import NbGatedMlp
from nibble.quant.at_load import quantized_at_load
from nibble.quant.checkpoint import FolderCheckpoint

from .plain_decoder import plain_logits

pytestmark = pytest.mark.skipif(
    library.why_missing() is not None, reason=str(library.why_missing())
)

HIDDEN, VOCAB, TOKENS = 64, 400, 90
NO_ATTENTION = Attention(2, 1, 16, 0.3, Rope(10000.0))
BASE = Experts(12, 3, 48, "silu")
KINDS = {
    "softmax": BASE,
    "normed": replace(BASE, norm_weights=True, routed_scale=2.5),
    "gelu": replace(BASE, activation="gelu_tanh", top_k=1),
    "all": replace(BASE, top_k=12),
    "odd": replace(BASE, num_experts=7, top_k=2, intermediate_size=80),
    "sigmoid": replace(BASE, scoring="sigmoid", correction_bias=True, norm_weights=True),
    "groups": replace(BASE, scoring="sigmoid", correction_bias=True, limited_groups=(4, 2)),
    "best group": replace(BASE, limited_groups=(3, 1)),
    "shared": replace(BASE, shared=SharedExpert(80)),
    "narrow shared": replace(BASE, shared=SharedExpert(16, gated=True), routed_scale=0.5),
}


def model(experts: Experts, **norms) -> ModelSpec:
    layer = LayerSpec(NO_ATTENTION, experts, replace(Norms(), **norms))
    return ModelSpec(HIDDEN, VOCAB, 256, 1e-6, (layer,), False)


def checkpoint_of(spec: ModelSpec, folder: Path) -> FolderCheckpoint:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16().float()

    layer, prefix = spec.layers[0], "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN, scale=1.0),
        "model.norm.weight": 1 + normal(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for group in spec.groups(0):
        for member in group.members():
            for name, out in zip(member.modules, member.out_features, strict=True):
                tensors[f"{prefix}{name}.weight"] = normal(out, group.in_features)
    tensors[f"{prefix}self_attn.o_proj.weight"].zero_()
    for each in dataclasses.fields(layer.norms):
        if (name := getattr(layer.norms, each.name)) is not None:
            tensors[f"{prefix}{name}.weight"] = 1 + normal(HIDDEN)
    router, *gate = layer.mlp.routers
    tensors[f"{prefix}{router}.weight"] = normal(layer.mlp.num_experts, HIDDEN)
    tensors |= {f"{prefix}{name}.weight": normal(1, HIDDEN) for name in gate}
    if layer.mlp.correction_bias:
        bias = normal(layer.mlp.num_experts)
        tensors[f"{prefix}{router}.e_score_correction_bias"] = bias
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return FolderCheckpoint(folder)


def clear_tokens(spec: ModelSpec, checkpoint: FolderCheckpoint) -> list[int]:
    """Tokens whose experts are the same if the router's products are a little otherwise."""
    norms, experts = spec.layers[0].norms, spec.layers[0].mlp
    x = checkpoint.tensor("model.embed_tokens.weight").double()
    if norms.before_mlp is not None:
        x = x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
        x = x * checkpoint.tensor(f"model.layers.0.{norms.before_mlp}.weight").double()
    router = checkpoint.tensor("model.layers.0.mlp.gate.weight").double()
    logits = x @ router.T
    generator = torch.Generator().manual_seed(0)
    from nibble.engine.backends.torch.feed_forward import route

    bias = None
    if experts.correction_bias:
        name = "model.layers.0.mlp.gate.e_score_correction_bias"
        bias = checkpoint.tensor(name).double()
    clear = torch.ones(VOCAB, dtype=torch.bool)
    want = route(experts, logits, bias)[1].sort(-1).values
    for _ in range(20):
        noise = torch.randn(logits.shape, generator=generator).double() * 1e-3
        clear &= (route(experts, logits + noise, bias)[1].sort(-1).values == want).all(-1)
    found = clear.nonzero().flatten().tolist()[:TOKENS]
    assert len(found) == TOKENS
    return found


def logits(folder: Path, checkpoint, spec: ModelSpec, ids: list[int], chunks, **options):
    config = EngineConfig(model=str(folder), prepared_cache=None, max_num_seqs=4, **options)
    backend = CppBackend(Target(config, torch.bfloat16, torch.device("cpu")))
    assert all(backend.why_not(layer, spec) is None for layer in spec.layers)
    decoder = backend.load(checkpoint, spec, range(1), lambda index: None)
    cache, rows = decoder.new_cache([16]), []
    for start, count in chunks:
        batch = Batch.of_one(ids, 16, start, count)
        rows.append(decoder.logits(decoder.forward(batch, cache)))
    return torch.cat(rows)


@pytest.mark.parametrize("isa", library.instruction_sets())
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_float64_gives(kind: str, isa: str, tmp_path: Path) -> None:
    """Every token's error is that of a product in bfloat16: a wrong expert or weight would be all of it."""
    spec = model(KINDS[kind])
    checkpoint = checkpoint_of(spec, tmp_path)
    ids = clear_tokens(spec, checkpoint)
    want = plain_logits(spec, checkpoint, ids)
    got = logits(tmp_path, checkpoint, spec, ids, [(0, TOKENS)], cpu_isa=isa, num_threads=2)
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < 0.015


@pytest.mark.parametrize("quantize", [None, "int4", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["normed", "narrow shared"])
def test_what_a_token_gets_does_not_depend_on_the_batch(
    kind: str, quantize: str | None, tmp_path: Path
) -> None:
    """Alone, with few others (whose experts it shares or not), with many; on few threads and on many."""
    spec = model(KINDS[kind])
    dense = checkpoint_of(spec, tmp_path)
    ids = torch.randint(0, VOCAB, (140,), generator=torch.Generator().manual_seed(1)).tolist()
    with quantized_at_load(dense, quantize, dense=spec.routers) as checkpoint:
        whole = logits(tmp_path, checkpoint, spec, ids, [(0, 140)], num_threads=1)
        cuts = [(0, 1), (1, 2), (3, 70), (73, 1), (74, 66)]
        parts = logits(tmp_path, checkpoint, spec, ids, cuts, num_threads=5)
    assert torch.equal(whole, parts)
    plain = plain_logits(spec, dense, ids)
    error = ((whole - plain).norm(dim=1) / plain.norm(dim=1)).median()
    assert error < {None: 0.01, "int4": 0.2, "int8": 0.03, "fp8": 0.06}[quantize]


@pytest.mark.parametrize("norms", [{"before_mlp": None}, {"after_mlp": "after"}])
def test_norms_around_experts(norms: dict, tmp_path: Path) -> None:
    spec = replace(model(KINDS["normed"], **norms), residual_scale=0.3)
    checkpoint = checkpoint_of(spec, tmp_path)
    ids = clear_tokens(spec, checkpoint)
    want = plain_logits(spec, checkpoint, ids)
    got = logits(tmp_path, checkpoint, spec, ids, [(0, TOKENS)])
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < 0.015


def test_experts_that_nobody_chose_are_not_read(tmp_path: Path) -> None:
    """Those of one token have weights; the others point nowhere, and reading them would end the process."""
    spec = model(KINDS["narrow shared"])
    checkpoint = checkpoint_of(spec, tmp_path)
    ids = clear_tokens(spec, checkpoint)[:1]
    config = EngineConfig(model=str(tmp_path), prepared_cache=None)
    backend = CppBackend(Target(config, torch.bfloat16, torch.device("cpu")))
    decoder = backend.load(checkpoint, spec, range(1), lambda index: None)
    batch = Batch.of_one(ids, 16, 0, 1)
    want = decoder.forward(batch, decoder.new_cache([1]))
    experts = decoder.layers[0].mlp
    x = checkpoint.tensor("model.embed_tokens.weight").double()[ids[0]]
    x = x / (x.square().mean() + 1e-6).sqrt()
    x = x * checkpoint.tensor("model.layers.0.post_attention_layernorm.weight").double()
    chosen = (experts.router.double() @ x).topk(spec.layers[0].mlp.top_k).indices.tolist()
    for number, mlp in enumerate(experts.experts):
        for group in mlp.groups if number not in chosen else []:
            for linear in group.arrays[1]:
                linear.data = ctypes.c_void_p(16).value
    assert isinstance(experts.array[0], NbGatedMlp)
    assert torch.equal(decoder.forward(batch, decoder.new_cache([1])), want)


def test_widths_that_the_kernels_do_not_know_are_refused(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path))
    backend = CppBackend(Target(config, torch.bfloat16, torch.device("cpu")))
    for mlp in (replace(BASE, intermediate_size=40), replace(BASE, shared=SharedExpert(40))):
        spec = model(mlp)
        assert "multiples of 16" in backend.why_not(spec.layers[0], spec)
    spec = model(BASE)
    dense = replace(spec, layers=(replace(spec.layers[0], mlp=GatedMlp(48, "silu")), *spec.layers))
    assert [backend.why_not(layer, dense) for layer in dense.layers] == [None, None]
