"""Canonical weights in the C++ kernels' own layout (drawn in abi.h), and the sites of a decoder made of them.

A weight whose grid the kernels do not know (scales that span rows, groups that are no multiple of 8) is dequantized
once and multiplied in bfloat16: slower, never refused.
"""

import ctypes
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant.weight import QuantizedWeight
from . import library as lib
from .arena import Arena
from .library import NbInput, NbLinear, NbLinearGroup, Pool

LAYOUT = (
    3  # raised whenever the same weight is laid out otherwise: prepared weights are kept on disk
)
INT_GROUP, WIDE_GROUP = 128, 256  # the widest group of columns that the kernels take
_HEAD_ROWS = 4096  # of it at a time
_HEAD_GROUP = 32  # of an 8-bit output head: with 64, what rounding it costs is twice as much


_NAMES = {lib.U4: "int4", lib.T4: "fp4", lib.U8: "int8", lib.FP8: "fp8", lib.DENSE: "bf16"}
_INTEGERS = (lib.U4, lib.T4, lib.U8)  # what int8 activations are multiplied by
_TABLE_MOST = 127  # of a table's numbers, made positive


@dataclass(slots=True)
class Prepared:
    """One linear in the kernels' layout; the tensors own the memory."""

    format: int
    n: int
    k: int
    group: int
    data: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None
    offset: int = lib.MIDPOINT
    midpoint: int = 0
    multiplier: float = 1.0
    bias: Tensor | None = None  # float32 [n]
    perm: Tensor | None = None  # int32 [k]
    table: Tensor | None = None  # uint8 [16], of T4

    @property
    def k_padded(self) -> int:
        return -(-self.k // 8) * 8

    @property
    def groups(self) -> int:
        return -(-self.k_padded // self.group)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.offsets) if t is not None)

    def scaled(self, scale: float) -> "Prepared":
        """The same linear with its outputs multiplied by `scale`; weights are shared."""
        if scale == 1.0:
            return self
        bias = None if self.bias is None else self.bias * scale
        return replace(self, multiplier=self.multiplier * scale, bias=bias)

    def move(self, arena: Arena) -> "Prepared":
        """Into memory that is fast to read, and that no file lies behind."""
        self.data = arena.copy(self.data)
        for name in ("scales", "offsets", "bias", "perm", "table"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else arena.copy(tensor))
        return self

    def describe(self, int8: bool) -> str:
        return f"{_NAMES[self.format]} x {'int8' if int8 and self.format in _INTEGERS else 'bf16'}"


def prepare(weight: QuantizedWeight | Tensor, bias: Tensor | None = None) -> Prepared:
    """weight [n, k], canonical or dense, into the kernels' layout."""
    bias = None if bias is None else bias.detach().float().contiguous()
    if isinstance(weight, QuantizedWeight):
        group = _kernel_group(weight)
        if group is not None:
            prepared = _fp8(weight, group) if weight.kind == "fp8" else _integer(weight, group)
            prepared.bias = bias
            return prepared
        weight = weight.dequantize(torch.bfloat16)
    n, k = weight.shape
    tiles = _tiles(weight.to(torch.bfloat16).view(torch.int16), 2).permute(0, 2, 1, 3).contiguous()
    return Prepared(lib.DENSE, n, k, WIDE_GROUP, tiles, bias=bias)


def quantize_head(weight: Tensor) -> QuantizedWeight:
    """A dense [vocab, hidden] weight as symmetric 8-bit codes with a scale for every _HEAD_GROUP columns of a row."""
    parts = [_quantize_head_rows(rows) for rows in weight.split(_HEAD_ROWS)]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return QuantizedWeight(codes, scales, bits=8, block=(1, _HEAD_GROUP))


def _quantize_head_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows: all of a vocabulary in float32 would be most of what a start needs."""
    rows, columns = weight.shape
    groups = F.pad(weight.float(), (0, -columns % _HEAD_GROUP)).view(rows, -1, _HEAD_GROUP)
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (
        (groups / scales.float().clamp_min(1e-12)[..., None])
        .round_()
        .clamp_(-127, 127)
        .add_(128)
        .to(torch.uint8)
    )
    return codes.view(rows, -1)[:, :columns].contiguous(), scales


def _kernel_group(weight: QuantizedWeight) -> int | None:
    """Columns that share a scale in the kernel: the weight's own group, or an even part of it; None: neither works."""
    rows, group = weight.block
    widest = WIDE_GROUP if weight.kind == "fp8" else INT_GROUP
    if (rows != 1 and weight.kind != "fp8") or weight.bits > 8:
        return None
    if weight.table is not None and max(weight.table) - min(weight.table) > _TABLE_MOST:
        return None
    if group >= weight.in_features:
        return min(widest, -(-weight.in_features // 8) * 8)
    if group > widest:
        return widest if group % widest == 0 else None
    return group if group % 8 == 0 else None


def _tiles(codes: Tensor, columns: int) -> Tensor:
    """[n, k] padded with zeros to whole tiles and eights of columns -> [n/16, 16, k/columns, columns]."""
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % 8, 0, -n % 16)) if k % 8 or n % 16 else codes
    return padded.view(-1, 16, padded.shape[1] // columns, columns)


def _by_group(values: Tensor, weight: QuantizedWeight, group: int) -> Tensor:
    """Scales (zeros, minima) of a weight's blocks -> [n/16, groups, 16], one for every kernel group."""
    rows, columns = weight.block
    if rows != 1:
        values = values.repeat_interleave(rows, 0)[: weight.out_features]
    starts = torch.arange(0, weight.in_features, group)
    values = values[:, starts // columns]
    values = F.pad(values, (0, 0, 0, -len(values) % 16))
    return values.view(-1, 16, values.shape[1]).transpose(1, 2).contiguous()


def _integer(weight: QuantizedWeight, group: int) -> Prepared:
    if weight.bits <= 4:
        pairs = _tiles(weight.codes, 8).unflatten(3, (2, 4))
        format, tiles = (
            lib.U4,
            (pairs[:, :, :, 0] | (pairs[:, :, :, 1] << 4)).transpose(1, 2).contiguous(),
        )
    else:
        format, tiles = lib.U8, _tiles(weight.codes, 4).transpose(1, 2).contiguous()
    largest = max(
        float(t.float().abs().max()) for t in (weight.scales, weight.mins) if t is not None
    )
    exponent = 14 - math.ceil(math.log2(largest)) if largest > 0 else 0
    scales = _by_group(weight.scales.float() * 2.0**exponent, weight, group).half()
    prepared = Prepared(
        format,
        weight.out_features,
        weight.in_features,
        group,
        tiles,
        scales,
        midpoint=2 ** (weight.bits - 1),
        multiplier=2.0**-exponent,
        perm=_perm(weight),
    )
    if weight.mins is not None:
        prepared.offset, prepared.midpoint = lib.MINS, 0
        prepared.offsets = _by_group(weight.mins.float() * 2.0**exponent, weight, group).half()
    elif weight.zeros is not None:
        prepared.offset, prepared.offsets = lib.ZEROS, _by_group(weight.zeros, weight, group)
    elif weight.table is not None:
        prepared.format, prepared.midpoint = lib.T4, -min(weight.table)
        values = [value + prepared.midpoint for value in weight.table]
        prepared.table = torch.tensor(values, dtype=torch.uint8)
    return prepared


def _fp8(weight: QuantizedWeight, group: int) -> Prepared:
    tiles = _tiles(weight.codes.view(torch.uint8), 2).permute(0, 2, 3, 1).contiguous()
    scales = _by_group(weight.scales.float(), weight, group)
    return Prepared(
        lib.FP8,
        weight.out_features,
        weight.in_features,
        group,
        tiles,
        scales,
        multiplier=256.0,
        perm=_perm(weight),
    )


def _perm(weight: QuantizedWeight) -> Tensor | None:
    return None if weight.perm is None else weight.perm.to(torch.int32).contiguous()


@dataclass(slots=True)
class PreparedGroup:
    """The linears that read the same activations, and how these are prepared for each."""

    linears: list[Prepared]
    int8: bool  # activations of integer weights as int8 codes by group, else bfloat16
    inputs: list[Prepared] = field(init=False)  # the first linear that wants each kind of input
    arrays: tuple[ctypes.Array[NbInput], ctypes.Array[NbLinear]] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = []
        for linear in self.linears:
            if not any(self._same_input(linear, other) for other in self.inputs):
                self.inputs.append(linear)
        if len(self.inputs) > lib.MAX_INPUTS:
            raise ValueError(f"{len(self.inputs)} kinds of input in one group of linears")
        self.arrays = (
            (NbInput * len(self.inputs))(*map(self._input, self.inputs)),
            (NbLinear * len(self.linears))(*map(self._linear, self.linears)),
        )

    def struct(self) -> NbLinearGroup:
        """Points to this group's arrays, which must live as long."""
        inputs, linears = (ctypes.addressof(array) for array in self.arrays)
        return NbLinearGroup(len(self.inputs), len(self.linears), inputs, linears)

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(linear.nbytes for linear in self.linears)

    def _input(self, first: Prepared) -> NbInput:
        group, sums = self._input_groups(first)
        return NbInput(first.k, first.k_padded, group, sums, pointer(first.perm))

    def _linear(self, w: Prepared) -> NbLinear:
        return NbLinear(
            w.format,
            w.offset,
            w.n,
            w.group,
            w.groups,
            w.midpoint,
            next(j for j, first in enumerate(self.inputs) if self._same_input(w, first)),
            w.multiplier,
            pointer(w.data),
            pointer(w.scales),
            pointer(w.offsets),
            pointer(w.bias),
            pointer(w.table),
        )

    def _input_groups(self, linear: Prepared) -> tuple[int, int]:
        """(group of int8 codes, group of sums for bfloat16)."""
        if linear.format not in _INTEGERS:
            return 0, 0
        return (linear.group, 0) if self.int8 else (0, linear.group)

    def _same_input(self, a: Prepared, b: Prepared) -> bool:
        same_perm = (a.perm is None and b.perm is None) or (
            a.perm is not None and b.perm is not None and torch.equal(a.perm, b.perm)
        )
        return same_perm and self._input_groups(a) == self._input_groups(b)

    def __call__(self, pool: Pool, x: Tensor) -> Tensor:
        """x float32 [rows, k] -> float32 [rows, outputs of all linears]. For tests and other single products."""
        x = x.float().contiguous()
        y = torch.empty(len(x), sum(w.n for w in self.linears))
        pool.library.nb_linear(
            pool.handle, ctypes.byref(self.struct()), x.data_ptr(), len(x), y.data_ptr()
        )
        return y


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
