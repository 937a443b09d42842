"""Hidden states to embeddings: pooled, projected, normalized, cut.

    hidden [T, hidden_size] -> pooled [hidden_size] -> Dense, Normalize, ... -> [dimensions] -> the first so many

A decoder's prompt comes in chunks: what is pooled so far waits in its Request and begins anew with its first token, so
a request that was set back is right too. An encoder's texts come whole, and several of one length at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError
from ..quant.checkpoint.headers import read_json
from .pooling import NORMALIZE, EmbeddingFiles, EmbeddingInfo, Mode, Pooling, read_files
from .sampler import NOT_FINITE
from .scheduling.batch import ScheduledRequest, StepResult

_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "Identity": torch.nn.Identity(),
    "ReLU": F.relu,
    "GELU": F.gelu,
}


@dataclass(frozen=True, slots=True)
class Projection:
    """sentence-transformers' Dense: activation(x W^T + b), in float32."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(F.linear(x, self.weight, self.bias))


@dataclass(frozen=True, slots=True)
class Pooler:
    """How one model makes embeddings."""

    files: EmbeddingFiles
    steps: tuple[Callable[[Tensor], Tensor], ...]
    dimensions: int

    @classmethod
    def load(cls, path: Path, default: Mode, width: int, device: torch.device) -> "Pooler":
        """Of a checkpoint's path; width: of its hidden states."""
        files = read_files(path, default)
        steps: list[Callable[[Tensor], Tensor]] = []
        for step in files.steps:
            if step == NORMALIZE:
                steps.append(normalized)
                continue
            projection = _projection(path / step, width, device)
            steps.append(projection)
            width = len(projection.weight)
        return cls(files, tuple(steps), width)

    @property
    def info(self) -> EmbeddingInfo:
        files = self.files
        return EmbeddingInfo(self.dimensions, files.prompts, files.default_prompt, files.lower_case)

    def pool(self, hidden: Tensor) -> Tensor:
        """Whole texts of one length [n, length, hidden_size] -> float32 [n, hidden_size]"""
        if self.files.mode == "mean":
            return hidden.float().mean(1)
        return hidden[:, 0 if self.files.mode == "cls" else -1].float()

    def finish(self, pooled: Tensor) -> Tensor:
        """float32 [n, hidden_size] -> [n, dimensions]"""
        for step in self.steps:
            pooled = step(pooled)
        return pooled

    def take(self, item: ScheduledRequest, hidden: Tensor, result: StepResult) -> None:
        """The next chunk of a decoder's prompt, [num_tokens, hidden_size]; with its last one, the embedding."""
        request, mode = item.request, self.files.mode
        if mode == "mean":
            chunk = hidden.float().sum(0)
            request.pooled = chunk if item.start == 0 else request.pooled + chunk
        elif mode == "lasttoken" or item.start == 0:
            request.pooled = hidden[-1 if mode == "lasttoken" else 0].float()
        if not item.samples or request.params.pooling is None:
            return
        pooled: Tensor = request.pooled / item.end if mode == "mean" else request.pooled
        request.pooled = None
        (vector,) = vectors(self.finish(pooled[None]), [request.params.pooling])
        if vector is None:
            result.errors[request.request_id] = NOT_FINITE
        else:
            result.embeddings[request.request_id] = vector


def vectors(rows: Tensor, asked: list[Pooling]) -> list[bytes | None]:
    """Rows as their requests want them, little-endian float32; None for one that is not finite."""
    plain = rows.float().cpu()
    finite = torch.isfinite(plain).all(-1).tolist()
    found: list[bytes | None] = []
    for row, pooling, whole in zip(plain, asked, finite, strict=True):
        if pooling.dimensions is not None and pooling.dimensions < len(row):
            row = normalized(row[: pooling.dimensions])
        elif pooling.unit:
            row = normalized(row)
        found.append(row.contiguous().numpy().tobytes() if whole else None)
    return found


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _projection(folder: Path, width: int, device: torch.device) -> Projection:
    config, file = read_json(folder / "config.json"), folder / "model.safetensors"
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _NAMED.get(named.rpartition(".")[2])
    if activation is None or config.get("use_residual"):
        raise UnsupportedError(
            f"{folder / 'config.json'}: {named if activation is None else 'use_residual'} is not supported"
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            names = set(tensors.keys())
            weight = tensors.get_tensor("linear.weight").float()
            bias = tensors.get_tensor("linear.bias").float() if "linear.bias" in names else None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=file) from None
    if weight.dim() != 2 or weight.shape[1] != width:
        raise CheckpointError(
            f"projects {tuple(weight.shape)}, what comes before has {width} dimensions", file=file
        )
    return Projection(weight.to(device), None if bias is None else bias.to(device), activation)
