"""Which file or folder a model's name means. The one place that decides it, for weights and tokenizer alike; no torch.

a folder with .safetensors files      the folder
a folder of GGUF files alone          the one model in it: the first part of a split one; projectors of images
                                      (mmproj) are no model
a GGUF file, whatever its name        the file; of a split model, its first part (Ollama's blobs have no ending)
else                                  a Hub id, downloaded
"""

import re
from pathlib import Path

from ..errors import CheckpointError
from .hub import could_be_id, download

MAGIC = b"GGUF"
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # part, of how many
_MAX_NAMED = 8  # models of a folder that an error lists


def locate(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The GGUF file or the folder of a local path or Hub id.

    CheckpointError for what does not exist or cannot be fetched, and for a folder of several GGUF models.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = download(str(path_or_id), revision)
    if path.is_file():
        return _first_part(_checked_gguf(path))
    if any(path.glob("*.safetensors")):
        return path
    return _gguf_in(path) or path


def is_hub_id(path_or_id: str | Path) -> bool:
    """Whether a name is no path here and could be a model on the Hub. Asks nobody."""
    return not Path(path_or_id).expanduser().exists() and could_be_id(str(path_or_id))


def _checked_gguf(file: Path) -> Path:
    if file.suffix.lower() != ".gguf":
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(
                    "is neither a folder nor a GGUF file",
                    file=file,
                    fix="give the folder that holds it",
                )
    return file


def _gguf_in(folder: Path) -> Path | None:
    """The GGUF model of a folder; None where there is none."""
    files = sorted(folder.glob("*.gguf"))
    models = {
        _model_name(file): file for file in reversed(files) if "mmproj" not in file.name.lower()
    }
    if len(models) > 1:
        names = sorted(models)[:_MAX_NAMED]
        more = f" and {len(models) - len(names)} more" if len(models) > len(names) else ""
        raise CheckpointError(
            f"holds {len(models)} GGUF models: {', '.join(names)}{more}",
            file=folder,
            fix="give the path of one of them",
        )
    if files and not models:
        raise CheckpointError(
            f"holds an image projector ({files[0].name}) and no model",
            file=folder,
            fix="give the model's own .gguf file",
        )
    return _first_part(*models.values()) if models else None


def _model_name(file: Path) -> str:
    """The same for all parts of one split model."""
    split = SPLIT_NAME.fullmatch(file.name)
    return f"{split[1]}-*-of-{split[3]}.gguf" if split else file.name


def _first_part(file: Path) -> Path:
    split = SPLIT_NAME.fullmatch(file.name)
    if split is None:
        return file
    first = file.with_name(f"{split[1]}-00001-of-{split[3]}.gguf")
    if not first.is_file():
        raise CheckpointError(
            f"part 1 of {int(split[3])} is missing", file=first, fix="download it"
        )
    return first
