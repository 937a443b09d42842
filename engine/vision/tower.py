"""VisionTower: a model's own image processor, vision encoder and projector, as transformers computes them.

It is the class of the whole model, without layers of its language model; the tower's weights are the checkpoint's, in
the dtype of activations, whatever the language model is quantized to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ...architectures.multimodal import layout
from ...errors import CheckpointError
from ...quant.checkpoint import Checkpoint
from ..messages import Placeholder, VisionInfo
from .families import FAMILIES, VisionFamily
from .image import read_image


class VisionTower:
    """Of one checkpoint. Used from one thread at a time."""

    def __init__(self, model: Any, processor: Any, family: VisionFamily, image_token_id: int):
        """model: transformers' class, on its device."""
        self._model, self._processor, self._family = model, processor, family
        self.info = VisionInfo(family.image_token, image_token_id)
        self.is_whole = family.is_whole

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> "VisionTower | None":
        """None where the model does not see, or not in a way that is computed. CheckpointError if files are missing or
        weights do not fit."""
        name = next(iter(checkpoint.config.get("architectures") or ()), "")
        family = FAMILIES.get(name)
        if family is None or not _tower_names(checkpoint):
            return None
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(
                checkpoint.path, backend="pil", local_files_only=True
            )
            model = _module(getattr(transformers, name), family, checkpoint, dtype)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a config or a file leads transformers to
            raise _damaged(checkpoint.path, str(error)) from error
        image_token_id = getattr(model.config, family.image_token_id)
        return cls(model.to(device), processor, family, image_token_id)

    @property
    def nbytes(self) -> int:
        """Of its weights."""
        return sum(
            parameter.nbytes
            for name, parameter in self._model.named_parameters()
            if not name.startswith(self._family.language)
        )

    @torch.inference_mode()
    def encode(self, data: bytes) -> tuple[Placeholder, Tensor]:
        """An image file -> what stands for it, and the embeddings [*, hidden_size] of its image tokens in order.
        ImageError for a file that is not read."""
        placeholder, embeddings = self._family.encode(
            self._model.model, self._processor, read_image(data)
        )
        if sum(placeholder.runs) != len(embeddings) or not torch.isfinite(embeddings).all():
            raise RuntimeError("the vision tower gave no embeddings that can be used")
        return placeholder, embeddings


def _tower_names(checkpoint: Checkpoint) -> list[str]:
    """Tensors that are not of the language model."""
    prefix, head = layout(checkpoint.names())
    return sorted(n for n in checkpoint.names() if not n.startswith((prefix, f"{head}.")))


def _module(kind: Any, family: VisionFamily, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' class with the tower's weights."""
    described = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config = kind.config_class.from_dict(deepcopy(described))
    text = config.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    weights = {name: checkpoint.tensor(name, dtype) for name in _tower_names(checkpoint)}
    with _silence():  # of the language model all is missing, as it should
        model, found = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    missing = [n for n in found["missing_keys"] if not n.startswith((family.language, "lm_head."))]
    if missing:
        raise _damaged(checkpoint.path, f"{sorted(missing)[0]} is missing")
    return model.eval()


@contextmanager
def _silence() -> Iterator[None]:
    """transformers warns of nothing and draws no bar."""
    level, bar = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"its vision tower cannot be loaded: {' '.join(what.split())[:300]}",
        file=folder,
        fix="copy preprocessor_config.json and the tower's weights from the original model",
    )
