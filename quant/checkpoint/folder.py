"""A Hugging Face folder as a checkpoint: config.json and safetensors shards."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import CheckpointError
from .. import formats
from ..formats.base import BadTensor, check_finite, check_scales, is_quantized
from ..scheme import LayerScheme, QuantScheme
from ..weight import QuantizedWeight
from .base import Checkpoint
from .headers import TensorEntry, read_json, scan
from .stacked import unstacked


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json and safetensors shards."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError("is missing", file=path / "config.json", fix="download it")
        self.config = read_json(path / "config.json")
        self._entries = unstacked(scan(path), self.config)
        self._open: dict[Path, Any] = {}
        self.scheme = self._read_scheme()

    def release(self) -> None:
        self._open.clear()

    def names(self) -> set[str]:
        return set(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        try:
            tensor = check_finite(name, self._raw(name))
        except BadTensor as error:
            raise self._error(name, error.problem) from None
        return tensor if dtype is None else tensor.to(dtype)

    def _linear(self, module: str) -> QuantizedWeight | Tensor:
        if not self.is_quantized(module):
            return self.tensor(f"{module}.weight")
        scheme, layer = self.scheme, self._layer(module)
        found = self._suffixes(module)
        if scheme is None or layer is None:
            raise self._error(
                f"{module}.{next(iter(found))}",
                "is quantized, but config.json does not say how",
                "add the quantization_config the checkpoint was made with",
            )
        reader = formats.by_method(scheme.method)
        try:
            weight: QuantizedWeight | Tensor = reader.read(
                {s: self._raw(f"{module}.{s}") for s in found}, layer, scheme.format
            )
            if isinstance(weight, QuantizedWeight):
                check_scales(next((s for s in found if "scale" in s), found[0]), weight)
        except BadTensor as error:
            raise self._error(f"{module}.{error.suffix}", error.problem) from None
        return weight

    def is_quantized(self, module: str) -> bool:
        found = self._suffixes(module)
        if not found:
            raise self._missing(f"{module}.weight")
        return is_quantized({s: self._entries[f"{module}.{s}"].dtype for s in found})

    def modules(self) -> set[str]:
        return {m for name in self._entries if (m := name.rpartition(".")[0]) and self._suffixes(m)}

    def weight_names(self, module: str) -> list[str]:
        return [f"{module}.{suffix}" for suffix in self._suffixes(module)]

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self._entries.values())

    def _suffixes(self, module: str) -> list[str]:
        quantized = formats.by_method(self.scheme.method).SUFFIXES if self.scheme else ()
        known = dict.fromkeys(
            (*quantized, "weight")
        )  # modules that stay dense are in every checkpoint
        return [s for s in known if f"{module}.{s}" in self._entries]

    def _layer(self, module: str) -> LayerScheme | None:
        """How to read a module that is quantized on disk, also where the config forgets to name it."""
        return None if self.scheme is None else self.scheme.layer(module) or self.scheme.default

    def _raw(self, name: str) -> Tensor:
        entry = self._entry(name)
        file = entry.file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            if entry.part_of is not None:
                whole, indices = entry.part_of
                # safetensors cuts whole stretches only: what skips rows is cut here
                expert: Tensor = self._open[file].get_slice(whole)[indices[0]]
                part = expert[indices[1:]]
                part = part.t() if entry.transposed else part
                return part.reshape(entry.shape).contiguous()
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._error(name, f"cannot be read: {error}") from None
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise self._missing(name)
        return self._entries[name]

    def _missing(self, name: str) -> CheckpointError:
        example = min(self._entries, default="none")
        fix = f"config.json and the weights must be of one model; here are names like {example!r}"
        return self._error(name, "is missing", fix)

    def _error(
        self, name: str, problem: str, fix: str = "download it again, or convert it again"
    ) -> CheckpointError:
        file = self._entries[name].file if name in self._entries else self.path
        return CheckpointError(problem, file=file, tensor=name, fix=fix)

    def _read_scheme(self) -> QuantScheme | None:
        """From config.json, or from the side file that older AutoGPTQ and AutoAWQ and ModelOpt leave instead."""
        found = self.config.get("quantization_config") or self.config.get("compression_config")
        for side_file, method in (
            ("quantize_config.json", "gptq"),
            ("quant_config.json", "awq"),
            ("hf_quant_config.json", "modelopt"),
        ):
            if not found and (self.path / side_file).is_file():
                found = {"quant_method": method} | read_json(self.path / side_file)
        if not found:
            return None
        if not isinstance(found, dict):
            raise CheckpointError(
                "quantization_config is no JSON object", file=self.path / "config.json"
            )
        return QuantScheme.from_config(found)
