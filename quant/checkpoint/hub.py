"""The Hub: which files of a model Nibble reads, and how they come here."""

import re
from pathlib import Path

from ...errors import CheckpointError

_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.jinja",
    "merges.txt",
    "LICENSE*",
]
_HUB_OTHERS = ["*/*", "consolidated*"]  # the same weights once more, in other layouts


def download(name: str, revision: str | None) -> Path:
    """Fetch the files of a Hub model that Nibble reads (never pickles) and return the local folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(
            "does not exist", file=name, fix="give a folder, a .gguf file or a Hub id owner/name"
        )
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_OTHERS
            )
        )
    except LocalEntryNotFoundError:
        fix = "check the network, or download the folder elsewhere and give its path"
        raise CheckpointError(
            "is not on this machine and the Hub cannot be reached", file=name, fix=fix
        ) from None
    except (HfHubHTTPError, OSError) as error:
        fix = "check the name; for a gated model accept its licence and run `hf auth login`"
        raise CheckpointError(
            f"cannot be fetched from the Hub: {error}".splitlines()[0], file=name, fix=fix
        ) from None
