"""Is the engine stuck? Asked from outside its process, since what is stuck cannot say so.

    quiet for a quarter of the timeout   -> Ping; the engine's loop answers between two steps, or at once if it is idle
    any message from the engine          -> all is well, the clock starts anew
    silent for `timeout` seconds, and its process has not computed either             -> stuck
    silent for LONG_STEP times that, whatever it does                                 -> stuck

The loop itself answers, not a thread beside it, which would go on answering for a loop that hangs. So a step that
takes long is silent too: a large prompt on a slow machine, the first compilation of a kernel. What tells it from a
loop that hangs or a process that is stopped is that it uses the CPU: at least BUSY of the time, by the kernel's own
count of the process and of children that it has waited for. A loop that spins for ever, or a device that never
finishes while the host polls it, is found at the later of the two times.

Time in which this process did not run itself (suspended together with the engine, or its event loop held up) does not
count.
"""

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

LONG_STEP = 10  # times the timeout
BUSY = 0.01  # of the time since the last look
_LOOKS = 16  # in one timeout


class Watched(Protocol):
    """What of an AsyncEngine is looked at."""

    messages_heard: int

    @property
    def pid(self) -> int: ...

    def ping(self) -> None: ...


async def until_stuck(engine: Watched, timeout: float) -> float:
    """Wait until the engine is stuck; returns for how many seconds it has been silent."""
    pause = timeout / _LOOKS
    heard, last_look, cpu = engine.messages_heard, time.monotonic(), cpu_seconds(engine.pid)
    silent = idle = 0.0
    asked = False
    while True:
        await asyncio.sleep(pause)
        now, cpu_now = time.monotonic(), cpu_seconds(engine.pid)
        passed = min(now - last_look, 2 * pause)
        computed = cpu_now is None or cpu is None or cpu_now - cpu >= BUSY * passed
        last_look, cpu = now, cpu_now
        if engine.messages_heard != heard:
            heard, silent, idle, asked = engine.messages_heard, 0.0, 0.0, False
            continue
        silent += passed
        idle = 0.0 if computed else idle + passed
        if not asked and silent >= timeout / 4:
            engine.ping()
            asked = True
        if idle >= timeout or silent >= LONG_STEP * timeout:
            return silent


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and of its children that have ended; None where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return sum(map(int, stat.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
