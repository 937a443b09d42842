"""Quantize a 16-bit checkpoint while it is read: the weights of its blocks come out quantized, one at a time.

    with quantized_at_load(checkpoint, "int4", save=DIR) as checkpoint:   the same interface, quantized weights
        ... read every block once ...

Invariant: no more than one weight is ever held dense, whatever the model's size, and nothing is calibrated. With
`save`, each block is written as soon as the next one is asked for, and DIR appears whole at the end, as
compressed-tensors, which can name a group size per layer and zero points alike.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.multimodal import other_parts
from ..errors import UnsupportedError
from .algorithms import data_free
from .checkpoint import Checkpoint
from .checkpoint.output import check_disk, check_output, writing
from .checkpoint.side_files import copy_side_files
from .checkpoint.writer import ShardWriter, block_of, write_json, write_sums
from .formats import compressed_tensors
from .scheme import LayerScheme, QuantScheme, exactly, modules_of
from .weight import QuantizedWeight

LAYERS = {
    "int4": LayerScheme("int", 4, 32, False),
    "int8": LayerScheme("int", 8, 128, True),
    "fp8": LayerScheme("fp8", 8, -1, True, strategy="channel", act_quant="token"),
}
_OVERHEAD = 1.16  # scales and zero points, at most


@contextmanager
def quantized_at_load(
    checkpoint: Checkpoint,
    quantize: str | None,
    save: str | None = None,
    dense: Sequence[str] = (),
) -> Iterator[Checkpoint]:
    """The checkpoint, its block weights quantized as they are read; itself where `quantize` is None.

    quantize: a key of LAYERS. save: a folder to make of what was read. dense: modules that are left alone. Raises
    UnsupportedError for a checkpoint that is quantized already, CheckpointError where the folder cannot be used.
    """
    if quantize is None:
        if save is not None:
            raise UnsupportedError("--save-quantized needs --quantize int4, int8 or fp8")
        yield checkpoint
        return
    if quantize not in LAYERS:
        raise UnsupportedError(f"--quantize {quantize} is not supported ({', '.join(LAYERS)} are)")
    if checkpoint.scheme is not None:
        raise UnsupportedError(
            f"{checkpoint.path} is quantized already ({checkpoint.scheme.describe()}): serve it "
            "without --quantize"
        )
    reading = QuantizedAtLoad(checkpoint, LAYERS[quantize], dense)
    if save is None:
        yield reading
        return
    output = Path(save).expanduser()
    check_output(output, checkpoint, False, False)
    check_disk(output, 2 * reading.nbytes)
    with writing(output, 2 * reading.nbytes, False) as partial:
        reading.writer = writer = ShardWriter(partial)
        yield reading
        reading.finish(writer)


class QuantizedAtLoad(Checkpoint):
    """A dense checkpoint whose linears in the blocks are quantized when they are read."""

    def __init__(self, checkpoint: Checkpoint, layer: LayerScheme, dense: Sequence[str] = ()):
        """dense: modules that stay so."""
        self.inner, self.layer = checkpoint, layer
        self._stay_dense = dict.fromkeys(dense)
        self.path, self.config = checkpoint.path, checkpoint.config
        parts = other_parts(self.config, checkpoint.names())
        self._other_parts = tuple(f"{part}." for part in parts)
        self.writer: ShardWriter | None = None
        self._pending: dict[str, Tensor] = {}  # of the block being read, in the format's tensors
        self._written: set[str] = (
            set()
        )  # tensors of the checkpoint that the writer has, in some form
        self._layers: dict[str, LayerScheme] = {}  # of what was read
        self._dense: list[str] = []

    @property
    def scheme(self) -> QuantScheme:  # type: ignore[override]
        fmt = "float-quantized" if self.layer.kind == "fp8" else "pack-quantized"
        layers = Counter(self._layers.values())
        default = layers.most_common(1)[0][0] if layers else self.layer
        others = tuple(
            (exactly(m), layer) for m, layer in sorted(self._layers.items()) if layer != default
        )
        parts = other_parts(self.config, self.inner.names())
        ignore = ("lm_head", *self._stay_dense, *self._dense, *modules_of(parts, by_name=False))
        return QuantScheme("compressed-tensors", fmt, default, others, ignore)

    def _linear(self, module: str) -> QuantizedWeight | Tensor:
        weight = self.inner.linear(module)
        if not self.is_quantized(module) or isinstance(weight, QuantizedWeight):
            return weight
        if (
            self.writer is not None
            and self._pending
            and block_of(next(iter(self._pending))) != block_of(module)
        ):
            self._flush(self.writer)
        quantized = self._quantize(weight)
        self.inner.release()
        if quantized is None:
            self._dense.append(module)
            return weight
        self._layers[module] = (
            self.layer
            if self.layer.kind == "fp8"
            else LayerScheme("int", self.layer.bits, quantized.group_size, self.layer.symmetric)
        )
        if self.writer is not None:
            fmt = "float-quantized" if self.layer.kind == "fp8" else "pack-quantized"
            for suffix, tensor in compressed_tensors.write(quantized, fmt).items():
                self._pending[f"{module}.{suffix}"] = tensor
        return quantized

    def _quantize(self, weight: Tensor) -> QuantizedWeight | None:
        if self.layer.kind == "fp8":
            return data_free.quantize_fp8(weight)
        return data_free.quantize(
            weight, self.layer.bits, self.layer.group_size, self.layer.symmetric
        )

    def _flush(self, writer: ShardWriter) -> None:
        """Write the block that was read: its quantized weights and whatever else it has."""
        block = block_of(next(iter(self._pending)))
        names = {name for name in self.inner.names() if block_of(name) == block}
        for name in names:
            if name.removesuffix(".weight") not in self._layers:
                self._pending[name] = self.inner.tensor(name)
        writer.add(self._pending)
        self._written |= names
        self._pending = {}

    def finish(self, writer: ShardWriter) -> None:
        """Write what is left: the last block, blocks that stayed dense, what lies outside the blocks, and config.json.

        Raises UnsupportedError where no layer could be quantized.
        """
        if not self._layers:
            raise UnsupportedError(
                f"{self.path}: no layer could be quantized to {self.layer.describe()}: "
                "serve it without --quantize"
            )
        if self._pending:
            self._flush(writer)
        for name in sorted(self.inner.names() - self._written):
            writer.add({name: self.inner.tensor(name)})
        digests = writer.finish()
        copy_side_files(self.inner, writer.out_dir)
        config: dict[str, Any] = self.config | {"quantization_config": self.scheme.to_config()}
        write_json(writer.out_dir / "config.json", config)
        write_sums(writer.out_dir, digests)

    def is_quantized(self, module: str) -> bool:
        return self._is_block_matrix(f"{module}.weight") or self.inner.is_quantized(module)

    def _is_block_matrix(self, name: str) -> bool:
        return (
            re.search(r"^(.+\.)?layers?\.\d+\.", name) is not None
            and not name.removeprefix("model.").startswith(self._other_parts)
            and name.removesuffix(".weight") not in self._stay_dense
            and self.inner.has(name)
            and len(self.inner.shape(name)) == 2
        )

    @property
    def nbytes(self) -> int:
        saved = 0
        for name in self.inner.names():
            if self._is_block_matrix(name):
                numel = prod(self.inner.shape(name))
                saved += numel * self.inner.dtype(name).itemsize - int(
                    numel * self.layer.bits / 8 * _OVERHEAD
                )
        return self.inner.nbytes - saved

    def names(self) -> set[str]:
        return self.inner.names()

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.inner.tensor(name, dtype)

    def modules(self) -> set[str]:
        return self.inner.modules()

    def weight_names(self, module: str) -> list[str]:
        return self.inner.weight_names(module)

    def release(self) -> None:
        self.inner.release()
