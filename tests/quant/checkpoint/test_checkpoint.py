"""Checkpoints on disk: what is read from whole ones, and the one clear error for each kind of damage."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.side_files import copy_side_files
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.formats import awq
from nibble.quant.scheme import LayerScheme, QuantScheme
from nibble.quant.weight import QuantizedWeight

Q_PROJ = "model.layers.0.self_attn.q_proj"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def awq_folder(llama_folder):
    """The tiny llama with its q_proj of layer 0 in AWQ."""
    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight(
        codes=torch.randint(0, 16, (64, 64), generator=generator, dtype=torch.uint8),
        scales=torch.rand(64, 2, generator=generator).half(),
        zeros=torch.randint(0, 16, (64, 2), generator=generator, dtype=torch.uint8),
        bits=4,
        block=(1, 32),
    )
    del tensors[f"{Q_PROJ}.weight"]
    save_file(
        tensors | {f"{Q_PROJ}.{s}": t for s, t in awq.write(weight).items()}, file, {"format": "pt"}
    )
    scheme = QuantScheme("awq", "gemm", LayerScheme("int", 4, 32, False))
    edit_json(llama_folder / "config.json", quantization_config=scheme.to_config())
    return llama_folder


@pytest.fixture
def sharded_folder(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


@pytest.mark.parametrize("folder", ["llama_folder", "sharded_folder"])
def test_every_tensor_is_the_models(folder, request, llama_model):
    checkpoint = open_checkpoint(request.getfixturevalue(folder))
    state = {n: t for n, t in llama_model.state_dict().items() if n != "lm_head.weight"}
    assert checkpoint.names() == state.keys() and checkpoint.scheme is None
    for name, tensor in state.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert (
            checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
        )
    assert checkpoint.nbytes == sum(t.nbytes for t in state.values())
    assert checkpoint.config["model_type"] == "llama"
    assert torch.equal(checkpoint.linear(Q_PROJ), state[f"{Q_PROJ}.weight"])
    assert checkpoint.bias(Q_PROJ) is None and not checkpoint.is_quantized(Q_PROJ)
    assert checkpoint.modules() == {n.removesuffix(".weight") for n in state}


def test_a_quantized_module_among_dense_ones(awq_folder):
    checkpoint = open_checkpoint(awq_folder)
    weight = checkpoint.linear(Q_PROJ)
    assert isinstance(weight, QuantizedWeight) and weight.group_size == 32
    assert isinstance(checkpoint.linear("model.layers.0.self_attn.k_proj"), torch.Tensor)
    assert checkpoint.scheme.describe() == "awq int4 g32 asym"
    assert checkpoint.weight_names(Q_PROJ) == [
        f"{Q_PROJ}.{s}" for s in ("qweight", "scales", "qzeros")
    ]
    assert torch.equal(checkpoint.dense(Q_PROJ), weight.dequantize())


def test_a_scheme_in_an_older_side_file(awq_folder):
    edit_json(awq_folder / "config.json", quantization_config=None)
    (awq_folder / "quant_config.json").write_text(
        '{"w_bit": 4, "q_group_size": 32, "zero_point": true}'
    )
    assert open_checkpoint(awq_folder).scheme.method == "awq"


def test_old_file_name_of_auto_gptq(llama_folder):
    (llama_folder / "model.safetensors").rename(llama_folder / "gptq_model-4bit-128g.safetensors")
    assert open_checkpoint(llama_folder).has("model.norm.weight")


def test_dequantized_folder_is_plain(awq_folder, tmp_path):
    source = open_checkpoint(awq_folder)
    dequantize_checkpoint(source, tmp_path / "dense", torch.float32)
    dense = open_checkpoint(tmp_path / "dense")
    assert dense.scheme is None and dense.config["dtype"] == "float32"
    assert torch.equal(dense.linear(Q_PROJ), source.linear(Q_PROJ).dequantize())
    assert "quantization_config" not in dense.config and dense.modules() == source.modules()


def test_side_files_are_copied_byte_for_byte(llama_folder, tmp_path):
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "pytorch_model.bin",
        "notes.txt",
    ):
        (llama_folder / name).write_bytes(b"\x00 any bytes \xff")
    written = copy_side_files(open_checkpoint(llama_folder), tmp_path / "out")
    assert set(written) == {
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00 any bytes \xff"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def fails(folder, *parts, error=CheckpointError):
    """Opening and reading all of it raises one line that holds the parts."""
    with pytest.raises(error) as caught:
        checkpoint = open_checkpoint(folder)
        for module in checkpoint.modules():
            checkpoint.linear(module)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_truncated_file(llama_folder):
    file = llama_folder / "model.safetensors"
    whole = file.read_bytes()
    for size, problem in (
        (len(whole) - 100, "truncated"),
        (3000, "truncated"),
        (200, "truncated"),
        (3, "truncated"),
    ):
        file.write_bytes(whole[:size])
        fails(llama_folder, "model.safetensors", problem)


def test_damaged_header(llama_folder):
    file = llama_folder / "model.safetensors"
    whole = file.read_bytes()
    for wrong in (b"\x00" * 40, b"[" * 60, b"\xff" * 10):
        file.write_bytes(whole[:8] + wrong + whole[8 + len(wrong) :])
        fails(llama_folder, "model.safetensors", "damaged safetensors header")
    file.write_bytes(whole.replace(b'"F32"', b'"F31"', 1))
    fails(llama_folder, "dtype F31", "tensor 'model")
    file.write_bytes(whole.replace(b'"shape":[64]', b'"shape":[63]', 1))
    fails(llama_folder, "256 bytes for shape [63]")
    file.write_bytes(whole.replace(b'"shape":[64]', b'"shape":[-4]', 1))
    fails(llama_folder, "damaged shape")


def test_lfs_pointer(llama_folder):
    (llama_folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9"
    )
    fails(llama_folder, "model.safetensors", "Git LFS pointer", "git lfs pull")


def test_missing_shard(sharded_folder):
    (sharded_folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    shards = sorted(sharded_folder.glob("*.safetensors"))
    shards[-1].unlink()
    fails(sharded_folder, "shard is missing")


def test_missing_shard_without_an_index(sharded_folder):
    (sharded_folder / "model.safetensors.index.json").unlink()
    assert open_checkpoint(sharded_folder).has("model.norm.weight")
    sorted(sharded_folder.glob("*.safetensors"))[0].unlink()
    fails(sharded_folder, "shard 1 of")


def test_index_that_lies(sharded_folder):
    index = sharded_folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    edit_json(index, weight_map=weight_map | {"model.layers.9.mlp.up_proj.weight": files[0]})
    fails(sharded_folder, files[0], "model.layers.9.mlp.up_proj.weight")
    edit_json(index, weight_map=weight_map | {"model.norm.weight": "../secret.safetensors"})
    fails(sharded_folder, "outside its folder", "../secret.safetensors")
    edit_json(index, weight_map=["model.norm.weight"])
    fails(sharded_folder, "model.safetensors.index.json", "weight_map")
    index.write_text("{")
    fails(sharded_folder, "model.safetensors.index.json", "JSON")


def test_a_tensor_in_two_shards(sharded_folder):
    files = sorted(sharded_folder.glob("*.safetensors"))
    first = load_file(files[0])
    save_file(load_file(files[1]) | {next(iter(first)): next(iter(first.values()))}, files[1])
    fails(sharded_folder, "is also in", next(iter(first)))


def test_only_pickles(llama_folder):
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    fails(llama_folder, "pickle", "safetensors version")


def test_config_missing_or_invalid(llama_folder):
    config = llama_folder / "config.json"
    config.write_text("{'model_type': 'llama'}")
    fails(llama_folder, "config.json", "JSON")
    config.write_text("[]")
    fails(llama_folder, "config.json", "no JSON object")
    config.unlink()
    fails(llama_folder, "config.json", "is missing")


def test_no_such_place(tmp_path):
    fails(tmp_path / "nowhere", "nowhere", "does not exist")
    fails(tmp_path, "config.json")
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path / "notes.txt", "neither a folder nor a GGUF file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("x")
    fails(tmp_path, "2 GGUF models")


@pytest.mark.parametrize(
    "suffix, change, problem",
    [
        (
            "scales",
            lambda t: t.index_fill(0, torch.tensor(0), float("nan")),
            "holds NaN or infinity",
        ),
        (
            "scales",
            lambda t: t.index_fill(1, torch.tensor(3), float("inf")),
            "holds NaN or infinity",
        ),
        ("scales", lambda t: t[:, :-8].contiguous(), "has shape [2, 56], want [2, 64]"),
        ("qzeros", lambda t: t[:1].contiguous(), "has shape [1, 8], want [2, 8]"),
        ("qweight", lambda t: t.to(torch.int64), "has dtype torch.int64"),
    ],
)
def test_damaged_quantized_tensor(awq_folder, suffix, change, problem):
    file = awq_folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q_PROJ}.{suffix}"] = change(tensors[f"{Q_PROJ}.{suffix}"])
    save_file(tensors, file)
    fails(awq_folder, str(file), f"tensor '{Q_PROJ}.{suffix}'", problem)


def test_missing_quantized_tensor(awq_folder):
    file = awq_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{Q_PROJ}.scales"]
    save_file(tensors, file)
    fails(awq_folder, f"tensor '{Q_PROJ}.scales'", "is missing")


def test_nan_in_a_dense_weight(llama_folder):
    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q_PROJ}.weight"][3, 3] = float("nan")
    save_file(tensors, file)
    fails(llama_folder, str(file), f"tensor '{Q_PROJ}.weight'", "NaN")


def test_a_missing_module_is_named(llama_folder):
    checkpoint = open_checkpoint(llama_folder)
    for read in (checkpoint.linear, checkpoint.tensor, checkpoint.is_quantized, checkpoint.shape):
        with pytest.raises(CheckpointError, match=r"model\.layers\.7"):
            read("model.layers.7.mlp.up_proj")


def test_unsupported_quantization_is_named(llama_folder):
    edit_json(llama_folder / "config.json", quantization_config={"quant_method": "quip"})
    fails(llama_folder, "quip", error=UnsupportedError)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    fails("someone/some-model", "someone/some-model", "Hub cannot be reached", "give its path")


def test_the_hub_is_never_asked_for_pickles(monkeypatch, llama_folder):
    import huggingface_hub

    asked = {}

    def fake(name, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(shutil.copytree(llama_folder, llama_folder.parent / "hub"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert open_checkpoint("someone/some-model", revision="v1").has("model.norm.weight")
    assert asked["name"] == "someone/some-model" and asked["revision"] == "v1"
    assert not any(
        p.endswith((".bin", ".pt", "*")) and p not in ("tokenizer*", "LICENSE*")
        for p in asked["patterns"]
    )


def test_a_part_of_a_linear_is_read(llama_folder):
    checkpoint = open_checkpoint(llama_folder)
    module = "model.layers.0.mlp.down_proj"
    whole = checkpoint.linear(module)
    assert torch.equal(checkpoint.linear(module, slice(16, 48), slice(0, 32)), whole[16:48, :32])
