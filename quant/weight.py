"""QuantizedWeight: the one in-memory form of a quantized weight matrix.

Every on-disk format is a pair of functions to and from it, every kernel's `prepare` starts from it. Invariant: for
row o and canonical column j, with (r, c) = (o // block_rows, j // block_cols),

    kind "int":  w[o, perm[j]] = (codes[o, j] - zeros[r, c]) * scales[r, c]     zeros given   (AWQ, GPTQ asym)
                               = (codes[o, j] - 2**(bits-1)) * scales[r, c]     neither given (symmetric)
                               = codes[o, j] * scales[r, c] + mins[r, c]        mins given    (GGUF Q4_1, Q4_K)
    kind "fp8":  w[o, perm[j]] = float(codes[o, j]) * scales[r, c]
    kind "table": w[o, perm[j]] = table[codes[o, j]] * scales[r, c]             16 whole numbers  (MXFP4, NVFP4)

      in_features ->
    +-------+-------+---+      codes   uint8 [out, in], one code a byte (or float8_e4m3fn for kind "fp8")
    | block | block |...|      scales  float [ceil(out/block_rows), ceil(in/block_cols)]
    +-------+-------+---+      zeros   uint8, mins float32: the shape of scales
    out_features downwards     perm    int64 [in] or None: canonical column j holds input feature perm[j]

Groups are contiguous in canonical columns; GPTQ's act-order is only the permutation. The codes are unpacked (a byte
each) because this form lives for one layer at a time; a kernel packs its own.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int", "fp8", "table"]
_PER_BLOCK = ("scales", "zeros", "mins")
_ALL = slice(None)


@dataclass(slots=True)
class QuantizedWeight:
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    mins: Tensor | None = None
    perm: Tensor | None = None
    kind: Kind = "int"
    bits: int = 4
    table: tuple[int, ...] | None = None  # of kind "table"
    block: tuple[int, int] = (1, 128)  # (rows, columns) that share one scale
    input_scale: Tensor | None = None  # float32 [1]: static activation scale (FP8)
    act_quant: Literal["none", "token", "group", "tensor"] = (
        "none"  # how the format wants activations quantized
    )

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        rows, cols = self.block
        want = (-(-out_features // rows), -(-in_features // cols))
        for name in _PER_BLOCK:
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != want:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, want {want} for codes "
                    f"{tuple(self.codes.shape)} in blocks of {self.block}"
                )
        if (self.kind == "table") != (self.table is not None):
            raise ValueError('a weight has a table if it is of kind "table"')
        if self.zeros is not None and self.mins is not None:
            raise ValueError("a weight has zeros or mins, not both")
        if self.perm is not None and tuple(self.perm.shape) != (in_features,):
            raise ValueError(f"perm has shape {tuple(self.perm.shape)}, want ({in_features},)")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return self.block[1]

    @property
    def nbytes(self) -> int:
        """Bytes the weight needs with its codes packed densely: what a size report should say."""
        extra = sum(
            t.numel() * t.element_size()
            for t in (self.scales, self.mins, self.perm)
            if t is not None
        )
        zeros = self.zeros.numel() * self.bits // 8 if self.zeros is not None else 0
        return self.codes.numel() * self.bits // 8 + extra + zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in] in the checkpoint's own column order; computed in float32, then cast."""
        rows, cols = self.block
        out_features, in_features = self.codes.shape

        def spread(t: Tensor) -> Tensor:
            t = t.float()
            if cols != 1:
                t = t.repeat_interleave(cols, 1)[:, :in_features]
            if rows != 1:
                t = t.repeat_interleave(rows, 0)[:out_features]
            return t

        scale = spread(self.scales)
        if self.kind == "fp8":
            dense = self.codes.float() * scale
        elif self.table is not None:
            values = torch.tensor(self.table, dtype=torch.float32, device=self.codes.device)
            dense = values[self.codes.int()] * scale
        elif self.mins is not None:
            dense = self.codes.float() * scale + spread(self.mins)
        elif self.zeros is not None:
            dense = (self.codes.float() - spread(self.zeros)) * scale
        else:
            dense = (self.codes.float() - 2 ** (self.bits - 1)) * scale
        if self.perm is not None:
            original = torch.empty_like(dense)
            original[:, self.perm] = dense
            dense = original
        return dense.to(dtype)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        move = {
            n: t.to(device)
            for n in ("codes", "scales", "zeros", "mins", "perm", "input_scale")
            if (t := getattr(self, n)) is not None
        }
        return replace(self, **move)


def _alike(w: QuantizedWeight) -> tuple[object, ...]:
    """What weights that are stacked have in common."""
    grid = (w.kind, w.bits, w.block[1], w.table, w.mins is None, w.scales.dtype)
    return *grid, w.in_features, w.act_quant


def can_fuse(weights: list[QuantizedWeight]) -> bool:
    """Whether `fuse` can stack these along the output axis without changing a value."""
    first = weights[0]

    def same(name: str) -> bool:
        tensors = [getattr(w, name) for w in weights]
        if any(t is None for t in tensors):
            return all(t is None for t in tensors)
        return all(torch.equal(t, tensors[0]) for t in tensors)

    uniform = all(_alike(w) == _alike(first) for w in weights)
    whole_rows = all(
        w.block[0] == first.block[0] and w.out_features % w.block[0] == 0 for w in weights
    )
    return uniform and whole_rows and same("perm") and same("input_scale")


def fuse(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights along the output axis (q, k, v -> qkv). The caller has asked `can_fuse`."""

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(w, name) for w in weights]
        return None if tensors[0] is None else torch.cat(tensors)

    if any(w.zeros is None for w in weights) and any(w.zeros is not None for w in weights):
        midpoint = 2 ** (
            weights[0].bits - 1
        )  # symmetric and asymmetric shards: write the midpoint out
        weights = [
            w
            if w.zeros is not None
            else replace(w, zeros=torch.full_like(w.scales, midpoint, dtype=torch.uint8))
            for w in weights
        ]
    return replace(
        weights[0],
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=cat("zeros"),
        mins=cat("mins"),
    )


def scaled_by_row(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight; where one scale holds for all of it, with that scale for each row, so that it can be fused."""
    if weight.kind != "fp8" or weight.block != (weight.out_features, weight.in_features):
        return weight
    return replace(
        weight,
        block=(1, weight.in_features),
        scales=weight.scales.expand(weight.out_features, 1).clone(),
    )


def in_column_order(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """Its columns in another order, int64 [in]: column j is what was column order[j]. ValueError where columns that
    share a scale would be parted."""
    size = weight.group_size
    groups = order.view(-1, size) // size
    if weight.perm is not None or (groups != groups[:, :1]).any():
        raise ValueError(f"groups of {size} columns cannot be put in another order")
    moved = {n: t[:, groups[:, 0]] for n in _PER_BLOCK if (t := getattr(weight, n)) is not None}
    return replace(weight, codes=weight.codes[:, order], **moved)


def part(
    weight: QuantizedWeight | Tensor, rows: slice = _ALL, cols: slice = _ALL
) -> QuantizedWeight | Tensor:
    """Rows and columns [start, stop) of a weight [out, in]: a device's share, or one linear of several packed as one.

    ValueError where a scale would be cut, or columns are asked for of a weight whose groups are not in their order.
    """
    if isinstance(weight, Tensor):
        return weight[rows, cols]
    shape, block = (weight.out_features, weight.in_features), weight.block
    spans = [range(length)[wanted] for length, wanted in zip(shape, (rows, cols), strict=True)]
    if weight.perm is not None and len(spans[1]) < shape[1]:
        raise ValueError("columns of a weight in act-order cannot be taken apart")
    for axis, span, size, length in zip(("rows", "columns"), spans, block, shape, strict=True):
        if span.start % size or (span.stop % size and span.stop != length):
            raise ValueError(
                f"{axis} {span.start} to {span.stop} cut a scale that {size} {axis} share"
            )
    blocks = tuple(
        slice(span.start // size, -(-span.stop // size))
        for span, size in zip(spans, block, strict=True)
    )
    cut = {n: t[blocks] for n in _PER_BLOCK if (t := getattr(weight, n)) is not None}
    inside = tuple(slice(span.start, span.stop) for span in spans)
    return replace(weight, codes=weight.codes[inside], **cut)


def split(weight: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    """Cut a weight with a scale per row along the output axis into parts of `rows` rows: the inverse of `fuse`."""
    if weight.block[0] != 1:
        raise ValueError(f"cannot split a weight whose scales span {weight.block[0]} rows")
    cut = {
        n: getattr(weight, n).split(rows)
        for n in ("codes", "scales", "zeros", "mins")
        if getattr(weight, n) is not None
    }
    return [replace(weight, **{n: parts[i] for n, parts in cut.items()}) for i in range(len(rows))]
