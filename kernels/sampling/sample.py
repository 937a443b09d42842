"""From logits to tokens on the device: no sort, no copy to the host, two launches whatever the batch asks for.

    logits [B, V] --scan_kernel--> x = logits after penalties, / temperature    [B, V] float32
                                   largest, sum of exp, race winner of each piece of the vocabulary
                  --choose_kernel--> token int64 [B]

A draw is engine/sampler.py's exponential race: the token with the largest p / E wins, E a hash of (seed, position, id).
So there is no sum to invert, and filters need no sorted list: the winner of the whole vocabulary is taken, and one pass
counts how many tokens, of what mass, come before it. If top_k, top_p and min_p keep it, it is the winner. If not, they
keep nothing less probable either, and the race is run again among those before it, in the same pass. With top_p = 0.9
nine of ten draws need one pass; a pass reads only pieces whose largest logit reaches the candidate's. Only top_p under
top_k needs to know more: the mass of the k largest, from a radix selection of four passes.

Equal logits are ordered by id, so exactly top_k of them stay. Sums are float32: against the engine's float64 a token
may differ if the nucleus ends within some 1e-6 of it.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..fused.rows import FLOATS, need, need_rows
from .sample_kernels import (
    PIECE,
    bias_kernel,
    bitmask_kernel,
    choose_kernel,
    record_kernel,
    scan_kernel,
)

BLOCK = 256
MASK_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each of B rows draws; tensors on the device, whose contents may change between replays of a CUDA graph.

    filters float32 [B, 4]: temperature (0: greedy), top_k (0: off), top_p (1: off), min_p (0: off).
    keys int32 [B, 2]: `race_key` of each row.
    penalties float32 [B, 3]: repetition (1: off), presence, frequency; state_rows int32 [B]: each row's row of `state`,
    -1: no penalties; state int32 [rows, V], from `new_state`. All three, or none where nobody asks for penalties.
    """

    filters: Tensor
    keys: Tensor
    penalties: Tensor | None = None
    state_rows: Tensor | None = None
    state: Tensor | None = None

    def check(self, kernel: str, rows: int, vocab: int) -> None:
        """Raise KernelArgumentError naming the tensor that does not fit [rows, vocab] logits."""
        fields: list[tuple[str, Tensor, torch.dtype, tuple[int | None, ...]]] = [
            ("filters", self.filters, torch.float32, (rows, 4)),
            ("keys", self.keys, torch.int32, (rows, 2)),
        ]
        given = [t is not None for t in (self.penalties, self.state_rows, self.state)]
        need(all(given) or not any(given), kernel, "penalties, state_rows and state come together")
        if self.penalties is not None and self.state_rows is not None and self.state is not None:
            fields += [
                ("penalties", self.penalties, torch.float32, (rows, 3)),
                ("state_rows", self.state_rows, torch.int32, (rows,)),
                ("state", self.state, torch.int32, (None, vocab)),
            ]
        for name, tensor, dtype, shape in fields:
            need_rows(kernel, name, tensor, (dtype,), *shape)
            need(tensor.is_contiguous(), kernel, f"{name} is not contiguous")


def race_key(seed: int, position: int) -> tuple[int, int]:
    """What `SamplingRows.keys` holds for the token at this position of a request: engine/sampler.py's key, as int32."""
    packed = struct.pack("<Qq", seed & 0xFFFFFFFFFFFFFFFF, position)
    first, second = struct.unpack("<ii", hashlib.blake2b(packed, digest_size=8).digest())
    return first, second


def new_state(rows: int, vocab: int, device: torch.device) -> Tensor:
    """What penalties need of `rows` requests: int32 [rows, vocab], 2 * (times in the output) + (in the prompt)."""
    return torch.zeros((rows, vocab), dtype=torch.int32, device=device)


def record(state: Tensor, row: int, prompt: Tensor, output: Tensor) -> None:
    """Give a row of `state` to a request: prompt and output int64 tokens, which must be valid ids. From then on
    `sample` adds what it chooses."""
    need_rows("record", "state", state, (torch.int32,), None, None)
    state[row] = 0
    for tokens, is_output in ((prompt, False), (output, True)):
        need_rows("record", "tokens", tokens, (torch.int64,), None)
        if len(tokens):
            record_kernel[(triton.cdiv(len(tokens), BLOCK),)](
                state[row], tokens, len(tokens), OUTPUT=is_output, BLOCK=BLOCK, num_warps=2
            )


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, biases: Tensor) -> None:
    """logits[rows, tokens] += biases, in place: logit_bias, and -inf for what must not be drawn. rows, tokens int64
    [n], pairs distinct and within logits [B, V]; biases float32 [n]."""
    need_rows("add_bias", "logits", logits, FLOATS, None, None)
    need_rows("add_bias", "rows", rows, (torch.int64,), None)
    need_rows("add_bias", "tokens", tokens, (torch.int64,), len(rows))
    need_rows("add_bias", "biases", biases, (torch.float32,), len(rows))
    if len(rows):
        bias_kernel[(triton.cdiv(len(rows), BLOCK),)](
            logits, rows, tokens, biases, len(rows), logits.stride(0), BLOCK=BLOCK, num_warps=2
        )


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """logits[rows[i], t] = -inf, in place, where bit t of bitmask[i] is 0: what a grammar does not allow. rows int64
    [n], distinct and within logits [B, V]; bitmask int32 [n, ceil(V / 32)], token t at bit t % 32 of word t // 32."""
    need_rows("apply_bitmask", "logits", logits, FLOATS, None, None)
    need_rows("apply_bitmask", "rows", rows, (torch.int64,), None)
    vocab = logits.shape[1]
    words = triton.cdiv(vocab, 32)
    need_rows("apply_bitmask", "bitmask", bitmask, (torch.int32,), len(rows), words)
    need(bitmask.is_contiguous(), "apply_bitmask", "bitmask is not contiguous")
    if len(rows):
        bitmask_kernel[(len(rows), triton.cdiv(vocab, MASK_BLOCK))](
            logits, rows, bitmask, vocab, logits.stride(0), words, BLOCK=MASK_BLOCK, num_warps=4
        )


def greedy(logits: Tensor) -> Tensor:
    """Token int64 [B] of the largest logit [B, V], the first of equals; -1 where a row holds NaN or has no finite
    largest."""
    return _select("greedy", logits, None)


def sample(logits: Tensor, sampling: SamplingRows) -> Tensor:
    """Tokens int64 [B] drawn as `sampling` says from logits [B, V] (16 bits or float32), which stay as they are; -1
    where a row holds NaN or no finite largest. Chosen tokens are added to `sampling.state`.

    Raises KernelArgumentError naming the argument that does not fit.
    """
    return _select("sample", logits, sampling)


def _select(name: str, logits: Tensor, sampling: SamplingRows | None) -> Tensor:
    need_rows(name, "logits", logits, FLOATS, None, None)
    rows, vocab = logits.shape
    need(
        0 < vocab < 2**24, name, f"a vocabulary of {vocab} tokens; from 1 to 2**24 - 1 are possible"
    )
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    pieces = triton.cdiv(vocab, PIECE)
    part_max, part_sum, part_best = torch.empty(
        (3, rows, pieces), dtype=torch.float32, device=logits.device
    )
    part_id = torch.empty((rows, pieces), dtype=torch.int32, device=logits.device)
    x = filters = keys = penalties = state_rows = state = None
    if sampling is not None:
        sampling.check(name, rows, vocab)
        x = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
        filters, keys, penalties = sampling.filters, sampling.keys, sampling.penalties
        state_rows, state = sampling.state_rows, sampling.state
    scan_kernel[(rows, pieces)](
        logits,
        x,
        part_max,
        part_sum,
        part_best,
        part_id,
        filters,
        keys,
        penalties,
        state_rows,
        state,
        logits.stride(0),
        vocab,
        SAMPLED=sampling is not None,
        PIECE=PIECE,
        num_warps=4,
    )
    choose_kernel[(rows,)](
        x,
        part_max,
        part_sum,
        part_best,
        part_id,
        filters,
        keys,
        state_rows,
        state,
        tokens,
        vocab,
        pieces,
        SAMPLED=sampling is not None,
        PARTS=triton.next_power_of_2(pieces),
        PIECE=PIECE,
        num_warps=8,
    )
    return tokens
