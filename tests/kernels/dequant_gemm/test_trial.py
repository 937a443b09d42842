"""What `nibble tune` lets win, in the interpreter: only what computes the product."""

import pytest
import torch
from kernel_cases import interpreter_only

from nibble.kernels.awq import linear as awq
from nibble.kernels.dequant_gemm import candidates, trial
from nibble.kernels.dequant_gemm.candidates import DEQUANTIZE, Candidate
from nibble.kernels.dequant_gemm.tiles import Tile
from nibble.kernels.dequant_gemm.trial import Kind, Subject
from nibble.kernels.fp8 import w8a16
from nibble.kernels.measure.timing import Card

pytestmark = interpreter_only
GEMM, GEMV = Candidate("gemm", Tile(0, 16, 64, 4, 2, True)), Candidate("gemv", Tile(0, 1, 64, 4, 1))


@pytest.fixture(
    params=[
        Kind("int", 4, 128, awq.repack),
        Kind("int", 8, 128, awq.repack),
        Kind("fp8", 8, 0, w8a16.repack),
    ],
    ids=lambda kind: kind.name,
)
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """On the CPU, as a card without FP8."""
    monkeypatch.setattr(Card, "of", lambda device: Card("card", 75, 4, 1000))
    monkeypatch.setattr(trial, "_spills", dict)
    monkeypatch.setattr(trial, "ROWS", (1, 16))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Subject(request.param, (70, 256), torch.device("cpu"))


def test_every_path_computes_the_product(subject: Subject) -> None:
    assert [
        subject.why_not(*tried) for tried in ((GEMM, 16), (GEMM, 1), (GEMV, 1), (DEQUANTIZE, 16))
    ] == [""] * 4


def test_what_is_wrong_cannot_win(subject: Subject) -> None:
    subject.weights[0].words[0, 3] ^= 0x11  # a few codes of one output
    assert "wrong by" in subject.why_not(GEMM, 16)
    assert "wrong by" in subject.why_not(DEQUANTIZE, 16)


def test_what_does_not_run_or_leaves_locks_says_so(subject: Subject) -> None:
    assert "does not run" in subject.why_not(Candidate("gemm", Tile(0, 16, 48, 4, 2)), 16)
    subject.weights[0].locks[-1] = 1
    assert subject.why_not(GEMM, 1) == "leaves locks set"


def test_a_spill_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(({}, {"gemm": 2}))
    monkeypatch.setattr(trial, "_spills", lambda: next(counts))
    assert subject.why_not(GEMM, 1) == "spills 2 registers"


def test_rotated_weights_are_copies(subject: Subject) -> None:
    assert len(subject.weights) == trial.rotations(
        subject.weights[0].words.nbytes + subject.weights[0].scales.nbytes, 1000
    )
    assert all(torch.equal(subject.weights[0].words, other.words) for other in subject.weights)
    copies = trial.rotated(subject.weights[0], 10 * subject.weights[0].words.nbytes)
    assert len(copies) > 10 and len({copy.words.data_ptr() for copy in copies}) == len(copies)


def test_times_are_of_the_trial_that_was_asked_for(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "microseconds", lambda calls: float(calls[0]().shape[0]))
    asked = candidates.Trial((70, 256), 16, GEMM)
    assert subject.measure(asked) == candidates.Measurement(asked, 16.0)
