"""`nibble serve` where the system gives it too little memory: it serves, or says so in one line."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 1 << 30


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep to RLIMIT_AS")
@pytest.mark.parametrize("limit", [0.9, 1.0])
def test_weights_that_address_space_has_no_room_for(limit, tiny_llama: Path, tmp_path: Path):
    """The KV cache that is asked for does not fit, however small the model."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nibble", "serve", str(tiny_llama), "--port", "0"),
            *("--kv-cache-memory", "2GiB", "--prepared-cache", "none"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (int(limit * GIB),) * 2),
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "memory ran out while the model was loaded" in line
    assert "`ulimit -v`" in line
    assert "Traceback" not in done.stderr
