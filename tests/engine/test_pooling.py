"""What a checkpoint's files say of its embeddings, and embeddings of decoders: chunks, modes, dimensions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModel

from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest
from nibble.engine.pooler import Pooler, vectors
from nibble.engine.pooling import (
    NORMALIZE,
    EmbeddingFiles,
    EncoderFiles,
    Pooling,
    read_encoder_files,
    read_files,
)
from nibble.engine.sampling_params import ParameterError, SamplingParams
from nibble.errors import CheckpointError, UnsupportedError
from nibble.kernels.cpu import library

from .encoders.models import rewrite, write_modules

CPU = torch.device("cpu")


def test_without_files_a_models_kind_decides(tmp_path: Path) -> None:
    assert read_files(tmp_path, "mean") == EmbeddingFiles("mean", (NORMALIZE,))
    rewrite(tmp_path / "tokenizer_config.json", model_max_length=512)
    assert read_files(tmp_path, "lasttoken") == EmbeddingFiles("lasttoken")
    assert read_encoder_files(tmp_path) == EncoderFiles(512, None)
    rewrite(tmp_path / "sentence_bert_config.json", max_seq_length=256)
    assert read_encoder_files(tmp_path).max_seq_length == 256
    (tmp_path / "sentence_bert_config.json").unlink()
    rewrite(tmp_path / "tokenizer_config.json", model_max_length=10**30)
    assert read_encoder_files(tmp_path).max_seq_length is None


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
        ({}, "mean"),
    ],
)
def test_pooling_as_old_and_new_files_say_it(tmp_path: Path, config: dict, mode: str) -> None:
    write_modules(tmp_path, "mean_tokens")
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert read_files(tmp_path, "cls") == EmbeddingFiles(mode, ())


def test_steps_and_prompts(tmp_path: Path) -> None:
    write_modules(tmp_path, "cls_token", "Dense", "Normalize")
    rewrite(tmp_path / "sentence_bert_config.json", do_lower_case=True)
    rewrite(
        tmp_path / "config_sentence_transformers.json",
        prompts={"query": "search: ", "document": ""},
        default_prompt_name="query",
    )
    assert read_files(tmp_path, "mean") == EmbeddingFiles(
        "cls", ("2_Dense", NORMALIZE), True, {"query": "search: "}, "query"
    )


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m.append(dict(m[1], type="a.b.LSTM")), UnsupportedError, "LSTM"),
        (lambda m: m.pop(1), UnsupportedError, "without Pooling"),
        (lambda m: m[1].update(path="../1_Pooling"), CheckpointError, "no folder in it"),
        (lambda m: m.clear(), CheckpointError, "no list"),
    ],
)
def test_modules_that_are_not_computed(tmp_path: Path, change, error, said) -> None:
    write_modules(tmp_path, "mean_tokens")
    modules = json.loads((tmp_path / "modules.json").read_text())
    change(modules)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(error, match=said):
        read_files(tmp_path, "mean")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt"),
    ],
)
def test_poolings_that_are_not_computed(tmp_path: Path, config: dict, said: str) -> None:
    write_modules(tmp_path, "mean_tokens")
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=said):
        read_files(tmp_path, "mean")


def test_a_prompt_by_default_must_exist(tmp_path: Path) -> None:
    write_modules(tmp_path, "mean_tokens")
    rewrite(tmp_path / "config_sentence_transformers.json", default_prompt_name="query")
    with pytest.raises(CheckpointError, match="no prompt 'query'"):
        read_files(tmp_path, "mean")


def test_projections_come_in_their_place(tmp_path: Path) -> None:
    write_modules(tmp_path, "mean_tokens", "Dense", "Normalize")
    weight, bias = torch.randn(5, 64), torch.randn(5)
    (tmp_path / "2_Dense").mkdir()
    save_file(
        {"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors"
    )
    named = {"activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(named))
    pooler, pooled = Pooler.load(tmp_path, "mean", 64, CPU), torch.randn(3, 64)
    want = F.normalize(torch.tanh(pooled @ weight.T + bias), dim=-1)
    torch.testing.assert_close(pooler.finish(pooled), want)
    assert pooler.dimensions == pooler.info.dimensions == 5
    with pytest.raises(CheckpointError, match="32 dimensions"):
        Pooler.load(tmp_path, "mean", 32, CPU)
    rewrite(tmp_path / "2_Dense" / "config.json", activation_function="my.code.Act")
    with pytest.raises(UnsupportedError, match=r"my\.code\.Act"):
        Pooler.load(tmp_path, "mean", 64, CPU)


def test_vectors_as_they_are_asked_for() -> None:
    rows = torch.tensor([[3.0, 4.0, 12.0]] * 4 + [[torch.nan, 0, 0]])
    asked = [
        Pooling(),
        Pooling(dimensions=2),
        Pooling(unit=True),
        Pooling(dimensions=3),
        Pooling(),
    ]
    *found, bad = vectors(rows, asked)
    assert bad is None
    want = [[3, 4, 12], [0.6, 0.8], [3 / 13, 4 / 13, 12 / 13], [3, 4, 12]]
    for vector, expected in zip(found, want, strict=True):
        got = torch.frombuffer(bytearray(vector), dtype=torch.float32)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


# Decoders

PROMPTS = [[5, 6, 7], list(range(30, 90)), [9], list(range(30, 90))]


def embed(folder: Path, prompts: list[list[int]], **flags) -> tuple[list[torch.Tensor], EngineCore]:
    config = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 1 << 22} | flags
    core = EngineCore(EngineConfig(model=str(folder), **config))
    params = SamplingParams(max_tokens=1, pooling=Pooling())
    for index, prompt in enumerate(prompts):
        core.add(AddRequest(str(index), prompt, params))
    # one that generates, beside them
    core.add(AddRequest("text", [1, 2, 3], SamplingParams(max_tokens=8, temperature=0)))
    found: dict[str, bytes] = {}
    tokens: list[int] = []
    while core.has_work:
        for output in core.step():
            if output.request_id == "text":
                tokens += output.token_ids
                continue
            assert output.finish_reason == "stop" and not output.token_ids
            found[output.request_id] = output.embedding
    core.check_idle()
    assert len(tokens) == 8
    data = [bytearray(found[str(index)]) for index in range(len(prompts))]
    return [torch.frombuffer(each, dtype=torch.float32) for each in data], core


@torch.inference_mode()
def hidden(folder: Path, prompt: list[int]) -> torch.Tensor:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=torch.tensor([prompt])).last_hidden_state[0]


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens", "cls_token", None])
def test_a_decoders_embedding_is_of_its_normed_hidden_states(
    tiny_llama: Path, tmp_path: Path, mode: str | None
) -> None:
    """Prompts of several chunks, in one batch with others, and one twice, whose prefix is in the cache by then."""
    folder = tiny_llama
    if mode is not None:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        write_modules(folder, mode)
    found, core = embed(folder, PROMPTS, max_num_batched_tokens=16)
    for prompt, vector in zip(PROMPTS, found, strict=True):
        rows = hidden(tiny_llama, prompt)
        if mode == "mean_tokens":
            want = rows.mean(0)
        elif mode == "cls_token":
            want = rows[0]
        else:
            want = rows[-1] if mode else F.normalize(rows[-1], dim=0)
        torch.testing.assert_close(vector, want, atol=1e-5, rtol=1e-5)
    ready = core.ready()
    assert ready.tasks == ("generate", "embed") and ready.embedding.dimensions == 64


def test_the_cpp_decoder_embeds_as_well(tiny_llama: Path) -> None:
    if reason := library.why_missing():
        pytest.skip(reason)
    found, core = embed(tiny_llama, PROMPTS, dtype="bfloat16", max_num_batched_tokens=16)
    assert any(name.startswith("cpu-") for name in core.ready().kernels)
    for prompt, vector in zip(PROMPTS, found, strict=True):
        want = hidden(tiny_llama, prompt)[-1]
        assert torch.cosine_similarity(vector, want, dim=0) > 0.999


def test_a_decoder_saved_without_a_head_embeds_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """As Qwen3-Embedding and E5-Mistral are: LlamaModel, tensors without "model." before their names."""
    folder = tmp_path / "bare"
    AutoModel.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(folder)
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", kv_cache_memory=1 << 20)
    core = EngineCore(config)
    assert core.ready().tasks == ("embed",)
    core.add(AddRequest("a", PROMPTS[0], SamplingParams(max_tokens=1, pooling=Pooling())))
    (output,) = core.step()
    found = torch.frombuffer(bytearray(output.embedding), dtype=torch.float32)
    want = F.normalize(hidden(tiny_llama, PROMPTS[0])[-1], dim=0)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="does not generate"):
        core.add(AddRequest("b", [1], SamplingParams(max_tokens=1)))


def test_a_request_that_is_set_back_begins_anew(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    write_modules(folder, "mean_tokens")
    prompts = [list(range(start, start + 60)) for start in (10, 20, 30, 40)]
    size = 2 * 2 * 2 * 16 * 4  # of a token: two layers, keys and values, two heads of 16
    found, _ = embed(
        folder, prompts, kv_cache_memory=100 * size, max_model_len=64, max_num_batched_tokens=48
    )
    for prompt, vector in zip(prompts, found, strict=True):
        want = hidden(tiny_llama, prompt).mean(0)
        torch.testing.assert_close(vector, want, atol=1e-5, rtol=1e-5)


def test_a_decoder_whose_pooling_is_not_computed_generates_all_the_same(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    write_modules(folder, "max_tokens")
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", kv_cache_memory=1 << 20)
    core = EngineCore(config)
    assert core.ready().tasks == ("generate",) and core.ready().embedding is None
    with pytest.raises(ValueError, match="does not embed"):
        core.add(AddRequest("a", [1], SamplingParams(max_tokens=1, pooling=Pooling())))


def test_pooling_generates_nothing() -> None:
    with pytest.raises(ParameterError, match="pooling") as caught:
        SamplingParams(max_tokens=2, pooling=Pooling()).verify(10)
    assert caught.value.field == "max_tokens"
