"""Experts of every format through the Triton decoder, in the interpreter, against float64 (plain_decoder.py) and the
torch decoder: what is stacked at load, what is not, and what a graph may hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton")

from nibble.architectures.base import Experts, LayerSpec, ModelSpec, Norms, SharedExpert
from nibble.engine.backends.base import Target
from nibble.engine.backends.batch import Batch
from nibble.engine.backends.torch.feed_forward import TorchExperts
from nibble.engine.backends.torch.loader import TorchBackend
from nibble.engine.backends.triton import feed_forward as module
from nibble.engine.backends.triton.feed_forward import TritonExperts, feed_forward
from nibble.engine.backends.triton.loader import TritonBackend
from nibble.engine.config import EngineConfig
from nibble.quant import formats
from nibble.quant.checkpoint import FolderCheckpoint
from nibble.quant.weight import QuantizedWeight

from .test_declared_features import (
    ATTENTION,
    BESIDE,
    LAYER,
    MODEL,
    PLAIN_NAMES,
    SUMMED,
    checkpoint_of,
)
from .test_quantized_models import SCHEMES, fp4_tensors, quantize

CPU = torch.device("cpu")
EXPERTS = Experts(5, 2, 64, "silu", norm_weights=True)
SHARED = replace(EXPERTS, shared=SharedExpert(32, gated=True), scoring="sigmoid")
IDS = [7, 3, 150, 42, 9]
KINDS = ["awq", "gptq-2", "gptq-3", "gptq-4-act-order", "gptq-8", "fp8-block", "ct-mxfp4"]
KINDS += ["ct-nvfp4", "ct-int4-asym"]


def model(experts: Experts) -> ModelSpec:
    return replace(MODEL, layers=(LayerSpec(ATTENTION, experts, Norms()),))


def backend(kind: type, folder: Path):
    config = EngineConfig(model=str(folder), prepared_cache=None, max_num_seqs=4)
    return kind(Target(config, torch.float16, CPU))


def loaded(kind: type, checkpoint: FolderCheckpoint, spec: ModelSpec):
    with torch.inference_mode():
        found = backend(kind, checkpoint.path)
        return found.load(checkpoint, spec, range(spec.num_layers), lambda index: None)


def decoder(kind: type, checkpoint: FolderCheckpoint, spec: ModelSpec):
    found = backend(kind, checkpoint.path)
    assert all(found.why_not(layer, spec) is None for layer in spec.layers)
    return loaded(kind, checkpoint, spec)


def quantized(folder: Path, spec: ModelSpec, kind: str) -> FolderCheckpoint:
    """A random model whose experts alone are quantized."""
    dense = checkpoint_of(spec, folder)
    tensors = {name: dense.tensor(name) for name in dense.names()}
    scheme = SCHEMES[kind]
    writer, layer = formats.by_method(scheme.method), scheme.default
    for number, (up, down) in enumerate(spec.layers[0].mlp.members(spec.hidden_size)):
        for module_name in (*up.modules, *down.modules):
            name = f"{spec.layer_name(0)}.{module_name}"
            weight = tensors.pop(f"{name}.weight")
            if layer.kind == "fp4":
                written = fp4_tensors(weight, layer.group_size)
            else:
                written = writer.write(quantize(weight, layer, number), scheme.format)
            tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in written.items()}
    save_file(tensors, folder / "model.safetensors")
    found = FolderCheckpoint(folder)
    found.scheme = scheme
    return found


def hidden(decoder, ids: list[int] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.forward(Batch.of_one(ids, 16), decoder.new_cache([1])).float()


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_what_torch_computes(kind: str, tmp_path: Path) -> None:
    """Both dequantize the same codes; the torch decoder's experts are multiplied in 16 bits too."""
    spec = model(EXPERTS)
    checkpoint = quantized(tmp_path, spec, kind)
    ours = decoder(TritonBackend, checkpoint, spec)
    assert isinstance(ours.weights.layers[0].mlp, TritonExperts)
    assert ours.report.used["moe-triton"] == 2 and not ours.report.refused
    weight = checkpoint.linear(f"{spec.layer_name(0)}.mlp.experts.0.up_proj")
    assert isinstance(weight, QuantizedWeight)
    want = hidden(decoder(TorchBackend, checkpoint, spec))
    assert (hidden(ours) - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize(
    "experts",
    [
        SHARED,
        replace(SHARED, plain=True, activation="relu2", names=PLAIN_NAMES, latent_size=32),
        replace(EXPERTS, activation="relu2", routed_scale=0.5),
    ],
    ids=["shared", "plain in a latent space", "relu2"],
)
def test_what_is_around_experts_is_torchs(experts: Experts, tmp_path: Path) -> None:
    spec = model(experts)
    checkpoint = checkpoint_of(spec, tmp_path)
    h = torch.randn(3, spec.hidden_size, generator=torch.Generator().manual_seed(2)).half()
    theirs = decoder(TorchBackend, checkpoint, spec).layers[0].mlp
    ours = decoder(TritonBackend, checkpoint, spec).weights.layers[0].mlp
    with torch.inference_mode():
        want, got = theirs(h).float(), feed_forward(ours, h).float()
    assert (got - want).norm() < 4e-3 * want.norm()


def test_experts_beside_an_mlp(tmp_path: Path) -> None:
    """With the scales of experts, and a router that reads something else."""
    both = replace(BESIDE, experts=replace(EXPERTS, shared=None))
    spec = replace(MODEL, layers=(replace(LAYER, mlp=both, norms=SUMMED),))
    checkpoint = checkpoint_of(spec, tmp_path)
    x = torch.randn(3, spec.hidden_size, generator=torch.Generator().manual_seed(2)).half()
    theirs = loaded(TorchBackend, checkpoint, spec).layers[0].mlp
    ours = loaded(TritonBackend, checkpoint, spec).weights.layers[0].mlp
    assert isinstance(ours.experts, TritonExperts)
    with torch.inference_mode():
        want, got = theirs(x).float(), feed_forward(ours, x).float()
    assert (got - want).norm() < 4e-3 * want.norm()


def test_experts_of_two_kinds_are_computed_one_after_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = model(SHARED)
    checkpoint = quantized(tmp_path, spec, "awq")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    name = f"{spec.layer_name(0)}.mlp.experts.3.down_proj"
    dense = checkpoint.dense(name, torch.float16)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{name}.")}
    save_file(tensors | {f"{name}.weight": dense}, tmp_path / "model.safetensors")
    mixed = FolderCheckpoint(tmp_path)
    mixed.scheme = checkpoint.scheme
    ours = decoder(TritonBackend, mixed, spec)
    assert type(ours.weights.layers[0].mlp) is TorchExperts
    assert ours.report.refused["moe-triton"] == "needs experts that are all quantized, or none"
    assert "one after another: moe-triton needs experts that are all" in caplog.text
    want = hidden(decoder(TorchBackend, checkpoint, spec))
    assert (hidden(ours) - want).norm() < 4e-3 * want.norm()


def test_a_graph_holds_experts_only_where_the_host_does_not_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model(SHARED)
    checkpoint = checkpoint_of(spec, tmp_path)
    h = torch.randn(2, spec.hidden_size).half()
    theirs = decoder(TorchBackend, checkpoint, spec).layers[0].mlp
    ours = decoder(TritonBackend, checkpoint, spec).weights.layers[0].mlp
    monkeypatch.setattr(module, "_is_captured", lambda x: True)
    with torch.inference_mode():
        feed_forward(ours, h)
        with pytest.raises(RuntimeError, match="the host looks"):
            feed_forward(theirs, h)


def test_weights_are_counted_once(tmp_path: Path) -> None:
    """The list of experts is empty, and what is stacked is in the ledger."""
    spec = model(EXPERTS)
    checkpoint = checkpoint_of(spec, tmp_path)
    sizes = [decoder(kind, checkpoint, spec).weight_bytes for kind in (TorchBackend, TritonBackend)]
    assert sizes[0] == sizes[1]


def test_what_it_cannot_choose_is_refused(tmp_path: Path) -> None:
    found = backend(TritonBackend, tmp_path)
    for experts, reason in (
        (replace(EXPERTS, num_experts=2048), "among 2048 experts"),
        (replace(EXPERTS, num_experts=8, limited_groups=(4, 1), top_k=3), "of the 2 in the best"),
    ):
        assert reason in found.why_not(replace(LAYER, mlp=experts), model(experts))
