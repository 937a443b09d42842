"""What a process may still take, as /proc and the control groups of machines and containers tell it."""

import subprocess
import sys
from pathlib import Path

import pytest

from nibble.engine.host_memory import headroom

MIB = 1 << 20
V2_MOUNT = "42 31 0:38 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
CPU_MOUNT = "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"


class Host:
    """A root of our own, with what the kernel writes in the files that matter."""

    def __init__(self, root: Path):
        self.root = root
        self.write(
            "proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable: 8192000 kB\nCached: 5 kB\n"
        )
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t 2048 kB\nVmData:\t 1024 kB\n")
        self.limits()

    def write(self, name: str, text: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def limits(self, address_space: str = "unlimited", data: str = "unlimited") -> None:
        self.write(
            "proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units     \n"
            f"Max data size             {data:<20} unlimited            bytes     \n"
            "Max stack size            8388608              unlimited            bytes     \n"
            f"Max address space         {address_space:<20} 99999999999          bytes     \n",
        )

    def groups(self, own: str, *mounts: str) -> None:
        self.write("proc/self/cgroup", own)
        self.write("proc/self/mountinfo", "\n".join((CPU_MOUNT, *mounts)) + "\n")

    def v2(self, path: str, limit: str, used: int, inactive: int = 0, high: str = "max") -> None:
        folder = f"sys/fs/cgroup{path}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 77\ninactive_file {inactive}\nactive_file 99\n")

    def v1(self, path: str, limit: int, used: int, inactive: int = 0, both: str = "") -> None:
        folder = f"sys/fs/cgroup/memory{path}"
        for kind, numbers in (("", (limit, used)), ("memsw.", both.split())):
            for name, number in zip(("limit", "usage"), numbers, strict=False):
                self.write(f"{folder}/memory.{kind}{name}_in_bytes", f"{number}\n")
        self.write(
            f"{folder}/memory.stat",
            f"inactive_file 1\nhierarchical_memory_limit 5\ntotal_inactive_file {inactive}\n",
        )

    @property
    def free(self) -> int:
        return headroom(self.root).free

    @property
    def limit(self) -> str:
        return headroom(self.root).limit


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_machine_bounds_where_nothing_else_does(host):
    assert (host.free, host.limit) == (8192000 * 1024, "the machine's memory")


def test_without_proc_a_guess(tmp_path):
    assert headroom(tmp_path / "nothing").free == 8 << 30


def test_a_container_sees_its_own_group_at_the_root(host):
    """cgroup v2 with a namespace of its own: docker, kubernetes."""
    host.groups("0::/\n", V2_MOUNT.format(root="/"))
    host.v2("", str(500 * MIB), 200 * MIB)
    assert host.free == 300 * MIB
    assert "memory.max, 0.49 GiB (/sys/fs/cgroup)" in host.limit


def test_page_cache_that_can_be_dropped_is_free(host):
    host.groups("0::/\n", V2_MOUNT.format(root="/"))
    host.v2("", str(500 * MIB), 400 * MIB, inactive=150 * MIB)
    assert host.free == 250 * MIB


@pytest.mark.parametrize("tight", ["/user.slice", "/user.slice/session.scope", ""])
def test_the_tightest_group_up_to_the_root_bounds(host, tight):
    """systemd's slices: the process's own group has no limit, one above it has."""
    host.groups("0::/user.slice/session.scope/own\n", V2_MOUNT.format(root="/"))
    for path in ("", "/user.slice", "/user.slice/session.scope", "/user.slice/session.scope/own"):
        host.v2(path, "max", 9 * MIB)
    host.v2("/system.slice", str(MIB), MIB)  # not above it
    host.v2(tight, str(700 * MIB), 100 * MIB)
    assert host.free == 600 * MIB


def test_memory_high_bounds_too(host):
    """Beyond it the kernel slows a process down until it stands still."""
    host.groups("0::/\n", V2_MOUNT.format(root="/"))
    host.v2("", str(900 * MIB), 100 * MIB, high=str(400 * MIB))
    assert host.free == 300 * MIB


def test_v1_has_a_hierarchy_of_its_own(host):
    host.groups("5:cpu:/elsewhere\n4:memory:/job/7\n0::/\n", V1_MOUNT.format(root="/"))
    host.v1("", 9223372036854771712, 5 * MIB)
    host.v1("/job", 700 * MIB, 100 * MIB, inactive=50 * MIB)
    host.v1("/job/7", 9223372036854771712, MIB)
    host.v1("/elsewhere", MIB, MIB)
    assert host.free == 650 * MIB
    assert "memory.limit_in_bytes, 0.68 GiB (/sys/fs/cgroup/memory/job)" in host.limit


def test_v1_beside_other_controllers_and_a_hybrid_v2(host):
    host.groups(
        "4:memory,hugetlb:/a\n0::/a\n",
        V1_MOUNT.format(root="/"),
        V2_MOUNT.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
    )
    host.v1("/a", 300 * MIB, 100 * MIB)
    assert host.free == 200 * MIB


def test_a_v1_limit_of_memory_and_swap_together(host):
    """Half of it is swapped out: memory's own limit is far, this one is not."""
    host.groups("4:memory:/a\n", V1_MOUNT.format(root="/"))
    host.v1("/a", 800 * MIB, 200 * MIB, both=f"{1000 * MIB} {900 * MIB}")
    assert host.free == 100 * MIB


@pytest.mark.parametrize("own", ["/docker/abc", "/docker/abc/inner", "/../.."])
def test_a_mount_that_shows_only_a_part_of_the_hierarchy(host, own):
    """A container without a namespace of groups: its mount begins at its own, /proc names it from the host's root."""
    host.groups(f"4:memory:{own}\n", V1_MOUNT.format(root="/docker/abc"))
    host.v1("", 300 * MIB, 100 * MIB)
    assert host.free == 200 * MIB


def test_a_group_over_its_limit_has_nothing_left(host):
    host.groups("0::/\n", V2_MOUNT.format(root="/"))
    host.v2("", str(MIB), 2 * MIB)
    assert host.free == 0


def test_limits_of_the_shell(host):
    host.limits(address_space=str(100 * MIB))
    assert (host.free, host.limit) == (98 * MIB, "the limit of `ulimit -v`, 0.10 GiB")
    host.limits(data=str(50 * MIB))
    assert (host.free, host.limit) == (49 * MIB, "the limit of `ulimit -d`, 0.05 GiB")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_kernels_own_files():
    """This process, on this machine: what is read there is what was set."""
    code = (
        "import resource; from nibble.engine.host_memory import headroom; before = headroom()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1)); after = headroom()\n"
        "print(before.free > 0, 0 < after.free < 1 << 30, 'ulimit -v' in after.limit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
