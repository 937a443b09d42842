"""The canary: what a converted model said of one prompt, kept beside its weights and asked again at every start.

    nibble_canary.json   {"prompt": [token ids], "positions": [{"token_ids": [...], "logprobs": [...]}, ...]}
                         of each token of the prompt, the likeliest next ones and their log-probabilities

It is computed from what was written to disk, by other code than serves it (quant/conversion/witness.py). Whoever serves
rounds otherwise: activations and output head to 8 bits, the KV cache to 8, all to 16. So what is compared is how far
the distributions are apart, and only what no rounding explains is refused.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint.headers import read_json

FILE = "nibble_canary.json"
TOLERANCE = (
    0.1  # nats a token, on average over the prompt; 8 bits wherever there can be cost SmolLM2 0.002
)
_TOP = 16  # tokens of a position that are kept
_TOKEN = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Position(msgspec.Struct, forbid_unknown_fields=True):
    token_ids: Annotated[list[_TOKEN], msgspec.Meta(min_length=1, max_length=1024)]
    logprobs: list[Annotated[float, msgspec.Meta(le=0.0)]]


class Canary(msgspec.Struct, forbid_unknown_fields=True):
    prompt: Annotated[list[_TOKEN], msgspec.Meta(min_length=1, max_length=256)]
    positions: list[Position]


def of_logits(prompt: list[int], logits: Tensor) -> Canary:
    """logits: float [T, vocab], after each token of the prompt."""
    logprobs, tokens = torch.log_softmax(logits.double(), -1).topk(min(_TOP, logits.shape[1]))
    rounded = [[round(min(value, 0.0), 4) for value in row] for row in logprobs.tolist()]
    positions = [Position(ids, row) for ids, row in zip(tokens.tolist(), rounded, strict=True)]
    return Canary(prompt, positions)


def as_json(canary: Canary) -> dict[str, Any]:
    """The content of the file."""
    content: dict[str, Any] = msgspec.to_builtins(canary)
    return content


def read(folder: Path, vocab_size: int) -> Canary | None:
    """Of a checkpoint's folder; None where there is none. CheckpointError for a file that cannot be one."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        canary = msgspec.convert(read_json(file), Canary)
    except msgspec.ValidationError as error:
        raise _error(file, f"is no canary: {error}") from None
    rows = canary.positions
    if len(rows) != len(canary.prompt) or any(len(r.token_ids) != len(r.logprobs) for r in rows):
        raise _error(file, "is no canary: it has lists of different lengths")
    if max(max(canary.prompt), *(max(row.token_ids) for row in rows)) >= vocab_size:
        raise _error(file, f"has tokens that the vocabulary of {vocab_size} does not have")
    return canary


def check(canary: Canary, logits: Tensor, folder: Path) -> None:
    """CheckpointError unless logits [T, vocab] of the canary's prompt are as they were, but for rounding."""
    apart = divergence(canary, logits)
    if not apart <= TOLERANCE:  # nor NaN
        raise _error(
            folder / FILE,
            f"the model answers otherwise than when it was converted ({apart:.2g} nats a token, {TOLERANCE} are "
            "allowed): its weights or its config.json have changed",
            "see what `nibble verify` says, or download or convert it again; if you changed the model on purpose, "
            f"remove {FILE}",
        )


def divergence(canary: Canary, logits: Tensor) -> float:
    """Kullback-Leibler divergence of what is served from what was kept, in nats a token: over the kept tokens, and all
    others as one."""
    served = torch.log_softmax(logits.double(), -1).cpu()
    total = 0.0
    for row, position in zip(served, canary.positions, strict=True):
        kept = torch.tensor(position.logprobs, dtype=torch.float64)
        q = torch.cat([found := row[position.token_ids], _rest(found)])
        p = torch.cat([kept, _rest(kept)])
        total += float((p.exp() * (p - q)).sum())
    return total / len(canary.positions)


def _rest(logprobs: Tensor) -> Tensor:
    """The log-probability of all other tokens together."""
    return torch.log1p(-logprobs.exp().sum().clamp(max=1 - 1e-9)).reshape(1)


def _error(file: Path, problem: str, fix: str = "") -> CheckpointError:
    return CheckpointError(
        problem, file=file, fix=fix or f"download it again, or remove {FILE} to serve unchecked"
    )
