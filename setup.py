"""Builds the C++ kernels with the package. They are optional: where they cannot be built, Nibble installs without them
and says at start-up what is lost. Everything else about the package is in pyproject.toml.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_CPU = Path(__file__).resolve().parent / "kernels" / "cpu"
_spec = importlib.util.spec_from_file_location("nibble_cpu_build", _CPU / "build.py")
kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """One library loaded with ctypes: no Python in it, so no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], kernels.LIBRARY.name)

    def build_extension(self, ext: Extension) -> None:
        try:
            kernels.build(Path(self.get_ext_fullpath(ext.name)).resolve(), os.environ.get("CXX"))
        except (kernels.BuildError, OSError) as error:
            raise CompileError(f"the C++ kernels were not built: {error}") from error


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "nibble.kernels.cpu.libnibble_cpu",
            [f"kernels/cpu/{name}" for name in kernels.SOURCES],
            depends=[f"kernels/cpu/{file.name}" for file in kernels.headers()],
            optional=True,
        )
    ],
)
