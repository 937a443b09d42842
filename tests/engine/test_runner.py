"""The runner's logits and tokens against transformers, through every way the scheduler may cut the work."""

import pytest
import torch

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.engine.scheduling.batch import ScheduledBatch, ScheduledRequest
from nibble.errors import UserError

from . import models
from .driving import make_request, prompt, run


@pytest.fixture(scope="module", params=list(models.CONFIGS))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = models.build(request.param, folder)
    runner = Runner(
        EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=1 << 24, block_size=4)
    )
    return reference, runner


@torch.inference_mode()
def greedy(reference, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_logits_are_those_of_transformers(pair) -> None:
    reference, runner = pair
    ids = prompt(50)
    with torch.inference_mode():
        want = reference(torch.tensor([ids])).logits[0]
    # float32 sums in another order: a few ulp of the largest logit
    assert torch.allclose(runner.logits(ids), want, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize("chunk", [256, 7, 1])
def test_greedy_tokens_whatever_the_chunk(pair, chunk: int) -> None:
    """Also past the sliding window (24), across blocks (4), with scattered blocks."""
    reference, runner = pair
    ids = prompt(37, seed=chunk)
    request = make_request(ids, list(range(40, 0, -2)))
    run(runner, [request], chunk, steps=-(-37 // chunk) + 11)
    assert request.token_ids == greedy(reference, ids, len(request.token_ids) - 37)
    assert request.num_output_tokens == 12


def test_a_mixed_batch_gives_what_each_gives_alone(pair) -> None:
    reference, runner = pair
    lengths = [1, 5, 29, 40]
    requests = [
        make_request(prompt(n, seed=n), list(range(100 + 20 * i, 120 + 20 * i)))
        for i, n in enumerate(lengths)
    ]
    run(runner, requests, chunk=13, steps=12)
    for request, n in zip(requests, lengths, strict=True):
        assert request.token_ids == greedy(reference, prompt(n, seed=n), request.num_output_tokens)


def test_prompt_logprobs_are_the_log_softmax_of_transformers(pair) -> None:
    reference, runner = pair
    ids = prompt(20, seed=3)
    request = make_request(ids, list(range(5)), prompt_logprobs=2)
    item = ScheduledRequest(request, 0, 12), ScheduledRequest(request, 12, 8)
    got = [e for part in item for e in runner.execute(ScheduledBatch([part])).prompt_logprobs["r0"]]
    with torch.inference_mode():
        want = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
    assert [e.token_id for e in got] == ids[1:]
    for position, entry in enumerate(got):
        assert entry.logprob == pytest.approx(float(want[position, ids[position + 1]]), abs=1e-3)
        assert entry.top_ids == want[position].topk(2).indices.tolist()


def test_a_bad_dtype_is_one_clear_error(tmp_path) -> None:
    models.build("llama", tmp_path)
    with pytest.raises(UserError, match="float33"):
        Runner(EngineConfig(model=str(tmp_path), dtype="float33"))


def test_a_context_that_cannot_fit_says_what_would(tmp_path) -> None:
    models.build("llama", tmp_path)
    with pytest.raises(UserError, match="--max-model-len"):
        Runner(EngineConfig(model=str(tmp_path), max_model_len=256, kv_cache_memory=1 << 14))


def test_an_unknown_architecture_is_named(tmp_path) -> None:
    models.build("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    with pytest.raises(UserError, match="MambaForCausalLM"):
        Runner(EngineConfig(model=str(tmp_path)))
