"""`nibble verify`: whether a checkpoint's files are those that were converted or downloaded, by their hashes."""

from pathlib import Path
from typing import Annotated

import typer

from nibble.errors import CheckpointError
from nibble.quant.hashes import problems
from nibble.quant.locate import locate


def verify_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local folder, or Hub id of a downloaded model")
    ],
) -> int:
    """Compare every file with the hashes that the conversion wrote (SHA256SUMS), or by which the Hub knows it.

    One line for each file that is wrong, and exit code 2; 0: all of them are right.

    Example: nibble verify ./SmolLM2-135M-Instruct-AWQ-INT4-g128
    """
    folder = Path(model).expanduser()
    folder = folder if folder.is_dir() else locate(model)
    if not folder.is_dir():
        raise CheckpointError("is no folder", file=folder, fix="give the folder that it lies in")
    wrong = problems(folder)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{folder}: every file is as it was written")
    return 2 if wrong else 0
