"""Every class of encoder, tiny and seeded, gives transformers' own hidden states and scores, in whatever batch."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from nibble import LLM
from nibble.engine.config import EngineConfig
from nibble.engine.encoders.attention import buckets
from nibble.engine.encoders.batch import EncoderBatch
from nibble.engine.encoders.choose import is_encoder
from nibble.engine.encoders.core import EncoderCore
from nibble.engine.encoders.linears import _finer
from nibble.engine.encoders.runner import EncoderRunner
from nibble.engine.messages import AddRequest
from nibble.engine.pooling import Pooling
from nibble.engine.sampling_params import SamplingParams
from nibble.errors import CheckpointError, UnsupportedError, UserError
from nibble.quant.weight import QuantizedWeight

from . import models

RAGGED = [
    models.ids(models.words(count, seed)) for seed, count in enumerate((5, 1, 40, 5, 150, 17, 0, 8))
]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("encoders")

    @cache
    def made(name: str, classifier: bool = False) -> Path:
        return models.save(root / f"{name}-{classifier}", name, classifier)

    return made


def load(folder: Path, **flags) -> EncoderRunner:
    return EncoderRunner(EngineConfig(model=str(folder), device="cpu", **flags))


def hidden_of(runner: EncoderRunner, texts: list[list[int]]) -> list[torch.Tensor]:
    """Each text's hidden states, in the order given."""
    batch = EncoderBatch.of(texts, [0] * len(texts), runner.device)
    groups = batch.grouped(runner.model(batch))
    rows = [text for group in groups for text in group]
    return [rows[batch.order.index(i)] for i in range(len(texts))]


def floats(vector: bytes | None) -> torch.Tensor:
    assert vector is not None
    return torch.frombuffer(bytearray(vector), dtype=torch.float32)


@pytest.mark.parametrize("name", models.CONFIGS)
def test_hidden_states_are_those_of_transformers(name: str, folder_of) -> None:
    folder = folder_of(name)
    runner = load(folder)
    want = [models.hidden(folder, text) for text in RAGGED]
    for found, expected in zip(hidden_of(runner, RAGGED), want, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (alone,) = hidden_of(runner, RAGGED[4:5])
    torch.testing.assert_close(alone, want[4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", models.CLASSIFIERS)
def test_scores_are_those_of_transformers(name: str, folder_of) -> None:
    folder = folder_of(name, True)
    runner = load(folder)
    assert runner.ready().tasks == ("score",) and runner.ready().embedding is None
    pairs = [
        models.pair_ids(models.words(3), models.words(count, seed))
        for seed, count in enumerate((1, 30, 4, 30))
    ]
    asked = [Pooling(task="score", second_part=second) for _, second in pairs]
    found = [floats(each).item() for each in runner.execute([ids for ids, _ in pairs], asked)]
    want = torch.tensor([models.logit(folder, *pair) for pair in pairs]).sigmoid().tolist()
    assert found == pytest.approx(want, abs=1e-5) and len(set(found)) == 4


def test_a_score_may_be_the_logit_itself(folder_of, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "raw", "bert", classifier=True)
    models.rewrite(
        folder / "config.json",
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
    )
    ids, second = models.pair_ids(models.words(3), models.words(9))
    (found,) = load(folder).execute([ids], [Pooling(task="score", second_part=second)])
    assert floats(found).item() == pytest.approx(models.logit(folder, ids, second), abs=1e-5)


def test_a_cross_encoder_as_newer_sentence_transformers_save_it(tmp_path: Path) -> None:
    """Modules without pooling, and the activation beside config.json."""
    folder = models.save(tmp_path / "newer", "bert", classifier=True)
    models.write_modules(folder, "mean_tokens")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    models.rewrite(folder / "sentence_bert_config.json", max_seq_length=77)
    ids, second = models.pair_ids(models.words(3), models.words(9))
    logit = models.logit(folder, ids, second)
    for name, want in [("Identity", logit), ("Sigmoid", 1 / (1 + math.exp(-logit)))]:
        models.rewrite(
            folder / "config_sentence_transformers.json",
            activation_fn=f"torch.nn.modules.activation.{name}",
        )
        runner = load(folder)
        assert runner.max_model_len == 77 and runner.task == "score"
        (found,) = runner.execute([ids], [Pooling(task="score", second_part=second)])
        assert floats(found).item() == pytest.approx(want, abs=1e-5)
    models.rewrite(folder / "config_sentence_transformers.json", activation_fn="my.code.Score")
    with pytest.raises(UnsupportedError, match=r"my\.code\.Score"):
        load(folder)


def test_modernbert_pools_what_it_classifies_as_it_is_told(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "mean", "modernbert", classifier=True)
    models.rewrite(folder / "config.json", classifier_pooling="mean")
    ids, second = models.pair_ids(models.words(3), models.words(9))
    (found,) = load(folder).execute([ids], [Pooling(task="score", second_part=second)])
    want = torch.tensor(models.logit(folder, ids, second)).sigmoid().item()
    assert floats(found).item() == pytest.approx(want, abs=1e-5)


def test_nomic_bert_as_its_authors_saved_it(folder_of, tmp_path: Path) -> None:
    """GPT-2's names for fields, and none of what transformers calls them."""
    folder = models.save(tmp_path / "nomic", "nomic_bert")
    want = models.hidden(folder, RAGGED[2])
    names = load(folder).spec.names
    assert names.qkv == ("attn.Wqkv",)
    older = {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 200,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "activation_function": "swiglu",
        "rotary_scaling_factor": None,
        "num_experts": 0,
    }
    newer = ("hidden_size", "num_attention_heads", "num_hidden_layers", "layer_norm_eps")
    gone = dict.fromkeys((*newer, "max_position_embeddings", "rope_parameters", "hidden_act"), ...)
    models.rewrite(folder / "config.json", **older, **gone)
    (found,) = hidden_of(load(folder), RAGGED[2:3])
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_norms_of_the_first_berts_have_other_names(folder_of, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = models.save(tmp_path / "older", "bert")
    tensors = load_file(folder / "model.safetensors")
    older = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in tensors.items()
    }
    save_file(
        {f"bert.{name}": tensor for name, tensor in older.items()}, folder / "model.safetensors"
    )
    (found,) = hidden_of(load(folder), RAGGED[2:3])
    torch.testing.assert_close(
        found, models.hidden(folder_of("bert"), RAGGED[2]), atol=1e-5, rtol=1e-5
    )


def test_buckets_of_distances_are_those_of_transformers() -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distances = torch.arange(-600, 601)
    want = MPNetEncoder.relative_position_bucket(distances, num_buckets=32)
    assert torch.equal(buckets(distances, 32), want)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_8_bit_weights_are_close(name: str, folder_of) -> None:
    folder = folder_of(name)
    plain = load(folder)
    asked = [Pooling()] * len(RAGGED)
    want = torch.stack([floats(v) for v in plain.execute(RAGGED, asked)])
    for flags in ({}, {"cpu_isa": "none"}):
        runner = load(folder, quantize="int8", **flags)
        found = torch.stack([floats(v) for v in runner.execute(RAGGED, asked)])
        assert torch.cosine_similarity(found, want).min() > 0.995
        assert "int8" in runner.quantization
        assert any("cpu-" in kernel for kernel in runner.ready().kernels) == (not flags)
    quantized = load(folder, quantize="int8")
    assert quantized.weight_bytes < 0.6 * plain.weight_bytes
    assert quantized.model.word.dtype == torch.float16


def test_groups_of_8_bit_weights_are_told_finer() -> None:
    """Also where the last one is short: what it dequantizes to stays the same."""
    codes = torch.randint(0, 256, (4, 200), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.rand(4, 2), bits=8, block=(1, 128))
    finer = _finer(weight)
    assert finer.block == (1, 32) and finer.scales.shape == (4, 7)
    assert torch.equal(finer.dequantize(torch.float32), weight.dequantize(torch.float32))
    narrow = QuantizedWeight(codes, torch.rand(4, 5), bits=8, block=(1, 40))
    assert _finer(narrow) is narrow


def test_what_was_quantized_can_be_kept(folder_of, tmp_path: Path) -> None:
    load(folder_of("bert"), quantize="int8", save_quantized=str(tmp_path / "kept"))
    again = load(tmp_path / "kept")
    at_load = load(folder_of("bert"), quantize="int8")
    found, want = (runner.execute(RAGGED, [Pooling()] * 8) for runner in (again, at_load))
    assert found == want and "int8" in again.quantization


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "num_buckets 16"),
        ("nomic_bert", {"rotary_scaling_factor": 2}, "rotary_scaling_factor 2"),
        ("nomic_bert", {"num_experts": 8}, "num_experts 8"),
        ("modernbert", {"layer_types": ["chunked"] * 3}, "layer type 'chunked'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    name: str, changes: dict, said: str, tmp_path: Path
) -> None:
    folder = models.save(tmp_path / "model", name)
    models.rewrite(folder / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, "layer.2"),
        ({"num_hidden_layers": 4}, "is missing"),
        ({"hidden_size": 60}, "config.json implies"),
        ({"num_attention_heads": 7}, "7 heads"),
        ({"vocab_size": 100}, "config.json implies"),
    ],
)
def test_a_config_of_another_model_is_found(changes: dict, said: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "bert")
    models.rewrite(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_more_labels_than_one_are_no_score(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "bert", classifier=True)
    models.rewrite(folder / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(UnsupportedError, match="3 labels"):
        load(folder)


def test_results_that_are_not_finite_are_found_at_the_start(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "bert")
    with pytest.raises(UserError, match="float16"):
        _with_huge_norm(folder)
        load(folder, dtype="float16")


def _with_huge_norm(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors")


# How long texts may be


def test_the_files_say_how_long_a_text_may_be(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "roberta")
    assert load(folder).max_model_len == 198  # two rows of positions are of no token
    models.write_modules(folder, "cls_token", "Normalize")
    models.rewrite(folder / "sentence_bert_config.json", max_seq_length=50)
    assert load(folder).max_model_len == 50
    assert load(folder, max_model_len=198).max_model_len == 198
    with pytest.raises(UserError, match="198 tokens"):
        load(folder, max_model_len=199)


def test_the_longest_text_is_computed(folder_of) -> None:
    longest = models.ids(models.words(196))
    (found,) = hidden_of(load(folder_of("roberta")), [longest])
    want = models.hidden(folder_of("roberta"), longest)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_the_ledger_counts_every_byte(folder_of) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder_of("bert") / "model.safetensors")
    used = [tensor.nbytes for name, tensor in tensors.items() if not name.startswith("pooler")]
    runner = load(folder_of("bert"))
    ledger = runner.ready().ledger
    assert ledger["weights"] == sum(used)
    # hidden states, what is added to them, and qkv or twice the inner ones
    assert ledger["activations"] >= 2048 * 4 * (2 * 64 + 3 * 64)


def test_the_loop_gives_each_request_its_own(folder_of) -> None:
    """Through the core, in several steps, against each text alone."""
    core = EncoderCore(
        EngineConfig(model=str(folder_of("mpnet")), device="cpu", max_num_batched_tokens=50)
    )
    params = SamplingParams(max_tokens=1, pooling=Pooling())
    for index, text in enumerate(RAGGED):
        core.add(AddRequest(str(index), text, params))
    found, steps = {}, 0
    while core.has_work:
        steps += 1
        found |= {output.request_id: output.embedding for output in core.step()}
    assert steps == 4
    for index, text in enumerate(RAGGED):
        want = models.hidden(folder_of("mpnet"), text).mean(0)
        torch.testing.assert_close(
            floats(found[str(index)]), want / want.norm(), atol=1e-5, rtol=1e-5
        )


def test_an_encoder_is_told_from_what_generates(folder_of, tiny_llama: Path) -> None:
    assert is_encoder(folder_of("bert")) and not is_encoder(tiny_llama)
    with pytest.raises(UnsupportedError, match="is an encoder: `nibble serve` takes it"):
        LLM(str(folder_of("bert")))
