"""What the sweep measures of one tiny model, each time against transformers with the same weights.

float32     largest difference of logits, by their spread: a whole prompt, chunks, decoding, a ragged batch, and how far
            what a preempted request chose lies under transformers' best
bfloat16    error to float32 logits, by transformers' own error in bfloat16; tokens after a preemption as without
conversion  logits of the result as served, to transformers with the weights that it stands for
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nibble
from nibble.architectures.base import Experts, ModelSpec, experts_of
from nibble.architectures.registry import model_spec
from nibble.engine.backends.base import Backend
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

from ..engine import driving
from ..engine.driving import logits, make_request

prompt = partial(driving.prompt, first=9)  # those before stand for images, for models that see
Reference = Callable[[list[int]], Tensor]  # tokens -> float32 [T, vocab_size]
LENGTHS = (1, 5, 29, 60)  # of the ragged batch; the windows are 24
ROUNDS = 4  # where rounding is measured, which is noise
ANSWER = 40
# What the cache holds where three requests of 30 + ANSWER are preempted, and where they are though windows keep but 24
SCARCE_TOKENS, SCARCE_IN_WINDOWS = 144, 80


def make_runner(folder: Path, dtype: str) -> Runner:
    """In blocks of 4 tokens in float32, so that many are crossed; no more rounding than the dtype asks for."""
    unrounded = {"cpu_activations": "bf16", "lm_head_bits": 16} if dtype == "bfloat16" else {}
    return Runner(
        EngineConfig(
            model=str(folder),
            dtype=dtype,
            kv_cache_memory=1 << 24,
            max_num_seqs=4,
            block_size=4 if dtype == "float32" else 16,
            prepared_cache=None,
            **unrounded,
        )
    )


def each_way(runner: Runner, rounds: int = 1) -> dict[str, list[tuple[list[int], Tensor]]]:
    """Way -> (tokens, their logits), however a scheduler may cut the work up, over scattered blocks. rounds: of other
    prompts."""
    found: dict[str, list[tuple[list[int], Tensor]]] = {}
    for seed in range(rounds):
        for way, chunk in (("whole", 256), ("chunks", 16), ("decode", 1)):
            request = make_request(prompt(60, seed), list(range(18, -1, -1)))
            found.setdefault(way, []).append((request.token_ids, *logits(runner, [request], chunk)))
        ragged = [
            make_request(prompt(n, n + 100 * seed), list(range(20 * i + 19, 20 * i - 1, -1)))
            for i, n in enumerate(LENGTHS)
        ]
        rows = logits(runner, ragged, 13)
        found.setdefault("ragged", []).extend(
            (request.token_ids, each) for request, each in zip(ragged, rows, strict=True)
        )
    return found


def float32_differences(runner: Runner, reference: Reference) -> dict[str, float]:
    """Way -> largest difference, by the spread of the logits."""
    differences = {
        way: max(difference(got, reference(ids)) for ids, got in pairs)
        for way, pairs in each_way(runner).items()
    }
    return differences | {"preempted": _regret(answers(runner, scarce=True), reference)}


def difference(got: Tensor, want: Tensor) -> float:
    """NaN where either has one."""
    return float((got - want).abs().max() / want.std())


def _regret(answered: list[list[int]], reference: Reference) -> float:
    """How far a chosen token lies under the likeliest, at most, by the spread of the logits."""
    worst = 0.0
    for ids in answered:
        want = reference(ids)[-ANSWER - 1 : -1]
        chosen = want.gather(1, torch.tensor(ids[-ANSWER:])[:, None])[:, 0]
        worst = max(worst, float((want.amax(1) - chosen).max() / want.std()))
    return worst


def answers(runner: Runner, scarce: bool) -> list[list[int]]:
    """Three prompts with their greedy answers, by the engine, at once. scarce: in a cache that cannot hold them."""
    plenty = runner.num_blocks
    if scarce:
        # where all layers have a window, a request needs no more than its prompt does
        tokens = SCARCE_TOKENS if runner.windows[0] is None else SCARCE_IN_WINDOWS
        runner.num_blocks = tokens // runner.block_size
    try:
        core = EngineCore(
            EngineConfig(model="", max_num_seqs=4, enable_prefix_caching=False), runner
        )
    finally:
        runner.num_blocks = plenty
    found = [prompt(30, seed) for seed in range(3)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ANSWER)
    for index, ids in enumerate(found):
        core.add(AddRequest(str(index), list(ids), params))
    while core.has_work:
        for output in core.step():
            found[int(output.request_id)] += output.token_ids
    if scarce != bool(core.stats().num_preemptions):
        raise RuntimeError(f"{core.stats().num_preemptions} preemptions, scarce: {scarce}")
    return found


def bfloat16_errors(
    runner: Runner, exact: Reference, rounded: Reference, by_token: bool
) -> dict[str, float]:
    """Way -> error, by that of transformers in bfloat16 (`rounded`). by_token: the median of the tokens, as where some
    choose another expert."""
    ratios = {}
    for way, pairs in each_way(runner, ROUNDS).items():
        wants = [exact(ids) for ids, _ in pairs]
        ours = torch.cat([got - want for (_, got), want in zip(pairs, wants, strict=True)])
        theirs = torch.cat([rounded(i) - want for (i, _), want in zip(pairs, wants, strict=True)])
        ratios[way] = _size(ours, by_token) / _size(theirs, by_token)
    return ratios


def _size(error: Tensor, by_token: bool) -> float:
    return float(error.norm(dim=1).median() if by_token else error.norm())


def convert(folder: Path, out: Path, method: str) -> Path:
    """The conversion, from a folder with a tokenizer, with as little calibration as works."""
    options = {} if method == "fp8" else {"group_size": 32}
    with redirect_stderr(StringIO()):
        return nibble.convert(
            folder, out, method, evaluate=False, calib_samples=4, calib_seqlen=32, **options
        )


def dequantized(out: Path, original: Path) -> Path:
    """What a conversion stands for, as plain float32 weights beside it, laid out as transformers lays the original."""
    plain = out.with_name(f"{out.name}-plain")
    checkpoint = open_checkpoint(out)
    dequantize_checkpoint(checkpoint, plain, torch.float32)
    file = "model.safetensors"
    tensors, wanted = load_file(plain / file), load_file(original / file)
    model = model_spec(checkpoint.config, checkpoint.names())
    for index, layer in enumerate(model.layers):
        if (experts := experts_of(layer.mlp)) is not None:
            _stack(tensors, wanted, f"{model.layer_name(index)}.", experts)
    save_file(tensors, plain / file, {"format": "pt"})
    return plain


def _stack(
    tensors: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str, experts: Experts
) -> None:
    """One tensor for the matrices of all experts, and one for their biases, where that is what is wanted."""
    names = experts.names
    transposed = False  # gate and up say it for down, which may be square
    for stack, parts in zip(names.stacked, ((names.gate, names.up), (names.down,)), strict=True):
        for wanted_name, kind in ((stack, "weight"), (f"{stack}_bias", "bias")):
            if (name := prefix + wanted_name) in wanted:
                each = [
                    [tensors.pop(f"{prefix}{part}.{kind}".replace("*", str(i))) for part in parts]
                    for i in range(experts.num_experts)
                ]
                join = _interleave if names.interleaved else torch.cat
                stacked = torch.stack([join(matrices) for matrices in each])
                if kind == "weight":
                    transposed |= stacked.shape != wanted[name].shape
                    stacked = stacked.mT.contiguous() if transposed else stacked
                tensors[name] = stacked


def _interleave(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows, 1).flatten(0, 1)


def divergence(got: Tensor, want: Tensor) -> float:
    """Mean KL(want || got) of next tokens, by that of other tokens' predictions."""
    p, q = torch.log_softmax(want, -1), torch.log_softmax(got, -1)
    other = p.roll(1, 0)
    return float((p.exp() * (p - q)).sum() / (p.exp() * (p - other)).sum())


def why_not(backend: Backend, model: ModelSpec) -> str | None:
    """None if a backend takes every layer of a model, else its first reason."""
    reasons = (backend.why_not(layer, model) for layer in model.layers)
    return next(filter(None, reasons), None)
