"""The process that renders chat templates: `python -m nibble.engine.text.template_process --fd N`.

A chat template is a stranger's program: one that never ends, or fills the memory, must take nobody with it. So it runs
here, one conversation at a time, under limits that end this process and no other; whoever started it starts another
(renderer.py). N is an inherited end of a private socket pair:

    ChatFormat ->                    once
               <- Started            what is wrong with the templates
    Conversation ->                  then as often as wanted
               <- Rendered | Refused

Limits: CPU seconds for each conversation (the kernel ends the process), bytes of address space, characters of output.
The process ends when the socket closes and, on Linux, when its parent dies in any way at all. SIGINT and SIGTERM are
left to the parent, which drains first.
"""

import resource
import signal
import socket
import sys

import msgspec

from .. import child
from ..messages import FrameReader, frame
from .chat_template import ChatFormat, ChatRenderer, Conversation

CPU_SECONDS = 2.0  # of one conversation; an ordinary one takes a ten-thousandth of it
MEMORY_BYTES = 512 * 2**20  # of address space, beyond what the interpreter has when it starts


class Started(msgspec.Struct, tag="started"):
    """The templates are compiled. `problems`: why some are not, one line each."""

    problems: list[str] = []


class Rendered(msgspec.Struct, tag="rendered"):
    text: str


class Refused(msgspec.Struct, tag="refused"):
    """There is no prompt, and why, for the client to read."""

    error: str
    exhausted: bool = False  # the memory: this process is of no more use


Reply = Started | Rendered | Refused
decode_reply = msgspec.msgpack.Decoder(Reply).decode
_decode_conversation = msgspec.msgpack.Decoder(Conversation).decode
_NO_MEMORY = (
    f"the chat template needs more than {MEMORY_BYTES >> 20} MiB of memory for these messages"
)


def serve(sock: socket.socket) -> None:
    """Answer until the parent closes its end."""
    frames = FrameReader()
    renderer: ChatRenderer | None = None
    while data := _receive(sock):
        for body in frames.feed(data):
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            if renderer is None:
                renderer = ChatRenderer(msgspec.msgpack.decode(body, type=ChatFormat))
                reply = _started(renderer)
            else:
                reply = _rendered(renderer, body)
            signal.setitimer(signal.ITIMER_PROF, 0)
            sock.sendall(frame(reply))


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 18)
    except ConnectionError:
        return b""


def _started(renderer: ChatRenderer) -> Reply:
    try:
        return Started(renderer.problems())
    except MemoryError:
        return Started([_NO_MEMORY])


def _rendered(renderer: ChatRenderer, body: bytes) -> Reply:
    try:
        return Rendered(renderer.render(_decode_conversation(body)))
    except ValueError as error:
        return Refused(str(error))
    except MemoryError:
        return Refused(_NO_MEMORY, exhausted=True)


def _bound_memory() -> None:
    if (
        sys.platform != "linux"
    ):  # elsewhere the system does not keep to it, or counts what is shared
        return
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # being ended is no crash


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process."""
    sock = child.enter("nibble.engine.text.template_process", "Renders chat templates.", argv)
    _bound_memory()
    with sock:
        serve(sock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
