"""Whether a model is an encoder: the first question that is asked of it, before any weight is looked at. No torch."""

from pathlib import Path
from typing import Any

import msgspec

from ...architectures import limits
from ...architectures.encoders import find
from ...errors import CheckpointError
from ...quant.files import read_bounded
from ...quant.locate import locate


def is_encoder(model: str | Path, revision: str | None = None) -> bool:
    """By its config.json; a GGUF file is none. CheckpointError as from `locate`, or for a file that is damaged."""
    file = locate(model, revision) / "config.json"
    if not file.is_file():
        return False
    try:
        config: dict[str, Any] = msgspec.json.decode(
            read_bounded(file, limits.MAX_JSON_BYTES), type=dict[str, Any]
        )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = f"cannot be read as a JSON object: {error}".splitlines()[0]
        raise CheckpointError(problem, file=file, fix="download it again") from None
    return find(config) is not None
