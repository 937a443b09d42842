"""Runs a verb from a checkout, `python tools/convert.py ...`, with any Python that has what Nibble needs.

Only the standard library is imported here, so that a Python without the rest gets one line that says what to do. The
checkout itself need not be installed: it is imported as `nibble` from where it lies.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(verb: str) -> int:
    """The verb with this process's arguments. Returns the exit code."""
    sys.path.pop(0)  # tools/: no library is to be found here
    _import_checkout()
    try:
        from nibble.cli import main

        return main([verb, *sys.argv[1:]])
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "nibble":
            raise
        print(
            f"error: {sys.executable} has no package {missing.name!r}, which Nibble needs: run `make install` in "
            f"{ROOT} and then .venv/bin/nibble {verb}, or: pip install -e {ROOT}",
            file=sys.stderr,
        )
        return 2


def _import_checkout() -> None:
    spec = importlib.util.spec_from_file_location(
        "nibble", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} is no checkout of Nibble")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nibble"] = module
    spec.loader.exec_module(module)
