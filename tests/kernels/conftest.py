"""Tests of kernels import kernel_cases.py by name; so do those in tests/gpu."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
