"""What a finished conversion says of one prompt: the canary that every start of it is compared with.

The checkpoint is read back from disk and taken through transformers' own blocks in float32, one block in memory at a
time: neither what was in memory while converting nor the code that will serve it takes part.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from .. import canary
from ..checkpoint import open_checkpoint
from .blocks import BlockSource

TEXT = "The capital of France is Paris. In 1789, the people of the city"
_LENGTH = 16  # tokens
_ROWS = 8192  # of the output head at a time


def witness(folder: Path, device: torch.device) -> canary.Canary:
    """Of the checkpoint in `folder`. UserError if what was written gives no numbers."""
    source = BlockSource(open_checkpoint(folder), device)
    prompt = _prompt(folder, source.spec.vocab_size)
    logits = _logits(source, torch.tensor([prompt]))
    if not torch.isfinite(logits).all():
        raise UserError(f"{folder}: the converted model gives logits that are not finite")
    return canary.of_logits(prompt, logits)


def _prompt(folder: Path, vocab_size: int) -> list[int]:
    """A text, in the model's own tokens if its tokenizer can be read without transformers; else any tokens."""
    ids: list[int] = []
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids[:_LENGTH]
    if not ids or max(ids) >= vocab_size:
        ids = [(7919 * i + 101) % vocab_size for i in range(_LENGTH)]
    return ids


@torch.no_grad()
def _logits(source: BlockSource, token_ids: Tensor) -> Tensor:
    """token_ids [1, T] -> float32 [T, vocab]."""
    spec, checkpoint = source.spec, source.checkpoint
    hidden = source.embed(token_ids)
    arguments = source.keyword_arguments(hidden)
    for index in range(len(source)):
        out = source.load(index)(hidden, **arguments[index])
        hidden = out[0] if isinstance(out, tuple) else out
        checkpoint.release()
    weight = checkpoint.tensor(f"{spec.prefix}{spec.final_norm}.weight", torch.float32).to(
        source.device
    )
    weight = weight + 1.0 if spec.norm_offset else weight
    hidden = source.last_hidden(hidden)[0]
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + spec.norm_eps) * weight
    own = spec.head in checkpoint.modules()
    head = checkpoint.dense(spec.head if own else f"{spec.prefix}{spec.embedding}")
    logits = torch.cat([hidden @ rows.to(hidden).t() for rows in head.split(_ROWS)], -1)
    if (bias := checkpoint.bias(spec.head) if own else None) is not None:
        logits = logits + bias.to(logits)
    logits = logits * spec.logits_scale
    if spec.final_soft_cap is not None:
        logits = spec.final_soft_cap * torch.tanh(logits / spec.final_soft_cap)
    return logits.cpu()
