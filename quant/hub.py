"""The Hub: which files of a model Nibble reads, and how they come here. No torch: the HTTP server downloads too."""

import logging
import re
from pathlib import Path

from ..errors import CheckpointError

LOADED_FILES = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.jinja",  # in a folder, too: additional_chat_templates
    "merges.txt",
    "LICENSE*",
]
# The same weights once more, in other layouts.
_OTHERS = [f"*/{pattern}" for pattern in LOADED_FILES if pattern != "*.jinja"] + ["consolidated*"]
_LIKE_A_FILE = (".gguf", ".safetensors", ".json")


def could_be_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name, and not that of a file."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not name.endswith(_LIKE_A_FILE)


def download(name: str, revision: str | None = None) -> Path:
    """Fetch the files of a Hub model that Nibble reads (never pickles) and return the local folder.

    CheckpointError for a name that is no Hub id (it was a path, then), and for what cannot be fetched.
    """
    if not could_be_id(name):
        raise _does_not_exist(name)
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    _quiet_http_client()
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*LOADED_FILES, "SHA256SUMS"],
                ignore_patterns=_OTHERS,
            )
        )
    except HFValidationError:
        raise _does_not_exist(name) from None
    except LocalEntryNotFoundError:
        problem = "is not on this machine and the Hub cannot be reached"
        fix = "check the network, or download the folder elsewhere and give its path"
    except RevisionNotFoundError:
        problem, fix = f"has no revision {revision!r} on the Hub", "check --revision"
    except GatedRepoError:
        problem, fix = "is a gated model", "accept its licence on the Hub and run `hf auth login`"
    except RepositoryNotFoundError:
        problem = "is neither on this machine nor on the Hub"
        fix = "check the name; for a private model run `hf auth login`"
    except (HfHubHTTPError, OSError) as error:
        problem = f"cannot be fetched from the Hub: {error}".splitlines()[0]
        fix = "the same command again goes on where it stopped"
    raise CheckpointError(problem, file=name, fix=fix)


def _does_not_exist(name: str) -> CheckpointError:
    return CheckpointError(
        "does not exist", file=name, fix="give a folder, a .gguf file or a Hub id owner/name"
    )


def _quiet_http_client() -> None:
    """A line for each request would be printed through the progress bars. A level that somebody set stays."""
    for name in ("httpx", "httpx2"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
