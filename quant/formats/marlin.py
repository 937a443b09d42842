"""Marlin's layout on disk: 4 bits, symmetric, in the order in which its CUDA kernel's threads read. Only ever read.

    AutoAWQ ("version": "marlin")             qweight int32 [in/16, out*2]    scales fp16 [in/g, out]
    AutoGPTQ ("checkpoint_format": "marlin")  B       int32 [in/16, out*2]    s      fp16 [in/g, out]

w = (q - 8) * s. The codes [in, out] are cut into tiles of 16 x 16; the tiles of 16 rows lie side by side, and each run
of 1024 codes (four tiles) is permuted so that one thread's share of a tensor core's operand is one run of 32 bits.
Scales are permuted by 64 columns where there are groups, by 32 where one row of them covers all of `in`.
Source: IST-DASLab/marlin `Layer.pack`, AutoAWQ `awq/modules/linear/marlin.py`, AutoGPTQ `qlinear_marlin.py`.
"""

import torch
from torch import Tensor

from ..packing import AWQ_ORDER, unpack
from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from .base import FLOATS, BadTensor, check_shape, columns_per_group, need

_TILE = 16


def read(tensors: dict[str, Tensor], layer: LayerScheme, names: tuple[str, str]) -> QuantizedWeight:
    """Tensors by suffix -> QuantizedWeight [out, in]; names: the suffixes of codes and scales. Raises BadTensor."""
    words, scales = need(tensors, names[0], torch.int32), need(tensors, names[1], *FLOATS)
    in_features, out_features = words.shape[0] * _TILE, words.shape[1] // 2
    if out_features % 64 or words.shape[1] % 2:
        raise BadTensor(names[0], f"has shape {list(words.shape)}, want a multiple of 128 columns")
    check_shape(names[1], scales, scales.shape[0], out_features)
    group = columns_per_group(names[1], in_features, scales.shape[0], layer.group_size)
    stored = unpack(words, 4).reshape(-1, 1024)
    codes = torch.empty_like(stored)
    codes[:, _order()] = stored
    tiles = codes.reshape(in_features // _TILE, out_features // _TILE, _TILE, _TILE)
    codes = tiles.transpose(1, 2).reshape(in_features, out_features)
    return QuantizedWeight(
        codes=codes.T.contiguous(), scales=_scales(scales).T.contiguous(), bits=4, block=(1, group)
    )


def _order() -> Tensor:
    """Where in a run of 1024 codes (four tiles of 16 x 16, row by row) each stored one belongs."""
    thread, tile, half, part = torch.meshgrid(
        torch.arange(32), torch.arange(4), torch.arange(2), torch.arange(4), indexing="ij"
    )
    row = 2 * (thread % 4) + part % 2 + 8 * (part // 2)
    order = (256 * tile + 16 * row + thread // 4 + 8 * half).reshape(-1, 8)
    return order[:, list(AWQ_ORDER)].flatten()


def _scales(stored: Tensor) -> Tensor:
    """Scales [groups, out] in the order of the output channels."""
    if stored.shape[0] > 1:
        order = torch.arange(64).reshape(8, 8).T.flatten()
    else:
        first = 2 * torch.arange(4).unsqueeze(1)
        order = (first + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])).flatten()
    runs = stored.reshape(-1, len(order))
    scales = torch.empty_like(runs)
    scales[:, order] = runs
    return scales.reshape(stored.shape)
