"""LongRoPE through the whole engine: each token of an answer has the log-probabilities that transformers gives it when
it computes the whole sequence so far, with the short factors up to 32 tokens and the long ones from the 33rd on."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nibble.engine.backends.cpp.decoder import CppDecoder
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest, RequestOutput, TokenLogprobs
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.kernels.cpu import library

from . import models
from .driving import prompt

ORIGINAL, TOP = 32, 20
LENGTHS = (10, 31, 32, 33, 60)  # of prompts
LATENT = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


@pytest.fixture(scope="module", params=["phi3-longrope", "minicpm3"])
def built(request, tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"rope_parameters": LATENT} if request.param == "minicpm3" else {}
    return folder, models.build(request.param, folder, **changes)


@pytest.fixture(scope="module")
def torchs(built) -> tuple[Runner, PreTrainedModel]:
    folder, reference = built
    return make_runner(folder, dtype="float32", block_size=4), reference


@pytest.fixture(scope="module")
def cpp(built) -> tuple[Runner, PreTrainedModel]:
    if (why := library.why_missing()) is not None:
        pytest.skip(why)
    folder, reference = built
    runner = make_runner(folder, dtype="bfloat16", cpu_activations="bf16", lm_head_bits=16)
    assert isinstance(runner.model, CppDecoder)
    return runner, reference


def make_runner(folder: Path, **options) -> Runner:
    return Runner(
        EngineConfig(
            model=str(folder),
            kv_cache_memory=1 << 24,
            max_num_seqs=8,
            prepared_cache=None,
            **options,
        )
    )


def engine(runner: Runner, **options) -> EngineCore:
    return EngineCore(EngineConfig(model="", max_num_seqs=8, **options), runner)


def answer(
    core: EngineCore, prompts: list[list[int]], count: int, scored: bool = False
) -> list[list[RequestOutput]]:
    """Greedy, all at once. scored: the prompts too, which then are not looked for in the cache."""
    params = SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=count,
        logprobs=TOP,
        prompt_logprobs=0 if scored else None,
    )
    outputs: list[list[RequestOutput]] = [[] for _ in prompts]
    for index, ids in enumerate(prompts):
        core.add(AddRequest(str(index), ids, params))
    while core.has_work:
        for output in core.step():
            outputs[int(output.request_id)].append(output)
    core.check_idle()
    return outputs


@torch.inference_mode()
def error(reference: PreTrainedModel, ids: list[int], outputs: list[RequestOutput]) -> float:
    """How far the log-probabilities of an answer, and of the prompt if it was scored, are from transformers'. What it
    gives for a token of a sequence it gives for that of a longer one, too, if that has the same factors."""
    answered = [token for output in outputs for token in output.token_ids]
    whole = [*ids, *answered]

    def logprobs(count: int) -> torch.Tensor:
        logits = reference(torch.tensor([whole[:count]]), use_cache=False).logits[0].float()
        return torch.log_softmax(logits, -1)

    def far(entry: TokenLogprobs, want: torch.Tensor) -> float:
        got = torch.tensor([*entry.top_logprobs, entry.logprob])
        return float((got - want[[*entry.top_ids, entry.token_id]]).abs().max())

    short, long = logprobs(ORIGINAL), logprobs(len(whole))
    entries = [entry for output in outputs for entry in output.logprobs or []]
    assert len(entries) == len(answered)
    found = []
    for length, entry in enumerate(entries, len(ids)):
        found.append(far(entry, (short if length <= ORIGINAL else long)[length - 1]))
    want = short if len(ids) <= ORIGINAL else long
    for output in outputs:
        for position, entry in enumerate((output.prompt_logprobs or [])[1:]):
            found.append(far(entry, want[position]))
    return max(found)


@pytest.mark.parametrize("chunk", [2048, 7])
def test_every_token_is_transformers_own(torchs, chunk: int) -> None:
    """Below, above and across, side by side; scored, and again from the cache."""
    runner, reference = torchs
    core = engine(runner, max_num_batched_tokens=chunk)
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    for scored in (True, False):
        outputs = answer(core, prompts, 24, scored)
        for ids, each in zip(prompts, outputs, strict=True):
            assert error(reference, ids, each) < 1e-4
    assert [each[-1].num_cached_tokens for each in outputs] == [8, 28, 28, 32, 56]


def test_cpp_errs_by_its_rounding_and_no_more_beyond(cpp) -> None:
    """The other factors would be off by 0.2 and more."""
    runner, reference = cpp
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    for chunk in (2048, 7):
        core = engine(runner, max_num_batched_tokens=chunk)
        for ids, each in zip(prompts, answer(core, prompts, 24, scored=True), strict=True):
            assert error(reference, ids, each) < 0.05


def test_turns_of_a_conversation_come_from_the_cache_where_they_have_the_same_factors(
    torchs,
) -> None:
    runner, reference = torchs
    core, history, cached = engine(runner), [], []
    for turn in range(4):
        ids = history + prompt(6, seed=turn)
        [outputs] = answer(core, [ids], 8)
        assert error(reference, ids, outputs) < 1e-4
        history = ids + [token for output in outputs for token in output.token_ids]
        cached.append(outputs[-1].num_cached_tokens)
    assert cached == [0, 12, 0, 40]  # of 6, 20, 34 and 48
