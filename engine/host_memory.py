"""How much memory this process may still take from its host, and which limit says so.

The smallest of

    the machine             MemAvailable of /proc/meminfo
    its control groups      v1 and v2, its own and every one above it: limit less use. Page cache that has not been
                            touched for a while (inactive_file) is dropped before anybody is killed: it counts as free
    its address space       RLIMIT_AS less what is mapped (ulimit -v), RLIMIT_DATA less what is private (ulimit -d)

Swap is not counted: weights and KV cache are read at every step. Where a v1 group limits memory and swap together
(memsw), that limit bounds too. Everything is read below `root`, / but in tests.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# What torch, its allocators, the loader of libraries and Python say where they raise no MemoryError.
_RAN_OUT = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "failed to map segment",
    "can't start new thread",
)
_UNKNOWN = 8 << 30  # no /proc: not Linux
_UNLIMITED = 1 << 60  # v1 writes the largest number of pages that it knows


@dataclass(frozen=True, slots=True)
class Headroom:
    free: int  # bytes, never negative
    limit: str  # what bounds it, for people


def headroom(root: Path = Path("/")) -> Headroom:
    """The tightest of all that bounds this process now."""
    found = [*_machine(root), *_control_groups(root), *_address_space(root)]
    return min(found, key=lambda each: each.free)


def ran_out(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that there was no memory (or no room for another thread's stack)."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        may_say_so = isinstance(cause, RuntimeError | ImportError | OSError)
        if may_say_so and any(words in str(cause) for words in _RAN_OUT):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def _machine(root: Path) -> Iterator[Headroom]:
    free = _fields(root / "proc/meminfo").get("MemAvailable:")
    yield Headroom(_UNKNOWN if free is None else free * 1024, "the machine's memory")


def _address_space(root: Path) -> Iterator[Headroom]:
    used = _fields(root / "proc/self/status")
    for name, shell, counter in (
        ("Max address space", "ulimit -v", "VmSize:"),
        ("Max data size", "ulimit -d", "VmData:"),
    ):
        limits = _read(root / "proc/self/limits").partition(name)[2].split(maxsplit=1)
        if limits and limits[0].isdigit() and counter in used:
            limit = int(limits[0])
            yield _within(limit, used[counter] * 1024, f"the limit of `{shell}`, {gib(limit)}")


def _control_groups(root: Path) -> Iterator[Headroom]:
    paths = _own_paths(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        if not (fields := kind.split()) or fields[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if fields[0] == "cgroup2" else 1
        if version == 1 and "memory" not in fields[-1].split(","):
            continue
        mounted, mount = (PurePosixPath(part) for part in place.split()[3:5])
        own = paths.get(version, mounted)
        inside = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        for level in (inside, *inside.parents):
            yield from _group(root / str(mount / level).lstrip("/"), version, str(mount / level))


def _own_paths(root: Path) -> dict[int, PurePosixPath]:
    """This process's group in the hierarchy of each version, as /proc names it."""
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths[1 if controllers else 2] = PurePosixPath(path)
    return paths


def _group(folder: Path, version: int, name: str) -> Iterator[Headroom]:
    """What the limits of one control group leave; nothing where it has none."""
    stat = _fields(folder / "memory.stat")
    if version == 2:
        reclaimable = stat.get("inactive_file", 0)
        pairs = [("memory.max", "memory.current"), ("memory.high", "memory.current")]
    else:
        reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        pairs = [
            (f"memory.{kind}limit_in_bytes", f"memory.{kind}usage_in_bytes")
            for kind in ("", "memsw.")
        ]
    for limit_file, used_file in pairs:
        limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
        if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
            what = f"the control group's {limit_file}, {gib(int(limit))} ({name})"
            yield _within(int(limit), int(used) - reclaimable, what)


def _within(limit: int, used: int, name: str) -> Headroom:
    return Headroom(max(0, limit - max(0, used)), name)


def _fields(file: Path) -> dict[str, int]:
    """Name -> number, of lines that are a name, a number and perhaps a unit."""
    lines = (line.split() for line in _read(file).splitlines())
    return {parts[0]: int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
