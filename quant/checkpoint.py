"""Checkpoint: one model on disk, whatever its format, in Hugging Face names and row order.

`open_checkpoint` checks every header (seconds at most, whatever the size); tensors are read lazily, one at a time, and
their values are checked as they are read. What is on disk decides whether a module is quantized; the scheme says how
to read it.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import formats
from .errors import CheckpointError
from .formats import bitsandbytes, gguf, gguf_model
from .formats.base import BadTensor, check_finite
from .formats.gguf_file import SPLIT_NAME, GgufFile, is_split
from .safetensors_files import read_json, scan
from .scheme import LayerScheme, QuantScheme
from .weight import QuantizedWeight

logger = logging.getLogger(__name__)
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "LICENSE*"]
_HUB_OTHERS = ["*/*", "consolidated*"]  # the same weights once more, in other layouts
_CHUNK = 1 << 24  # weights dequantized at a time


class Checkpoint(ABC):
    """A model's tensors by HF name. `config` is config.json's content; `scheme` is None for a 16/32-bit model."""

    path: Path
    config: dict[str, Any]
    scheme: QuantScheme | None

    @abstractmethod
    def names(self) -> set[str]:
        """All tensor names."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `tensor` returns by default."""

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, cast to dtype if given. Of a GGUF file, block-quantized tensors come dequantized in float32.

        Raises CheckpointError if it is missing or a float tensor holds NaN or infinity.
        """

    @abstractmethod
    def linear(self, module: str) -> QuantizedWeight | Tensor:
        """The weight of a linear (or embedding) module: quantized as on disk, else dense [out, in] as stored."""

    @abstractmethod
    def is_quantized(self, module: str) -> bool:
        """Whether `linear` returns a QuantizedWeight."""

    @abstractmethod
    def modules(self) -> set[str]:
        """Names of the modules that have a weight, dense or quantized."""

    @abstractmethod
    def weight_names(self, module: str) -> list[str]:
        """The tensors that `linear` reads for a module; empty if it has no weight."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the memory that reading has mapped. Tensors read before stay valid."""

    def has(self, name: str) -> bool:
        return name in self.names()

    def bias(self, module: str) -> Tensor | None:
        name = f"{module}.bias"
        return self.tensor(name) if self.has(name) else None

    def dense(self, module: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of a module as a dense matrix in the checkpoint's own order, dequantized where need be."""
        weight = self.linear(module)
        if isinstance(weight, QuantizedWeight):
            return weight.dequantize(dtype or torch.float32)
        return weight if dtype is None else weight.to(dtype)


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json and safetensors shards."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError("is missing", file=path / "config.json", fix="download it")
        self.config = read_json(path / "config.json")
        self._entries = scan(path)
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

    def linear(self, module: str) -> QuantizedWeight | Tensor:
        if not self.is_quantized(module):
            return self.tensor(f"{module}.weight")
        layer = self._layer(module)
        found = self._suffixes(module)
        if layer is None:
            raise self._error(f"{module}.{next(iter(found))}", "is quantized, but config.json does not say how",
                              "add the quantization_config the checkpoint was made with")
        reader = formats.by_method(self.scheme.method)
        try:
            return reader.read({s: self._raw(f"{module}.{s}") for s in found}, layer, self.scheme.format)
        except BadTensor as error:
            raise self._error(f"{module}.{error.suffix}", error.problem) from None

    def is_quantized(self, module: str) -> bool:
        found = self._suffixes(module)
        if not found:
            raise self._error(f"{module}.weight", "is missing")
        return formats.is_quantized({s: self._entries[f"{module}.{s}"].dtype for s in found})

    def modules(self) -> set[str]:
        return {m for name in self._entries if (m := name.rpartition(".")[0]) and self._suffixes(m)}

    def weight_names(self, module: str) -> list[str]:
        return [f"{module}.{suffix}" for suffix in self._suffixes(module)]

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self._entries.values())

    def _suffixes(self, module: str) -> list[str]:
        quantized = formats.by_method(self.scheme.method).SUFFIXES if self.scheme else ()
        known = dict.fromkeys((*quantized, "weight"))  # modules that stay dense are in every checkpoint
        return [s for s in known if f"{module}.{s}" in self._entries]

    def _layer(self, module: str) -> LayerScheme | None:
        """How to read a module that is quantized on disk, also where the config forgets to name it."""
        return None if self.scheme is None else self.scheme.layer(module) or self.scheme.default

    def _raw(self, name: str) -> Tensor:
        file = self._entry(name).file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._error(name, f"cannot be read: {error}") from None

    def _entry(self, name: str) -> Any:
        if name not in self._entries:
            raise self._error(name, "is missing")
        return self._entries[name]

    def _error(self, name: str, problem: str, fix: str = "download it again, or convert it again") -> CheckpointError:
        file = self._entries[name].file if name in self._entries else self.path
        return CheckpointError(problem, file=file, tensor=name, fix=fix)

    def _read_scheme(self) -> QuantScheme | None:
        """From config.json, or from the side file that older AutoGPTQ and AutoAWQ and ModelOpt leave instead."""
        found = self.config.get("quantization_config") or self.config.get("compression_config")
        for side_file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq"),
                                  ("hf_quant_config.json", "modelopt")):
            if not found and (self.path / side_file).is_file():
                found = {"quant_method": method} | read_json(self.path / side_file)
        if not found:
            return None
        if not isinstance(found, dict):
            raise CheckpointError("quantization_config is no JSON object", file=self.path / "config.json")
        return QuantScheme.from_config(found)


class BitsAndBytesCheckpoint(FolderCheckpoint):
    """A folder that bitsandbytes quantized. Its weights come dense: a table of values has no canonical form."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._states = {name.removesuffix(suffix) + "weight": self._state(name, suffix)
                        for name in self._entries for suffix in bitsandbytes.STATES if name.endswith(f".{suffix}")}
        logger.warning("%s: bitsandbytes weights are dequantized as they are read: %.1f GB", path, self.nbytes / 1e9)

    def names(self) -> set[str]:
        sides = tuple(f".{suffix}" for suffix in bitsandbytes.SUFFIXES)
        return {name for name in self._entries if not name.endswith(sides)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._states[name].shape if name in self._states else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._states:
            return self._states[name].dtype
        stored = super().dtype(name)
        return torch.bfloat16 if stored == torch.int8 else stored

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if name not in self._states and not self.has(f"{module}.SCB"):
            return super().tensor(name, dtype)
        suffixes = ("weight", *bitsandbytes.SUFFIXES)
        tensors = {s: self._raw(f"{module}.{s}") for s in suffixes if self.has(f"{module}.{s}")}
        try:
            if name in self._states:
                weight = bitsandbytes.dequantize_4bit(tensors, self._states[name])
            else:
                weight = bitsandbytes.dequantize_8bit(tensors, self.dtype(name))
        except BadTensor as error:
            raise self._error(f"{module}.{error.suffix}", error.problem) from None
        return weight if dtype is None else weight.to(dtype)

    def is_quantized(self, module: str) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return sum(prod(self.shape(name)) * self.dtype(name).itemsize for name in self.names())

    def _state(self, name: str, suffix: str) -> bitsandbytes.State:
        try:
            return bitsandbytes.read_state(suffix, self._raw(name))
        except BadTensor as error:
            raise self._error(name, error.problem) from None

    def _read_scheme(self) -> None:
        return None


class GgufCheckpoint(Checkpoint):
    """A GGUF file of a llama or gemma3 model."""

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(path)
        self._gguf_names = gguf_model.tensor_names(self.file)
        self.config = gguf_model.synthesize_config(self.file)
        self.scheme = self._describe_blocks()

    def names(self) -> set[str]:
        return set(self._gguf_names)

    def has(self, name: str) -> bool:
        return name in self._gguf_names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._gguf_name(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return gguf.DENSE.get(self.file.tensors[self._gguf_name(name)].kind, torch.float32)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            offset = gguf_model.norm_offset(self.file, self._gguf_name(name))
            vector = self._dense_rows(name, 0, 1).reshape(shape)
            return (vector.float() - offset).to(dtype or vector.dtype) if offset else vector.to(dtype or vector.dtype)
        out = torch.empty(shape, dtype=dtype or self.dtype(name))
        step = max(1, _CHUNK // shape[-1])
        for first in range(0, shape[0], step):
            out[first : first + step] = self._dense_rows(name, first, first + step)
        return out

    def linear(self, module: str) -> QuantizedWeight | Tensor:
        name = f"{module}.weight"
        return self._blocks(name, 0, None) if self.is_quantized(module) else self.tensor(name)

    def dense(self, module: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor(f"{module}.weight", dtype)  # a few rows at a time, which a large vocabulary needs

    def is_quantized(self, module: str) -> bool:
        return self.file.tensors[self._gguf_name(f"{module}.weight")].kind not in gguf.DENSE

    def modules(self) -> set[str]:
        return {name.removesuffix(".weight") for name in self._gguf_names if name.endswith(".weight")}

    def weight_names(self, module: str) -> list[str]:
        return [f"{module}.weight"] if self.has(f"{module}.weight") else []

    def release(self) -> None:
        self.file.release()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.file.tensors.values())

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise CheckpointError("is missing", file=self.path, tensor=name, fix="download it again")
        return self._gguf_names[name]

    def _rows(self, name: str, first: int, last: int | None) -> Any:
        gguf_name = self._gguf_name(name)
        order = gguf_model.hf_row_order(self.file, gguf_name)
        return self.file.rows(gguf_name, first, last) if order is None else self.file.rows(gguf_name)[order[first:last]]

    def _blocks(self, name: str, first: int, last: int | None) -> QuantizedWeight:
        weight = gguf.read_blocks(self._rows(name, first, last), self.file.tensors[self._gguf_name(name)].kind)
        self._check_finite(name, weight.scales, weight.mins)
        return weight

    def _dense_rows(self, name: str, first: int, last: int) -> Tensor:
        kind = self.file.tensors[self._gguf_name(name)].kind
        if kind not in gguf.DENSE:
            return self._blocks(name, first, last).dequantize()
        rows = gguf.read_dense(self._rows(name, first, last), kind)
        self._check_finite(name, rows)
        return rows

    def _check_finite(self, name: str, *tensors: Tensor | None) -> None:
        try:
            for tensor in tensors:
                if tensor is not None:
                    check_finite(name, tensor)
        except BadTensor as error:
            raise CheckpointError(error.problem, file=self.path, tensor=self._gguf_names[name],
                                  fix="download it again") from None

    def _describe_blocks(self) -> QuantScheme | None:
        """The commonest block type of the matrices, for reports; each module's own type is read from the file."""
        kinds = Counter(t.kind for n, t in self.file.tensors.items() if n.startswith("blk.") and len(t.shape) == 2)
        kind = kinds.most_common(1)[0][0] if kinds else "F32"
        if kind in gguf.DENSE:
            return None
        layer = LayerScheme("int", gguf.BITS[kind], gguf.GROUP[kind], kind in gguf.SYMMETRIC)
        return QuantScheme(method="gguf", format=kind, default=layer)


def open_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local HF folder, a .gguf file, a folder with exactly one .gguf file, or a Hub id (downloaded).

    Raises CheckpointError for anything damaged or missing, UnsupportedError for what Nibble does not read.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = _download(str(path_or_id), revision)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            if (split := SPLIT_NAME.fullmatch(path.name)) and int(split[2]) > 1:
                path = path.with_name(f"{split[1]}-00001-of-{split[3]}.gguf")  # any part names the model
            return GgufCheckpoint(path)
        raise CheckpointError("is neither a folder nor a .gguf file", file=path, fix="give the folder that holds it")
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files and not any(path.glob("*.safetensors")):
        if len(gguf_files) > 1 and not is_split(gguf_files):
            raise CheckpointError(f"holds {len(gguf_files)} .gguf files", file=path, fix="name one of them")
        return GgufCheckpoint(gguf_files[0])
    return (BitsAndBytesCheckpoint if _is_bitsandbytes(path / "config.json") else FolderCheckpoint)(path)


def _is_bitsandbytes(config: Path) -> bool:
    found = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == "bitsandbytes"


def _download(name: str, revision: str | None) -> Path:
    """Fetch the files of a Hub model that Nibble reads (never pickles) and return the local folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError("does not exist", file=name, fix="give a folder, a .gguf file or a Hub id owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES,
                                      ignore_patterns=_HUB_OTHERS))
    except LocalEntryNotFoundError:
        fix = "check the network, or download the folder elsewhere and give its path"
        raise CheckpointError("is not on this machine and the Hub cannot be reached", file=name, fix=fix) from None
    except (HfHubHTTPError, OSError) as error:
        fix = "check the name; for a gated model accept its licence and run `hf auth login`"
        raise CheckpointError(f"cannot be fetched from the Hub: {error}".splitlines()[0], file=name, fix=fix) from None
