"""What quantization cost, measured on what is really served: `nibble evaluate REF QUANT` and the accuracy card.

Both checkpoints run through the engine in float32 on the same held-out windows; the original's log-probabilities are
the reference for perplexity, KL divergence and top-1 agreement at every position. Where this machine would serve the
quantized one with activations and output head rounded to int8 (C++ kernels), that is measured beside it.
"""

if __name__ == "__main__":  # python tools/evaluate.py
    from script import run

    raise SystemExit(run("evaluate"))

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nibble.engine.llm import LLM
from nibble.errors import UserError
from nibble.quant.card import Quality
from nibble.quant.conversion.calibration import DATA, EVALUATION, evaluation_windows
from nibble.quant.conversion.report import Progress

WINDOWS = 4  # per text
LENGTH = 512  # tokens a window


def evaluate(
    reference: str | Path,
    quantized: str | Path,
    texts: dict[str, str] | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """Compare two checkpoints on texts {name: text} (default: the bundled held-out prose, docs and code).

    progress(done, total) is called before the first window and after every one.

    Raises UserError where a text is shorter than one window, or the two have different vocabularies.
    """
    texts = texts or bundled_texts()
    original, candidate = LLM(str(reference), dtype="float32"), LLM(str(quantized), dtype="float32")
    served = _with_int8_activations(quantized)
    ids = {
        name: evaluation_windows(original.tokenizer, text, windows, length)
        for name, text in texts.items()
    }
    if short := [name for name, text in ids.items() if not text]:
        raise UserError(f"{short[0]}: too short to evaluate on (one window is {length} tokens)")
    done, total = itertools.count(), sum(map(len, ids.values()))

    def tell() -> None:
        if progress is not None:
            progress(next(done), total)

    tell()
    return [_compare(name, text, original, candidate, served, tell) for name, text in ids.items()]


def _with_int8_activations(quantized: str | Path) -> LLM | None:
    """The checkpoint as a CPU serves it by default, if it then rounds activations."""
    served = LLM(str(quantized))
    rounds = any(name.endswith("x int8") for name in served.core.ready().kernels)
    return served if rounds else None


def bundled_texts() -> dict[str, str]:
    """Held-out text: nothing of it is calibrated on."""
    return {name: (DATA / f"eval_{name}.txt").read_text(encoding="utf-8") for name in EVALUATION}


def _compare(
    name: str,
    windows: list[list[int]],
    original: LLM,
    candidate: LLM,
    served: LLM | None,
    tell: Callable[[], None],
) -> Quality:
    parts = []
    for part in _divergences(windows, original, candidate, served):
        parts.append(part)
        tell()
    nll_p, nll_q, kl, same, kl_served = (
        torch.cat(column).double() for column in zip(*parts, strict=True)
    )
    return Quality(
        domain=name,
        tokens=len(kl),
        perplexity=nll_q.mean().exp().item(),
        perplexity_reference=nll_p.mean().exp().item(),
        kl_mean=kl.mean().item(),
        kl_median=kl.median().item(),
        kl_p99=kl.quantile(0.99).item(),
        top1_agreement=same.mean().item(),
        kl_mean_int8=kl_served.mean().item() if served else None,
    )


def _divergences(
    windows: list[list[int]], original: LLM, candidate: LLM, served: LLM | None
) -> Iterator[tuple[Tensor, ...]]:
    """Per window and position: both negative log-likelihoods of the next token, KL in nats, whether the tops agree, KL
    as served (if it is)."""
    for ids in windows:
        p, q = (_log_probabilities(model, ids) for model in (original, candidate))
        if p.shape != q.shape:
            raise UserError(
                f"vocabularies of {p.shape[1]} and {q.shape[1]} tokens cannot be compared"
            )
        following = torch.tensor(ids[1:]).unsqueeze(1)
        yield (
            -p.gather(1, following).squeeze(1),
            -q.gather(1, following).squeeze(1),
            _kl(p, q),
            (p.argmax(-1) == q.argmax(-1)).float(),
            _kl(p, _log_probabilities(served, ids)) if served else torch.empty(0),
        )


def _log_probabilities(model: LLM, ids: list[int]) -> Tensor:
    """float32 [T - 1, vocab], of each token but the first."""
    return torch.log_softmax(model.logits(ids)[:-1].float(), -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """float32 [T] of log-probabilities [T, vocab]."""
    return (p.exp() * (p - q)).sum(-1)


def telling(listener: Callable[[Progress], None]) -> Callable[[int, int], None]:
    """What `evaluate` wants as `progress`, for who listens to a conversion."""
    start = time.monotonic()

    def tell(done: int, total: int) -> None:
        seconds = time.monotonic() - start
        listener(Progress(done, total, seconds, None, doing="Measuring", unit="windows"))

    return tell
