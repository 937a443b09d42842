"""Measures on this machine's GPU which tiles the integer and FP8 products are fastest with, for `nibble tune`.

Candidates are compiled and checked against plain torch in several processes, then timed one at a time with nothing
beside them.
"""

import datetime
import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from nibble.errors import UserError
from nibble.kernels.awq import linear as awq
from nibble.kernels.dequant_gemm import candidates
from nibble.kernels.dequant_gemm.candidates import DEQUANTIZE, Measurement, Shape, Trial
from nibble.kernels.dequant_gemm.tiles import Table
from nibble.kernels.fp8 import w8a16
from nibble.kernels.measure.timing import Card
from nibble.quant.device import named_device

if TYPE_CHECKING:
    from nibble.kernels.dequant_gemm.trial import Kind

# What can be asked for: kind, bits, group, whose decoding is measured, and what else its table serves.
WEIGHTS = {
    "int4": ("int", 4, 128, awq.repack, ("int2", "int3", "int4")),
    "int8": ("int", 8, 128, awq.repack, ("int8",)),
    "fp8": ("fp8", 8, 0, w8a16.repack, ("fp8",)),
}
NARROW = 32  # 4-bit weights with scales for so few features have tiles of their own: they need more registers
BATCH = 4  # trials that a process compiles and checks at once: seconds
WORKER_BYTES = 8 << 30  # of GPU memory that a process needs at most, for the largest projections


def need_card(name: str) -> torch.device:
    """The CUDA device to measure on. UserError where there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise UserError(
            "nibble tune measures on an NVIDIA GPU, and torch sees none here; on a machine with one, "
            "`nibble doctor` says what is missing"
        )
    device = named_device(name)
    if device.type != "cuda":
        raise UserError(f"--device {name}: is no GPU (give cuda or cuda:N)")
    return torch.device("cuda", device.index or 0)


def shapes_of(model: str) -> tuple[Shape, ...]:
    """(N, K) of a model's fused projections: qkv, o, gate and up, down."""
    from nibble.architectures.registry import model_spec
    from nibble.quant.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    spec = model_spec(checkpoint.config, checkpoint.names())
    groups = [group for index in range(spec.num_layers) for group in spec.groups(index)]
    shapes = [(sum(group.out_features), group.in_features) for group in groups]
    return tuple(dict.fromkeys(shapes))


def weights_of(model: str) -> list[str] | None:
    """What a quantized checkpoint's weights are called in WEIGHTS; None: 16 bits, or nothing a table is for."""
    from nibble.quant.checkpoint import open_checkpoint

    scheme = open_checkpoint(model).scheme
    if scheme is None or scheme.default is None:
        return None
    bits = scheme.default.bits
    return [
        next(
            name
            for name, (kind, most, *_) in WEIGHTS.items()
            if kind == scheme.default.kind and bits <= most
        )
    ]


@dataclass(frozen=True, slots=True)
class Tuner:
    """Where and on what shapes to measure, who compiles, and how to show it: `tell(text, done, total)`."""

    shapes: tuple[Shape, ...]
    card: torch.device
    pool: Executor
    tell: Callable[[str, int, int], None]

    def measure(self, name: str) -> Table:
        """The best table for one kind of WEIGHTS. UserError where not even dequantization runs."""
        from nibble.kernels.dequant_gemm.trial import Kind

        kind, bits, group, repack, serves = WEIGHTS[name]
        table = self._search(name, Kind(kind, bits, group, repack), serves)
        if name == "int4" and table.gemm:
            narrow_kind = Kind(kind, bits, NARROW, repack)
            narrow = self._search(f"{name} in groups of {NARROW}", narrow_kind, serves)
            table = candidates.with_narrow(table, narrow, NARROW)
        return table

    def _search(self, label: str, kind: "Kind", serves: tuple[str, ...]) -> Table:
        """The three rounds of candidates.py."""
        cc = Card.of(self.card).cc
        done: list[Measurement] = []
        for number, plan in enumerate(
            (candidates.first_round, candidates.second_round, candidates.third_round), 1
        ):
            done += self._run(f"{label}, round {number} of 3", kind, plan(done, self.shapes, cc))
        broken = [m for m in done if m.trial.candidate == DEQUANTIZE and m.reason]
        if broken:
            raise UserError(
                f"{label}: dequantization of {broken[0].trial.shape} {broken[0].reason}"
            )
        return candidates.build_table(
            done, self.shapes, cc, serves, _origin(self.card, self.shapes)
        )

    def _run(self, label: str, kind: "Kind", trials: list[Trial]) -> list[Measurement]:
        """Check all trials in processes of their own, then time those that may win."""
        from nibble.kernels.dequant_gemm.trial import reasons, subject

        trials = sorted(trials, key=lambda t: (t.shape, t.rows))
        by_shape = [list(group) for _, group in groupby(trials, key=lambda t: t.shape)]
        batches = [group[i : i + BATCH] for group in by_shape for i in range(0, len(group), BATCH)]
        why: dict[Trial, str] = {}
        running = {
            self.pool.submit(reasons, kind, self.card.index, batch): batch for batch in batches
        }
        for future in as_completed(running):
            why |= dict(zip(running[future], future.result(), strict=True))
            self.tell(f"{label}: compiling and checking", len(why), len(trials))
        done = []
        for trial in trials:
            reason = why[trial]
            done.append(
                Measurement(trial, reason=reason)
                if reason
                else subject(kind, trial.shape, self.card.index).measure(trial)
            )
            self.tell(f"{label}: timing", len(done), len(trials))
        return done


def workers_for(card: torch.device) -> int:
    """How many processes may compile at once: as many as cores and the card's free memory allow."""
    free, _ = torch.cuda.mem_get_info(card)
    return max(1, min(len(os.sched_getaffinity(0)), 16, free // WORKER_BYTES - 1))


def _origin(card: torch.device, shapes: tuple[Shape, ...]) -> str:
    import triton

    sizes = ", ".join(f"{n}x{k}" for n, k in shapes)
    return (
        f"nibble tune, {datetime.date.today().isoformat()}, {torch.cuda.get_device_name(card)}, torch "
        f"{torch.__version__}, triton {triton.__version__}, {sizes}"
    )


if __name__ == "__main__":
    from nibble.cli import main

    raise SystemExit(main(["tune", *sys.argv[1:]]))
