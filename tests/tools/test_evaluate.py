"""What the accuracy card says, computed once more: from transformers' logits, in float64, one position at a time."""

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.errors import UserError
from nibble.quant.card import Quality
from nibble.tools.evaluate import evaluate

TEXT = "".join(chr(32 + i * i % 90) for i in range(210))
WINDOWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def noisy_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on every matrix and a sharper head: KL(p||q) and KL(q||p) differ widely."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy-llama"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for weight in weights.values():
        if weight.ndim == 2:
            weight += 0.15 * weight.std() * torch.randn(weight.shape, generator=generator)
    weights["lm_head.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def log_probabilities(folder: Path, ids: list[int]) -> list[list[float]]:
    """[T][vocab]: after each token, of the next one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    return (logits - logits.exp().sum(-1, keepdim=True).log()).tolist()


def by_hand(original: Path, candidate: Path, windows: list[list[int]]) -> dict[str, float]:
    """Sums over positions, written out."""
    surprise, surprise_of_original, divergences, same = [], [], [], []
    for ids in windows:
        p_all, q_all = log_probabilities(original, ids), log_probabilities(candidate, ids)
        for position in range(len(ids) - 1):  # what follows the last token is not known
            p, q = p_all[position], q_all[position]
            surprise_of_original.append(-p[ids[position + 1]])
            surprise.append(-q[ids[position + 1]])
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
    divergences.sort()
    rank = 0.99 * (len(divergences) - 1)
    below = divergences[int(rank)]
    above = divergences[int(rank) + 1]
    return {
        "tokens": len(same),
        "perplexity": math.exp(statistics.fmean(surprise)),
        "perplexity_reference": math.exp(statistics.fmean(surprise_of_original)),
        "kl_mean": statistics.fmean(divergences),
        "kl_median": statistics.median_low(divergences),
        "kl_p99": below + (rank - int(rank)) * (above - below),
        "top1_agreement": statistics.fmean(same),
    }


def test_every_figure_of_the_card_is_the_one_computed_by_hand(
    tiny_llama: Path, noisy_llama: Path
) -> None:
    ids = list(TEXT.encode())  # a token's id is its byte
    windows = [ids[:LENGTH], ids[105 : 105 + LENGTH]]  # spread evenly
    seen: list[tuple[int, int]] = []
    [quality] = evaluate(
        tiny_llama,
        noisy_llama,
        {"made up": TEXT},
        windows=WINDOWS,
        length=LENGTH,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert isinstance(quality, Quality) and quality.domain == "made up"
    expected = by_hand(tiny_llama, noisy_llama, windows)
    for name, value in expected.items():
        assert getattr(quality, name) == pytest.approx(value, rel=1e-3), name
    backwards = by_hand(noisy_llama, tiny_llama, windows)
    assert abs(expected["kl_mean"] / backwards["kl_mean"] - 1) > 0.1  # or nothing was told apart
    assert 0 < quality.top1_agreement < 1
    assert quality.kl_mean_int8 is None  # nothing here is rounded to int8
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_model_is_no_distance_from_itself(tiny_llama: Path) -> None:
    [quality] = evaluate(tiny_llama, tiny_llama, {"x": TEXT}, windows=1, length=32)
    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.perplexity_reference
    assert quality.tokens == 31


def test_a_text_shorter_than_a_window_is_refused_by_name(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"notes\.txt: too short .* 64 tokens"):
        evaluate(tiny_llama, tiny_llama, {"a": TEXT, "notes.txt": "short"}, length=64)


def test_different_vocabularies_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    weights = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:260].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 260}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="264 and 260 tokens cannot be compared"):
        evaluate(tiny_llama, other, {"x": TEXT}, windows=1, length=32)
