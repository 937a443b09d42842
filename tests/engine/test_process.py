"""What the engine's process answers when loading fails."""

import socket

import pytest

from nibble.engine.client import _died_loading
from nibble.engine.config import EngineConfig
from nibble.engine.messages import Fatal, FrameReader, decode_from_engine, frame
from nibble.engine.process import serve


def fails(error: Exception, cause: Exception | None = None) -> Fatal:
    """The answer of an engine whose loading raises `error`."""

    def make_core(config: EngineConfig):
        raise error from cause

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(EngineConfig(model="unused")))
        code = serve(theirs, make_core)
        [body] = FrameReader().feed(ours.recv(1 << 16))
    fatal = decode_from_engine(body)
    assert isinstance(fatal, Fatal)
    assert fatal.exit_code == code
    return fatal


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
def test_too_little_memory_is_no_defect(error, caplog):
    fatal = fails(error)
    assert fatal.exit_code == 2
    assert "memory ran out while the model was loaded" in fatal.message
    assert "\n" not in fatal.message
    assert not caplog.records


def test_too_little_memory_is_seen_behind_another_error():
    assert fails(ValueError("no module"), cause=MemoryError()).exit_code == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), KeyError("allocate memory"), OSError(5, "I/O")]
)
def test_other_failures_are_defects(error, caplog):
    assert fails(error).exit_code == 1
    assert "cannot go on" in caplog.text


def test_a_child_that_was_killed_or_aborted_says_what_memory_there_is():
    assert "was ended by SIGKILL while it loaded" in str(_died_loading(-9))
    assert "ended with exit code 127 while it loaded" in str(_died_loading(127))
    assert "GiB are free of " in str(_died_loading(1))
