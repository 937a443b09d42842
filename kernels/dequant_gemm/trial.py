"""Runs what candidates.py wants to know on a card: is it right, and how long does it take. Importing this imports
Triton; everything here needs a CUDA device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...quant.weight import QuantizedWeight
from ..measure.timing import Card, microseconds, rotations
from . import launch
from .candidates import ROWS, Candidate, Measurement, Shape, Trial
from .gemm import gemm
from .gemv import gemv
from .layout import ShuffledWeight
from .tiles import Table, weights_name

TOLERANCE = 0.05  # largest error, relative to the root mean square of the result: rounding costs below a fifth of it


@dataclass(frozen=True, slots=True)
class Kind:
    """What kind of weights are measured."""

    kind: str  # "int", "fp8"
    bits: int
    group: int  # features that share a scale, of FP8 those of as many outputs; 0: all of one output
    repack: Callable[[QuantizedWeight], ShuffledWeight] | None = (
        None  # their room's; None: only drawn, not measured
    )

    @property
    def name(self) -> str:
        return weights_name(self.kind, self.bits)


def random_weight(
    kind: Kind, out: int, inner: int, device: torch.device, zero: str = "zeros"
) -> QuantizedWeight:
    """Random codes, and scales that make outputs of random activations about as large as these.

    zero: "mid", "zeros" or "mins", for integers.
    """
    codes = torch.randint(
        0,
        256 if kind.kind == "fp8" else 2**kind.bits,
        (out, inner),
        dtype=torch.uint8,
        device=device,
    )
    group = kind.group or inner
    rows = kind.group if kind.kind == "fp8" and kind.group else 1
    shape = (-(-out // rows), -(-inner // group))
    spread = torch.rand(shape, device=device) + 0.5
    if kind.kind == "fp8":
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        return QuantizedWeight(
            codes.view(torch.float8_e4m3fn),
            spread / (128 * inner**0.5),
            kind="fp8",
            bits=8,
            block=(rows, group),
        )
    scales = (spread * 3 / (2**kind.bits * inner**0.5)).half()
    zeros = (
        torch.randint(0, 2**kind.bits, shape, dtype=torch.uint8, device=device)
        if zero == "zeros"
        else None
    )
    mins = -scales.float() * 2 ** (kind.bits - 1) * spread if zero == "mins" else None
    return QuantizedWeight(codes, scales, zeros, mins, bits=kind.bits, block=(1, group))


def rotated(weight: ShuffledWeight, l2_bytes: int) -> list[ShuffledWeight]:
    """The weight, and as many copies as keep it out of the L2 cache."""
    count = rotations(weight.words.nbytes + weight.scales.nbytes, l2_bytes)
    return [weight] + [
        replace(
            weight,
            words=weight.words.clone(),
            scales=weight.scales.clone(),
            locks=weight.locks.clone(),
        )
        for _ in range(count - 1)
    ]


class Subject:
    """One weight with activations for every number of rows, and what their product is."""

    def __init__(self, kind: Kind, shape: Shape, device: torch.device):
        if kind.repack is None:
            raise ValueError(f"{kind} is only drawn, not measured")
        self.card = Card.of(device)
        self.dtype = torch.bfloat16 if self.card.cc >= 80 else torch.float16
        torch.manual_seed(0)
        weight = random_weight(kind, *shape, device)
        self.x = torch.randn(ROWS[-1], shape[1], device=device).to(self.dtype)
        self.expected = self.x.float() @ weight.dequantize(torch.float32).t()
        self.weights = rotated(kind.repack(weight), self.card.l2_bytes)

    def call(self, candidate: Candidate, rows: int, weight: ShuffledWeight) -> Tensor:
        """y [rows, N]."""
        x, tile = self.x[:rows], candidate.tile
        if tile is None:
            return F.linear(x, launch.dequantize(weight, self.dtype))
        if candidate.path == "gemv":
            table = Table(0, rows, tile.block_n, tile.warps, rows + 1, (), tile.splits_per_sm)
            return launch.gemv(x, weight, None, table, self.card.num_sms)
        return launch.gemm(x, weight, None, tile, self.card.num_sms)

    def why_not(self, candidate: Candidate, rows: int) -> str:
        """Why a candidate cannot win: it does not compile, spills, or computes something else. "" if it can.

        Compiles it, which other processes on this machine then need not. UserError where it crashed the device.
        """
        weight, before = self.weights[0], _spills()
        try:
            y = self.call(candidate, rows, weight)
        except (
            Exception
        ) as error:  # compilers report in many ways; whatever it was, this candidate is out
            return f"does not run: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise UserError(
                f"{candidate.describe()} with {rows} rows crashed the device: {error}"
            ) from error
        new = [count for key, count in _spills().items() if key not in before]
        if any(new):
            return f"spills {max(new)} registers"
        expected = self.expected[:rows]
        wrong = float((y.float() - expected).abs().max() / expected.square().mean().sqrt())
        if not wrong <= TOLERANCE:
            return f"wrong by {wrong:.2g} of the result's root mean square"
        return "leaves locks set" if bool(weight.locks.any()) else ""

    def measure(self, trial: Trial) -> Measurement:
        """Time of a candidate that is known to be right."""

        def with_weight(weight: ShuffledWeight) -> Callable[[], Tensor]:
            return lambda: self.call(trial.candidate, trial.rows, weight)

        return Measurement(trial, microseconds([with_weight(weight) for weight in self.weights]))


def _spills() -> dict[tuple[str, Any], int]:
    """Spilled registers of every compiled product that this process has launched, by Triton's own key."""
    device = torch.cuda.current_device()
    return {
        (kernel.__name__, key): compiled.n_spills
        for kernel in (gemv, gemm)
        for key, compiled in kernel.device_caches[device][0].items()
    }


@lru_cache(maxsize=1)
def subject(kind: Kind, shape: Shape, index: int) -> Subject:
    """The one that was asked for last stays."""
    torch.cuda.set_device(index)
    return Subject(kind, shape, torch.device("cuda", index))


def reasons(kind: Kind, index: int, trials: list[Trial]) -> list[str]:
    """Compile and check trials of one shape: `Subject.why_not` of each. Runs in processes of its own."""
    checked = subject(kind, trials[0].shape, index)
    return [checked.why_not(trial.candidate, trial.rows) for trial in trials]
