"""The attacks are tests that record a Result each. `make test-server` runs them; `make test` leaves them out.

--soak-minutes N    how long the soak takes; 0.5 unless told
--quick             fewer rounds of what takes longest, and some kinds of damage only (QUICK)
--write-table       replace the table in docs/RELIABILITY.md by this run's
"""

import os
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import models, results
from .harness import Server, serving
from .results import Result

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "RELIABILITY.md"
SERVE = ("--kv-cache-memory", "32MiB", "--max-queued-requests", "4096")
RESULTS = pytest.StashKey[dict[str, list[Result]]]()
MINUTES_A_TEST = 15
QUICK = {
    "test_checkpoints.py": 4,
    "test_cache.py": 3,
}  # one case in so many is left where it must be quick

Record = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=0.5)
    parser.addoption("--quick", action="store_true")
    parser.addoption("--write-table", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick", False):
        left_out = [
            item
            for name, every in QUICK.items()
            for i, item in enumerate(item for item in items if item.path == HERE / name)
            if i % every
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if "record" in getattr(item, "fixturenames", ()):
            item.add_marker("attack")
            minutes = MINUTES_A_TEST + config.getoption("--soak-minutes", 0.5)
            item.add_marker(pytest.mark.timeout(60 * minutes))


def _family(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("test_")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """record(*results): rows of the table; the test fails if one of the attacks broke its limit."""

    def add(*found: Result) -> None:
        request.config.stash[RESULTS].setdefault(_family(request.node), []).extend(found)
        broken = [f"{r.attack}: {r.figure} (limit: {r.limit})" for r in found if not r.holds]
        assert not broken, "\n".join(broken)

    return add


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """An attack that fails in another way than by its limit has a row too."""
    report = yield
    ended = call.excinfo is not None and not call.excinfo.errisinstance(AssertionError)
    if ended and item.get_closest_marker("attack"):
        first = str(call.excinfo.value).strip().partition("\n")[0][:200]
        result = Result(item.name, f"{call.excinfo.typename}: {first}", "ends", False)
        item.config.stash[RESULTS].setdefault(_family(item), []).append(result)
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash[RESULTS]
    if not found:
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    run = (
        f"{'quick' if config.getoption('--quick', False) else 'full'}, "
        f"soak of {config.getoption('--soak-minutes', 0.5):g} minutes, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"
    )
    text = results.table(found, run)
    terminalreporter.section("attacks")
    terminalreporter.write_line(text)
    if config.getoption("--write-table", False):
        results.write(PAGE, text)


@pytest.fixture(scope="session", autouse=True)
def _room_for_clients() -> None:
    """Thousands of clients are thousands of descriptors of this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def soak_minutes(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--soak-minutes")


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64 at 4 bits, on the C++ kernels: what a request costs is HTTP and scheduling."""
    return models.quantized(tiny_llama, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wide(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """78 million weights at 4 bits: enough that they are kept prepared."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return models.quantized(tiny_llama, folder, group=models.GROUP, **models.WIDE)


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all attacks of a family that leave it as they found it."""
    with serving(tiny, tmp_path_factory.mktemp("server"), *SERVE) as started:
        yield started
