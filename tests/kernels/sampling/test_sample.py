"""Token selection in the interpreter against the engine's sampler, which sorts, in torch."""

import pytest
import torch
from kernel_cases import DEVICE, on_device  # noqa: F401  (a fixture)
from torch import Tensor

from nibble.engine.request import Request
from nibble.engine.sampler import sample as engine_sample
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import StepResult
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.sampling.sample import (
    SamplingRows,
    add_bias,
    apply_bitmask,
    greedy,
    new_state,
    race_key,
    record,
    sample,
)


def _logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((rows, vocab), generator=generator, device="cpu").to(DEVICE) * spread


def _requests(params: list[SamplingParams], prompt: list[int], output: list[int]) -> list[Request]:
    requests = []
    for index, one in enumerate(params):
        request = Request(str(index), list(prompt), one, frozenset(), seed=index + 17)
        request.token_ids.extend(output)
        requests.append(request)
    return requests


def _rows(requests: list[Request], vocab: int) -> SamplingRows:
    params = [request.params for request in requests]
    state = new_state(len(requests) + 1, vocab, DEVICE)
    state_rows = []
    for index, request in enumerate(requests):
        one = request.params
        used = one.repetition_penalty != 1 or one.presence_penalty or one.frequency_penalty
        state_rows.append(len(requests) - index if used else -1)
        if used:
            tokens = torch.tensor(request.token_ids)
            cut = request.num_tokens - request.num_output_tokens
            record(state, len(requests) - index, tokens[:cut], tokens[cut:])
    return SamplingRows(
        torch.tensor([[p.temperature, p.top_k, p.top_p, p.min_p] for p in params]),
        torch.tensor([race_key(r.seed, r.num_tokens) for r in requests], dtype=torch.int32),
        torch.tensor(
            [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params]
        ),
        torch.tensor(state_rows, dtype=torch.int32),
        state,
    )


def _engine(logits: Tensor, requests: list[Request]) -> list[int]:
    result = StepResult()
    engine_sample(logits.clone(), requests, result)
    return [result.tokens.get(request.request_id, [-1])[0] for request in requests]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_takes_the_first_largest(dtype: torch.dtype) -> None:
    logits = _logits(4, 4999).to(dtype)
    logits[1] = 0.0  # all equal
    logits[2, [77, 4097]] = 100.0
    logits[3, :] = float("-inf")
    logits[3, 4998] = -5.0
    assert greedy(logits).tolist() == [int(logits[0].argmax()), 0, 77, 4998]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_row_that_is_not_numbers_fails_alone() -> None:
    logits = _logits(5, 2100)
    logits[1, 2070], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
    assert [t >= 0 for t in greedy(logits).tolist()] == [True, False, False, False, True]
    rows = _rows(_requests([SamplingParams(top_k=3, top_p=0.5)] * 5, [1], []), 2100)
    assert [t >= 0 for t in sample(logits, rows).tolist()] == [True, False, False, False, True]


FILTERS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": 20},
    {"min_p": 0.2},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 5, "top_p": 0.3, "min_p": 0.01},
    {"top_p": 1e-6},
    {"temperature": 10.0, "top_k": 3000, "top_p": 0.99},
    {"top_p": 0.999, "min_p": 1.0},
]


@pytest.mark.parametrize(("vocab", "spread"), [(3001, 3.0), (3001, 0.05), (7, 1.0), (2048, 8.0)])
def test_draws_are_the_engines(vocab: int, spread: float) -> None:
    params = [SamplingParams(**{**f, "top_k": min(f.get("top_k", 0), vocab)}) for f in FILTERS]
    requests = _requests(params, [1, 2, 3], [])
    for seed in range(2):
        logits = _logits(len(params), vocab, spread, seed)
        before = logits.clone()
        assert sample(logits, _rows(requests, vocab)).tolist() == _engine(logits, requests)
        assert torch.equal(logits, before)


def test_penalties_are_the_engines_and_remember_what_is_drawn() -> None:
    vocab, output = 130, [5, 5, 5, 9, 128]
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=0.7, top_k=10),
        SamplingParams(),
        SamplingParams(
            temperature=0.0, repetition_penalty=0.5, presence_penalty=-2.0, frequency_penalty=1.0
        ),
    ]
    requests = _requests(params, [5, 7, 7, 100], output)
    rows = _rows(requests, vocab)
    for seed in range(6):
        logits = _logits(len(params), vocab, seed=seed)
        tokens = sample(logits, rows).tolist()
        assert tokens == _engine(logits, requests)
        for request, token in zip(requests, tokens, strict=True):
            request.token_ids.append(token)
        rows.keys.copy_(
            torch.tensor([race_key(r.seed, r.num_tokens) for r in requests], dtype=torch.int32)
        )


def test_equal_logits_leave_exactly_top_k() -> None:
    rows = 40
    requests = _requests([SamplingParams(top_k=3)] * rows, [1], [])
    tokens = sample(torch.zeros(rows, 500), _rows(requests, 500)).tolist()
    assert set(tokens) == {0, 1, 2}


def test_bias() -> None:
    logits = torch.zeros(2, 10)
    rows, tokens = torch.tensor([0, 1, 1]), torch.tensor([3, 3, 9])
    add_bias(logits, rows, tokens, torch.tensor([2.5, -1.0, float("-inf")]))
    expected = torch.zeros(2, 10).index_put(
        (rows, tokens), torch.tensor([2.5, -1.0, float("-inf")])
    )
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocab", [7, 32, 2048, 5000])
def test_what_a_bitmask_forbids_is_impossible(vocab: int) -> None:
    """Of some rows of a batch, whose rows are apart in memory."""
    logits = torch.zeros(4, vocab + 3)[:, :vocab].copy_(_logits(4, vocab))
    allowed = torch.rand(2, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.4
    padded = torch.nn.functional.pad(allowed, (0, -vocab % 32)).view(2, -1, 32)
    words = (padded.long() << torch.arange(32)).sum(-1)
    bitmask = torch.where(words >= 2**31, words - 2**32, words).int()
    expected = logits.clone()
    expected[[3, 1]] = expected[[3, 1]].masked_fill(~allowed, float("-inf"))
    apply_bitmask(logits, torch.tensor([3, 1]), bitmask)
    assert torch.equal(logits, expected)


def test_wrong_arguments_are_named() -> None:
    logits, keys = torch.zeros(2, 10), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(
        KernelArgumentError, match=r"sample: filters has shape \[2, 3\], want \[2, 4\]"
    ):
        sample(logits, SamplingRows(torch.ones(2, 3), keys))
    with pytest.raises(KernelArgumentError, match="penalties, state_rows and state come together"):
        sample(logits, SamplingRows(torch.ones(2, 4), keys, penalties=torch.ones(2, 3)))
    with pytest.raises(KernelArgumentError, match="greedy: logits is torch.int64"):
        greedy(logits.long())
    with pytest.raises(KernelArgumentError, match=r"bitmask has shape \[1, 2\], want \[1, 1\]"):
        apply_bitmask(logits, torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int32))
    assert greedy(torch.zeros(0, 10)).tolist() == []
