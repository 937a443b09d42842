"""Another format for the same model: every quantized weight is carried over code by code, or the whole is refused.

    read -> QuantizedWeight -> write, twice over the checkpoint: once to see that every weight fits, once to write

Invariant: without `requantize`, every quantized linear of OUT dequantizes to exactly what it did before. Embedding and
head are dense in every format written here; where they were quantized (GGUF), they are rounded to 16 bits, and told.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..version import __version__ as nibble_version
from . import canary, formats
from .algorithms import data_free
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.journal import Journal, fingerprint
from .checkpoint.output import check_disk, check_output, unpublish, writing
from .checkpoint.side_files import copy_side_files
from .checkpoint.writer import ShardWriter, block_of, config_in, write_json, write_sums
from .conversion.witness import witness
from .scheme import EMBEDDINGS, LayerScheme, Method, QuantScheme, Strategy, exactly
from .weight import QuantizedWeight

TARGETS: dict[str, tuple[Method, str]] = {
           "awq": ("awq", "gemm"), "gptq": ("gptq", "gptq"), "gptq_v2": ("gptq", "gptq_v2"),
           "compressed-tensors": ("compressed-tensors", ""), "fp8": ("fp8", "fp8")}  # fmt: skip
_KV_SCALES = (".k_scale", ".v_scale")
_DENSE_LEAVES = (*EMBEDDINGS, "lm_head")


@dataclass(frozen=True, slots=True)
class Grid:
    """What a weight that does not fit is requantized to."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False


@dataclass(slots=True)
class Reformatted:
    """What became of a checkpoint."""

    scheme: QuantScheme
    kept: int = 0  # quantized modules carried over exactly
    requantized: dict[str, str] = field(default_factory=dict)  # module -> why it could not be
    notes: tuple[str, ...] = ()
    nbytes: int = 0


def reformat(
    model: str | Path,
    output: str | Path,
    target: str,
    requantize: Grid | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Reformatted:
    """Write a quantized checkpoint in another format: "awq", "gptq", "gptq_v2", "compressed-tensors" or "fp8".

    requantize: the grid for weights that the format cannot hold as they are; None: refuse them. Raises UnsupportedError
    with the reasons, before anything is written.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"--to {target} is not supported ({', '.join(TARGETS)} are)")
    output, checkpoint = Path(output), open_checkpoint(model)
    if resume:
        unpublish(output)
    check_output(output, checkpoint, overwrite, resume)
    job = _Job.examine(checkpoint, target, requantize)
    needed = 2 * job.result.nbytes
    check_disk(output, needed)
    with writing(output, needed, resume) as partial:
        copy_side_files(checkpoint, partial)
        journal = Journal.open(
            ShardWriter(partial), fingerprint(checkpoint, target, requantize, nibble_version)
        )
        blocks = job.by_block()
        for index, names in list(enumerate(blocks))[len(journal.entries) :]:
            tensors = {k: v for name in names for k, v in job.tensors(name).items()}
            journal.record(*journal.writer.add(tensors), {}, None)
            checkpoint.release()
            if progress is not None:
                progress(index + 1, len(blocks))
        digests = journal.writer.finish()
        write_json(partial / "config.json", job.config())
        witnessed = witness(partial, torch.device("cpu"))
        write_json(partial / canary.FILE, canary.as_json(witnessed))
        write_sums(partial, digests)
    return job.result


@dataclass(slots=True)
class _Job:
    checkpoint: Checkpoint
    target: str
    grid: Grid | None
    result: Reformatted
    modules: set[str]

    @classmethod
    def examine(cls, checkpoint: Checkpoint, target: str, grid: Grid | None) -> "_Job":
        """See that every weight fits. Raises UnsupportedError with all the reasons."""
        method, fmt = TARGETS[target]
        modules = checkpoint.modules()
        quantized = sorted(m for m in modules if _stays_quantized(checkpoint, m))
        if not quantized:
            raise UnsupportedError(
                f"{checkpoint.path} is not quantized: use --awq, --gptq or --fp8"
            )
        job = cls(checkpoint, target, grid, Reformatted(QuantScheme(method, fmt, None)), modules)
        layers, symmetric, misfits = job._fit_all(quantized)
        if misfits and grid is None:
            raise _refusal(checkpoint, target, misfits, len(quantized))
        job.result.requantized = misfits
        job.result.kept = len(quantized) - len(misfits)
        job._settle(layers, symmetric)
        return job

    def _fit_all(self, quantized: list[str]) -> tuple[dict[str, LayerScheme], bool, dict[str, str]]:
        layers: dict[str, LayerScheme] = {}
        misfits: dict[str, str] = {}
        symmetric = True
        for module in quantized:
            weight = _plain(self.checkpoint.linear(module))
            symmetric &= weight.zeros is None
            try:
                self._write(weight)
            except ValueError as error:
                misfits[module] = str(error)
                continue
            layers[module] = self._layer(module, weight)
        if self.target == "awq" and layers:  # one group size a checkpoint
            group = Counter(layer.group_size for layer in layers.values()).most_common(1)[0][0]
            for module, layer in list(layers.items()):
                if layer.group_size != group:
                    misfits[module] = (
                        f"AWQ has one group size a checkpoint, this layer has {layer.group_size}"
                    )
                    del layers[module]
        return layers, symmetric, misfits

    def _settle(self, layers: dict[str, LayerScheme], symmetric: bool) -> None:
        """The scheme of the result, once it is known what is kept and what is requantized."""
        if self.result.requantized and self.grid is not None:
            self.grid = self._uniform_grid(self.grid, layers)
            symmetric = symmetric and self.grid.symmetric
            for module in list(self.result.requantized):
                if (weight := self._requantized(module)) is None:
                    continue
                layers[module] = self._layer(module, weight)
        symmetric = symmetric and self.target != "awq"  # AWQ writes its zero points out
        layers = {
            m: replace(layer, symmetric=symmetric or layer.kind == "fp8")
            for m, layer in layers.items()
        }
        if not layers:
            raise UnsupportedError(
                f"{self.checkpoint.path}: no layer could be quantized to {self.target}"
            )
        default = Counter(layers.values()).most_common(1)[0][0]
        overrides = tuple(
            (exactly(m), layer) for m, layer in sorted(layers.items()) if layer != default
        )
        dense = [m for m in sorted(self.modules) if m not in layers and self._is_linear(m)]
        method, fmt = TARGETS[self.target]
        if method == "compressed-tensors":
            fmt = "float-quantized" if default.kind == "fp8" else "pack-quantized"
        ignore = tuple(dict.fromkeys(("lm_head", *dense)))
        before = self.checkpoint.scheme
        kv_cache = (
            before.kv_cache if before is not None and method == "compressed-tensors" else None
        )
        self.result.scheme = QuantScheme(method, fmt, default, overrides, ignore, kv_cache=kv_cache)
        self.result.notes = self._notes()
        self.result.nbytes = self.checkpoint.nbytes + sum(
            2 * prod for m in self.modules if m not in layers and (prod := self._numel(m))
        )

    def _uniform_grid(self, grid: Grid, layers: dict[str, LayerScheme]) -> Grid:
        """AWQ has one group size, so what is requantized takes that of what is kept."""
        if self.target == "awq" and layers:
            return replace(grid, bits=4, group_size=next(iter(layers.values())).group_size)
        return grid

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that stand for a module (by its name) or a tensor that belongs to none."""
        if name not in self.modules:
            return {name: self.checkpoint.tensor(name, None)}
        if not _stays_quantized(self.checkpoint, name):
            return {f"{name}.weight": self.checkpoint.dense(name, self._dense_dtype(name))}
        weight = (
            self._requantized(name)
            if name in self.result.requantized
            else _plain(self.checkpoint.linear(name))
        )
        if weight is None:
            return {f"{name}.weight": self.checkpoint.dense(name, self.checkpoint.dense_dtype)}
        default = self.result.scheme.default
        asymmetric = default is not None and not default.symmetric
        if weight.kind == "int" and asymmetric and weight.zeros is None:
            midpoint = torch.full(weight.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)
            weight = replace(weight, zeros=midpoint)
        return {f"{name}.{suffix}": tensor for suffix, tensor in self._write(weight).items()}

    def by_block(self) -> list[list[str]]:
        """Modules and tensors that belong to none, grouped by decoder block, in the order they are written."""
        loose = self.checkpoint.loose_names()
        if not self.result.scheme.kv_cache:
            loose = {name for name in loose if not name.endswith(_KV_SCALES)}
        groups: dict[str, list[str]] = {}
        for name in sorted(self.modules | loose):
            groups.setdefault(block_of(name), []).append(name)
        return list(groups.values())

    def config(self) -> dict[str, Any]:
        config = config_in(self.checkpoint.dense_dtype, self.checkpoint)
        if "lm_head" in self.modules:
            config["tie_word_embeddings"] = False  # a head of its own was written
        return config | {"quantization_config": self.result.scheme.to_config()}

    def _dense_dtype(self, module: str) -> torch.dtype | None:
        """None: as stored."""
        return self.checkpoint.dense_dtype if self.checkpoint.is_quantized(module) else None

    def _write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        method, fmt = TARGETS[self.target]
        if method == "compressed-tensors":
            fmt = "float-quantized" if weight.kind == "fp8" else "pack-quantized"
        tensors: dict[str, Tensor] = formats.by_method(method).write(weight, fmt)
        return tensors

    def _requantized(self, module: str) -> QuantizedWeight | None:
        """On the grid, or None where the grid does not fit and the layer becomes dense."""
        if (grid := self.grid) is None:
            raise RuntimeError(f"{module} does not fit, and there is no grid to requantize it to")
        weight = data_free.quantize(
            self.checkpoint.dense(module),
            grid.bits,
            grid.group_size,
            grid.symmetric,
            1 if self.target == "gptq" else 0,
        )
        try:
            return weight if weight is not None and self._write(weight) else None
        except ValueError:
            return None

    def _layer(self, module: str, weight: QuantizedWeight) -> LayerScheme:
        if weight.kind == "fp8":
            block = None if weight.block[0] == 1 or weight.scales.numel() == 1 else weight.block
            unblocked: Strategy = "channel" if weight.block[0] == 1 else "tensor"
            strategy: Strategy = "block" if block else unblocked
            return LayerScheme(
                "fp8",
                8,
                block[1] if block else -1,
                True,
                strategy=strategy,
                act_quant=weight.act_quant,
                block=block,
            )
        named = self.checkpoint.scheme.layer(module) if self.checkpoint.scheme else None
        whole = (
            weight.group_size == weight.in_features and named is not None and named.group_size == -1
        )
        return LayerScheme(
            "int", weight.bits, -1 if whole else weight.group_size, weight.zeros is None
        )

    def _is_linear(self, module: str) -> bool:
        return not module.endswith(EMBEDDINGS) and self._numel(module) > 0

    def _numel(self, module: str) -> int:
        """Of a matrix; 0 for a vector."""
        shape = self.checkpoint.shape(self.checkpoint.weight_names(module)[0])
        return shape[0] * shape[1] if len(shape) == 2 else 0

    def _notes(self) -> tuple[str, ...]:
        rounded = [
            m
            for m in sorted(self.modules)
            if m.endswith(_DENSE_LEAVES) and self.checkpoint.is_quantized(m)
        ]
        notes = (
            [f"{' and '.join(rounded)}: dense in this format, rounded to 16 bits"]
            if rounded
            else []
        )
        if (
            any(name.endswith(_KV_SCALES) for name in self.checkpoint.names())
            and not self.result.scheme.kv_cache
        ):
            notes.append(
                "the scales of the KV cache are left out: this format has no place for them"
            )
        if self.target == "compressed-tensors" and self.checkpoint.dense_dtype == torch.bfloat16:
            notes.append(
                "scales keep their precision; a runtime that casts them to the model's bfloat16 rounds them"
            )
        return tuple(notes)


def _stays_quantized(checkpoint: Checkpoint, module: str) -> bool:
    return not module.endswith(_DENSE_LEAVES) and checkpoint.is_quantized(module)


def _plain(weight: QuantizedWeight | Tensor) -> QuantizedWeight:
    """The same values with nothing written out that goes without saying: zero points at the midpoint."""
    if isinstance(weight, Tensor):
        raise TypeError("a dense weight where a quantized one was expected")
    if (
        weight.kind == "int"
        and weight.zeros is not None
        and (weight.zeros == 2 ** (weight.bits - 1)).all()
    ):
        return replace(weight, zeros=None)
    return weight


def _refusal(
    checkpoint: Checkpoint, target: str, misfits: dict[str, str], total: int
) -> UnsupportedError:
    reasons = Counter(misfits.values())
    (reason, count), *others = reasons.most_common()
    first = next(m for m, why in misfits.items() if why == reason)
    more = f"; and {len(others)} other reasons" if others else ""
    return UnsupportedError(
        f"{checkpoint.path}: {len(misfits)} of {total} layers have no exact form in {target}: "
        f"{count} because {reason} ({first}){more} (--requantize to round them anew, which costs "
        "accuracy, or convert the original)"
    )
