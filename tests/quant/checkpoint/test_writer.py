"""ShardWriter: what other readers see, and that an interruption changes nothing."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nibble.quant.checkpoint.headers import scan
from nibble.quant.checkpoint.writer import ShardWriter

BLOCKS = [
    {
        "a.weight": torch.arange(6, dtype=torch.int8).reshape(2, 3),
        "a.scale": torch.ones(3, dtype=torch.float16),
    },
    {"b.weight": torch.randn(5, 7), "b.scale": torch.tensor(2.5)},
    {"c.weight": torch.randn(4, 4).to(torch.float8_e4m3fn), "c.empty": torch.zeros(0, 4)},
]
ALL = {name: tensor for block in BLOCKS for name, tensor in block.items()}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def write(folder, blocks=BLOCKS, **options):
    writer = ShardWriter(folder, **options)
    for block in blocks[len(writer.parts) :]:
        writer.add(block)
    files = writer.finish()
    writer.clean()
    return files


def test_small_models_are_one_file(tmp_path):
    assert [f.name for f in write(tmp_path)] == ["model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == ALL.keys() and all(same(read[n], t) for n, t in ALL.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_models_are_sharded_with_an_index(tmp_path):
    files = write(tmp_path, max_shard_bytes=100)
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(hashlib.sha256(f.read_bytes()).hexdigest() == digest for f, digest in files.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ALL.values())
    for name, tensor in ALL.items():
        assert same(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert scan(tmp_path).keys() == ALL.keys()


@pytest.mark.parametrize("limit", [100, 10**9])
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, limit):
    write(tmp_path / "straight", max_shard_bytes=limit)
    ShardWriter(tmp_path / "resumed").add(BLOCKS[0])
    (tmp_path / "resumed" / ".work" / "part-00001.tmp").write_bytes(b"half of a part")
    write(tmp_path / "resumed", max_shard_bytes=limit)
    for file in (tmp_path / "straight").iterdir():
        assert (tmp_path / "resumed" / file.name).read_bytes() == file.read_bytes()


def test_a_run_killed_while_it_removes_its_parts_can_be_repeated(tmp_path, monkeypatch):
    removed = []

    def die_after_one(path, missing_ok=False):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok)

    unlink = type(tmp_path).unlink
    monkeypatch.setattr(type(tmp_path), "unlink", die_after_one)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    monkeypatch.undo()
    write(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == ALL.keys()
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_views_and_shared_storage_can_be_written(tmp_path):
    whole = torch.randn(4, 6)
    write(tmp_path, [{"top": whole[:2], "transposed": whole.T}])
    read = load_file(tmp_path / "model.safetensors")
    assert same(read["top"], whole[:2]) and same(read["transposed"], whole.T)
