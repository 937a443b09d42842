"""ExpertWeight: one matrix of every expert as the grouped products read it, made once at load, an expert at a time.

    words  int32 [num_experts, tiles, padded_out, 16]    of each as kernels/dequant_gemm/layout.py draws them
    scales [num_experts, ...]                            of each as its decode.scale reads them
    dense experts have no scales; `words` are their rows, 16-bit floats [num_experts, out, in]

gate and up are one matrix whose rows take turns, gate 0, up 0, gate 1, up 1, ...: the same tile computes both of a
feature, and multiplies them before anything is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...quant.formats.fp4 import E2M1
from ...quant.weight import QuantizedWeight, fuse
from ..dequant_gemm.layout import PLANE, Decode, ShuffledWeight, kernel_group
from ..errors import KernelArgumentError
from ..fp4 import linear as fp4
from ..fp8 import w8a16
from ..gguf import linear as gguf
from ..gptq import linear as gptq
from ..spec import fits, scale_dtype

Weight = QuantizedWeight | Tensor
Matrices = Sequence[Weight]  # of one expert: gate and up, or one alone
DENSE_BITS = 16
_WIDTHS = (2, 3, 4, 8)  # bits of codes that the layout has
_DENSE_STEP = 64  # features an iteration of a dense product takes


@dataclass(slots=True)
class ExpertWeight:
    words: Tensor
    scales: Tensor | None
    decode: Decode | None  # None: dense
    perm: Tensor | None  # int32 [num_experts, in]: column j of the product is feature perm[j]
    bias: Tensor | None  # [num_experts, out], like the activations
    bits: int  # DENSE_BITS: dense
    group: int  # features that share a scale; 0: all
    in_features: int
    out_features: int  # of gate and up together

    @property
    def num_experts(self) -> int:
        return self.words.shape[0]

    @property
    def step(self) -> int:
        """Features an iteration takes."""
        return _DENSE_STEP if self.decode is None else PLANE * (16 // self.bits)


def why_not_stacked(experts: Sequence[Matrices]) -> str | None:
    """None if these experts' weights can be one ExpertWeight, else the reason."""
    every = [weight for matrices in experts for weight in matrices]
    quantized = [weight for weight in every if isinstance(weight, QuantizedWeight)]
    if not quantized:
        return None
    if len(quantized) < len(every):
        return "needs experts that are all quantized, or none"
    first = quantized[0]
    if any(_form(weight) != _form(first) for weight in quantized):
        return "needs experts that are quantized in one way"
    if not all(_in_one_order(matrices) for matrices in experts):
        return "needs gate and up with their columns in one order"
    if first.table not in (None, E2M1):
        return f"decodes E2M1, not the table {first.table}"
    if kernel_group(first.group_size, first.in_features, _width(first.bits)) is None:
        return f"needs groups in multiples of 16 columns, not {first.group_size}"
    return None


def stack(
    experts: Sequence[Matrices],
    biases: Sequence[Sequence[Tensor | None]],
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertWeight:
    """Matrices [out, in] and biases [out] of every expert, for activations of `dtype` on `device`.

    Raises KernelArgumentError where `why_not_stacked` has a reason.
    """
    if (reason := why_not_stacked(experts)) is not None:
        raise KernelArgumentError(f"stack: {reason}")
    bias = _stacked_biases(experts, biases, dtype, device)
    quantized = [w for each in experts for w in each if isinstance(w, QuantizedWeight)]
    if not quantized:
        dense = [[matrix for matrix in each if isinstance(matrix, Tensor)] for each in experts]
        rows = _stacked_rows(dense, dtype, device)
        return ExpertWeight(
            rows, None, None, None, bias, DENSE_BITS, 0, rows.shape[2], rows.shape[1]
        )
    repack, count = _repacking(quantized), len(experts)
    for number, matrices in enumerate(experts):
        packed = repack(_in_turns(matrices, device))
        if number == 0:
            words = packed.words.new_empty(count, *packed.words.shape)
            scales = packed.scales.new_empty(count, *packed.scales.shape)
            perm = None if packed.perm is None else words.new_empty(count, packed.in_features)
        words[number], scales[number] = packed.words, packed.scales
        if perm is not None and packed.perm is not None:
            perm[number] = packed.perm
    return ExpertWeight(
        words,
        scales,
        packed.decode,
        perm,
        bias,
        packed.bits,
        packed.group,
        packed.in_features,
        packed.out_features,
    )


def _form(weight: QuantizedWeight) -> tuple[object, ...]:
    """What experts of one stack have in common."""
    parts = (weight.mins is None, weight.perm is None)
    return weight.kind, weight.bits, weight.group_size, weight.table, *parts


def _in_one_order(matrices: Matrices) -> bool:
    orders = [w.perm for w in matrices if isinstance(w, QuantizedWeight) and w.perm is not None]
    return all(torch.equal(order, orders[0]) for order in orders)


def _width(bits: int) -> int:
    """Bits that codes of so many take in the layout."""
    return next(width for width in _WIDTHS if width >= bits)


def _repacking(weights: list[QuantizedWeight]) -> Callable[[QuantizedWeight], ShuffledWeight]:
    """What lays out each of them, all with scales of one dtype."""
    first, scales = weights[0], torch.cat([weight.scales.float().flatten() for weight in weights])
    if first.kind == "fp8":
        return w8a16.repack
    if first.kind == "table":
        narrow = fits(scales, torch.bfloat16)
        return partial(fp4.repack, dtype=torch.bfloat16 if narrow else torch.float32)
    dtype = scale_dtype(scales)
    if first.mins is not None or dtype == torch.float32:
        return gguf.repack
    return partial(gptq.repack, dtype=dtype)


def _in_turns(matrices: Matrices, device: torch.device) -> QuantizedWeight:
    """The rows of an expert's matrices as one, on the device: the first of each, the second of each, ..."""
    parts = [
        _plain(weight.to(device)) for weight in matrices if isinstance(weight, QuantizedWeight)
    ]
    if len(parts) == 1:
        return parts[0]
    whole = fuse(parts)
    order = torch.arange(whole.out_features, device=device).view(len(parts), -1).t().flatten()

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order]

    # as bytes: not every device indexes FP8
    codes = whole.codes.view(torch.uint8)[order].view(whole.codes.dtype)
    zeros, mins = rows(whole.zeros), rows(whole.mins)
    return replace(whole, codes=codes, scales=whole.scales[order], zeros=zeros, mins=mins)


def _plain(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with a scale for every row, and codes of as many bits as the layout has."""
    rows, columns = weight.block
    if rows > 1:
        spread = {
            name: tensor.repeat_interleave(rows, 0)[: weight.out_features]
            for name in ("scales", "zeros", "mins")
            if (tensor := getattr(weight, name)) is not None
        }
        weight = replace(weight, block=(1, columns), **spread)
    if (width := _width(weight.bits)) == weight.bits:
        return weight
    zeros = weight.zeros
    if zeros is None and weight.mins is None:
        zeros = torch.full_like(weight.scales, 2 ** (weight.bits - 1), dtype=torch.uint8)
    return replace(weight, bits=width, zeros=zeros)


def _stacked_rows(
    experts: Sequence[Sequence[Tensor]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Dense matrices as [num_experts, out, in], the rows of an expert's in turns."""
    turns = len(experts[0])
    out_features, in_features = experts[0][0].shape
    rows = torch.empty(len(experts), turns * out_features, in_features, dtype=dtype, device=device)
    for number, matrices in enumerate(experts):
        for turn, matrix in enumerate(matrices):
            rows[number, turn::turns] = matrix.to(device)
    return rows


def _stacked_biases(
    experts: Sequence[Matrices],
    biases: Sequence[Sequence[Tensor | None]],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """[num_experts, out], in turns as the rows are; zeros where some have none. None: none has one."""
    found = [(n, turn, bias) for n, each in enumerate(biases) for turn, bias in enumerate(each)]
    given = [(number, turn, bias) for number, turn, bias in found if bias is not None]
    if not given:
        return None
    turns, size = len(experts[0]), len(given[0][2])
    stacked = torch.zeros(len(experts), turns * size, dtype=dtype, device=device)
    for number, turn, bias in given:
        stacked[number, turn::turns] = bias.to(device)
    return stacked
