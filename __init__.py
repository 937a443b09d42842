"""Nibble: convert checkpoints to AWQ, GPTQ and FP8 and serve them.

The public Python API. Names are resolved on first use, so that importing `nibble` needs neither torch nor a
GPU: the HTTP server process never loads torch at all.

    from nibble import LLM, SamplingParams
    print(LLM("models/SmolLM2-AWQ").chat([{"role": "user", "content": "Hello"}])[0].text)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .engine.llm import LLM as LLM
    from .engine.sampling_params import SamplingParams as SamplingParams
    from .tools.convert import convert as convert

# Read by OpenMP when torch loads, here and in the engine process: a waiting thread spins for some microseconds, then
# sleeps. libgomp's own default spins for milliseconds, and where the cores are busy (with the server and its clients,
# say) that makes every step tens of times slower; not spinning at all makes a quiet machine twice as slow.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__all__ = ["LLM", "SamplingParams", "__version__", "convert"]

_HOMES = {
    "LLM": ".engine.llm",
    "SamplingParams": ".engine.sampling_params",
    "convert": ".tools.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nibble' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
