"""Child processes that talk to their parent over a private socket pair, and live no longer than it.

The parent's half is `spawn`, the child's `enter`: it is given `--fd N`, its end of the pair.
"""

import argparse
import ctypes
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def spawn(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `command --fd N`; the process, and the parent's end of the pair."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


def enter(prog: str, description: str, argv: Sequence[str] | None = None) -> socket.socket:
    """In the child, first of all: its end of the pair. It ends with its parent and leaves signals to it."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the parent")
    args = parser.parse_args(argv)
    if sys.platform == "linux":
        # a parent that is gone already shows as a closed socket
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return socket.socket(fileno=args.fd)
