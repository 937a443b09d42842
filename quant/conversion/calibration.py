"""Calibration: which tokens are shown to the model, and what its linear layers see of them.

Tokens come from a bundled mix of prose, docs, code and chat (quant/data, see NOTICE there; chat in the model's own
template), or from a file. Windows are drawn with a seeded generator, so a conversion can be repeated exactly, and the
SHA-256 of the text is recorded. Evaluation text is separate: no chapter, page or file is in both.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .experts import forget_tokens, shown_at_least

DATA = Path(__file__).resolve().parents[1] / "data"
SHARES = {"prose": 0.35, "docs": 0.2, "code": 0.25, "chat": 0.2}  # of the windows
EVALUATION = ("prose", "docs", "code")
HESSIAN_BYTES = 1 << 30  # of what is calibrated in one pass (one that is larger: alone)
MICRO_BATCH = 8  # windows run through a block at a time where only sums are wanted


@dataclass(frozen=True, slots=True)
class Samples:
    """Token windows [n, length], and where they came from."""

    token_ids: Tensor
    source: str
    sha256: str  # of the text, before tokens


def bundled_samples(tokenizer: Any, count: int, length: int, seed: int) -> Samples:
    """`count` windows of `length` tokens from the bundled mix, by SHARES, shuffled."""
    texts = {
        name: (DATA / f"calib_{name}.txt").read_text(encoding="utf-8")
        for name in SHARES
        if name != "chat"
    }
    chats = (DATA / "calib_chat.json").read_text(encoding="utf-8")
    digest = hashlib.sha256("".join([*texts.values(), chats]).encode()).hexdigest()
    texts["chat"] = render_chats(tokenizer, json.loads(chats))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, taken in zip(SHARES, _apportion(count), strict=True):
        ids = tokenize(tokenizer, texts[name])
        parts.append(draw_windows(ids, taken, length, bos_token(tokenizer), generator))
    windows = torch.cat(parts)[torch.randperm(count, generator=generator)]
    return Samples(windows, "bundled mix", digest)


def file_samples(tokenizer: Any, file: Path, count: int, length: int, seed: int) -> Samples:
    """`count` windows of `length` tokens of a UTF-8 text file. Raises UserError if it cannot be used."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    ids = tokenize(tokenizer, text)
    if len(ids) < length:
        raise UserError(
            f"{file}: holds {len(ids)} tokens, fewer than one window of {length} (give more text, or a "
            "smaller --calib-seqlen)"
        )
    generator = torch.Generator().manual_seed(seed)
    windows = draw_windows(ids, count, length, bos_token(tokenizer), generator)
    return Samples(windows, file.name, hashlib.sha256(text.encode()).hexdigest())


def evaluation_windows(tokenizer: Any, text: str, count: int, length: int) -> list[list[int]]:
    """Up to `count` windows of `length` tokens spread evenly over a text; fewer if it is shorter."""
    bos = bos_token(tokenizer)
    ids = tokenize(tokenizer, text)
    body = length - len(bos)
    count = min(count, len(ids) // body)
    stride = len(ids) // max(count, 1)
    return [bos + ids[i * stride : i * stride + body].tolist() for i in range(count)]


def render_chats(tokenizer: Any, chats: list[list[dict[str, str]]]) -> str:
    """Conversations in the model's own chat template, or as plain turns where it has none."""
    if getattr(tokenizer, "chat_template", None):
        return "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    return "\n\n".join(
        "\n".join(f"{turn['role']}: {turn['content']}" for turn in chat) for chat in chats
    )


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Text -> int64 token ids [n], without special tokens added."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False))


def bos_token(tokenizer: Any) -> list[int]:
    """[id] if the tokenizer starts every text with a token of its own, else []."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    return full[:1] if full[:1] != plain[:1] else []


def draw_windows(
    ids: Tensor, count: int, length: int, bos: list[int], generator: torch.Generator
) -> Tensor:
    """`count` windows [count, length] from token ids [n]: one at random from each of `count` equal stretches."""
    body = length - len(bos)
    if len(ids) < body:
        ids = ids.repeat(-(-body // len(ids)))
    stretch = (len(ids) - body) / max(count, 1)
    jitter = torch.rand(count, generator=generator)
    starts = [int((i + jitter[i].item()) * stretch) for i in range(count)]
    return (
        torch.stack(
            [torch.cat([torch.tensor(bos, dtype=ids.dtype), ids[s : s + body]]) for s in starts]
        )
        if count
        else torch.empty(0, length, dtype=torch.int64)
    )


def _apportion(count: int) -> list[int]:
    """Windows per domain: rounded shares, the remainder to the first."""
    taken = [int(count * share) for share in SHARES.values()]
    taken[0] += count - sum(taken)
    return taken


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What is known of the inputs x of a linear."""

    mean_abs: Tensor  # E|x| [in]
    products: Tensor  # E[x x^T] [in, in]


@torch.no_grad()
def input_statistics(
    block: nn.Module, hidden: Tensor, kwargs: dict[str, Any], modules: Iterable[str]
) -> dict[str, InputStatistics]:
    """Run a block on hidden states [n, T, hidden]; returns what the inputs of some of its submodules are like."""
    sums: dict[str, InputStatistics] = {}
    seen: Counter[str] = Counter()

    def add(module: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        if module not in sums:
            sums[module] = InputStatistics(
                x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
            )
        sums[module].mean_abs.add_(x.abs().sum(0))
        sums[module].products.addmm_(x.t(), x)
        seen[module] += len(x)

    with _hooked(block, modules, add):
        for batch in hidden.split(MICRO_BATCH):
            with shown_at_least(block, len(batch) / len(hidden)):
                block(batch, **kwargs)
    for module, found in sums.items():
        found.mean_abs.div_(seen[module])
        found.products.div_(seen[module])
    return sums


@torch.no_grad()
def mean_squares(
    block: nn.Module, hidden: Tensor, kwargs: dict[str, Any], modules: Iterable[str]
) -> dict[str, Tensor]:
    """E[x^2] [in] of the inputs x of some submodules, of a block run on hidden states [n, T, hidden]."""
    found: dict[str, Tensor] = {}

    def keep(module: str, x: Tensor) -> None:
        found[module] = x.flatten(0, -2).square().mean(0)

    with _hooked(block, modules, keep), shown_at_least(block, 1.0):
        block(hidden, **kwargs)
    return found


@torch.no_grad()
def run_quantizing(
    block: nn.Module,
    hidden: Tensor,
    kwargs: dict[str, Any],
    stages: Sequence[Sequence[str]],
    quantize: Callable[[str, Tensor], None],
    at_once: int | None = None,
) -> None:
    """Replace hidden states [n, T, hidden], in place, by a block's outputs, quantizing the block on the way.

    The moment the inputs x of a module arrive, `quantize(module, E[x x^T])` may replace the weights that will read
    them, so each sees exactly what the quantized weights before it produce, at the price of one pass. All windows go at
    once: activations inside the block set the peak of memory. Where that is too much, `at_once` windows go at a time,
    and the block runs once more for each stage: modules that do not wait for each other.
    """
    if at_once is not None and at_once < len(hidden):
        _run_in_parts(block, hidden, kwargs, stages, quantize, at_once)
        return
    forget_tokens(block)

    def hook(module: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        quantize(module, (x.t() @ x) / len(x))

    modules = [module for stage in stages for module in stage]
    with _hooked(block, modules, hook), shown_at_least(block, 1.0):
        out = block(hidden, **kwargs)
    hidden.copy_(out[0] if isinstance(out, tuple) else out)


@torch.no_grad()
def run_observing(
    block: nn.Module, hidden: Tensor, kwargs: dict[str, Any], modules: Iterable[str], at_once: int
) -> dict[str, Tensor]:
    """Replace hidden states [n, T, hidden], in place, by a block's outputs; max|x| [1] of the inputs of each module."""
    absmax = {module: hidden.new_zeros(1) for module in modules}

    def widen(module: str, x: Tensor) -> None:
        absmax[module] = torch.maximum(absmax[module], x.abs().max())

    with _hooked(block, absmax, widen):
        for part in hidden.split(at_once):
            with shown_at_least(block, len(part) / len(hidden)):
                out = block(part, **kwargs)
            part.copy_(out[0] if isinstance(out, tuple) else out)
    return absmax


class _EarlyExit(Exception):
    """The rest of the block need not run."""


def _run_in_parts(
    block: nn.Module,
    hidden: Tensor,
    kwargs: dict[str, Any],
    stages: Sequence[Sequence[str]],
    quantize: Callable[[str, Tensor], None],
    at_once: int,
) -> None:
    for modules in (part for stage in stages for part in in_memory(block, stage)):
        hessians: dict[str, Tensor] = {}
        seen: Counter[str] = Counter()

        def add(
            module: str,
            x: Tensor,
            hessians: dict[str, Tensor] = hessians,
            seen: Counter[str] = seen,
            last: str = modules[-1],
        ) -> None:
            x = x.flatten(0, -2)
            if module not in hessians:
                hessians[module] = x.new_zeros(x.shape[1], x.shape[1])
            hessians[module].addmm_(x.t(), x)
            seen[module] += len(x)
            if module == last:
                raise _EarlyExit

        with _hooked(block, modules, add):
            for part in hidden.split(at_once):
                with suppress(_EarlyExit), shown_at_least(block, len(part) / len(hidden)):
                    block(part, **kwargs)
        for module in modules:
            quantize(module, hessians.pop(module).div_(seen[module]))
    forget_tokens(block)
    for part in hidden.split(at_once):
        out = block(part, **kwargs)
        part.copy_(out[0] if isinstance(out, tuple) else out)


def in_memory(block: nn.Module, modules: Iterable[str]) -> Iterator[list[str]]:
    """Modules of a block, in order, as many at a time as HESSIAN_BYTES holds Hessians of."""
    together: list[str] = []
    left = HESSIAN_BYTES
    for module in modules:
        needed = 4 * _width(block.get_submodule(module)) ** 2
        if together and needed > left:
            yield together
            together, left = [], HESSIAN_BYTES
        together.append(module)
        left -= needed
    if together:
        yield together


def _width(module: Any) -> int:
    """Of the inputs of a linear, of what chooses experts, or of experts."""
    if hasattr(module, "in_features"):
        return int(module.in_features)
    return int(module.weight.shape[1])


@contextmanager
def _hooked(
    block: nn.Module, modules: Iterable[str], hook: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `hook(module, input)` whenever one of these submodules is about to run."""

    def hook_for(module: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _self, args: hook(module, args[0])

    handles = [
        block.get_submodule(module).register_forward_pre_hook(hook_for(module))
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
