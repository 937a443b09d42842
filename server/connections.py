"""How many connections are open, and which of them goes when there is no room for another.

A connection waits while its client owes something: a request's head, its body, or the next request. The others are
being answered, and are left alone.

    room                                              served
    none, but some connection waits                   the one that has waited longest is cut; served
    none, and all are being answered                  only probes are: the answer to all else is 503, then the end
    one address has more waiting than it may          the one of them that has waited longest is cut

So whoever opens connections and says nothing takes nobody's place, and /health is answered however many there are.
Loopback is counted as one of all only: that is where a proxy on this machine comes from.
"""

import errno
import ipaddress
import logging
import os
import resource
import socket
from typing import Any, Protocol

from ..errors import UserError

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 4096
RESERVED_FILES = (
    80  # descriptors for all else: the process's own, probes, and connections not yet counted
)
PROBES = 24  # connections beyond the limit that are asked what they want
ACCEPTED_AT_ONCE = 8  # connections accepted in one turn of the event loop: few, since they are counted two turns later
BACKLOG = 2048  # connections that wait in the kernel


class Connection(Protocol):
    """What the table needs of one."""

    address: str  # of the client

    def cut(self) -> None: ...


class Connections:
    """The open connections of one server."""

    def __init__(self, limit: int, per_address: int):
        """At most `limit` in all; at most `per_address` waiting from one address, 0: any number."""
        self.limit, self.per_address = limit, per_address
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # the one that has waited longest first
        self._by_group: dict[str, dict[Connection, None]] = {}  # the same, by address

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> bool:
        """Take in one more, which waits. False: it may be asked for probes only."""
        self._open.add(connection)
        if len(self._open) > self.limit and self._waiting:
            self._cut_oldest(self._waiting, "no room for another connection")
        self.waits(connection)
        if len(self._open) > self.limit + PROBES:
            self._cut_oldest({connection: None}, "every connection is in use")
        return len(self._open) <= self.limit

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.works(connection)

    def waits(self, connection: Connection) -> None:
        """Its client owes something, from now on."""
        if connection in self._waiting:
            return
        self._waiting[connection] = None
        group = _group(connection.address)
        if self.per_address and group:
            waiting = self._by_group.setdefault(group, {})
            waiting[connection] = None
            if len(waiting) > self.per_address:
                self._cut_oldest(waiting, "too many connections of one address wait")

    def works(self, connection: Connection) -> None:
        """It is being answered."""
        if connection not in self._waiting:
            return
        del self._waiting[connection]
        group = _group(connection.address)
        if group in self._by_group:
            self._by_group[group].pop(connection, None)
            if not self._by_group[group]:
                del self._by_group[group]

    def _cut_oldest(self, waiting: dict[Connection, None], why: str) -> None:
        oldest = next(iter(waiting))
        self.closed(oldest)
        log.warning("%s: one was cut (of %d)", why, len(self._open) + 1)
        oldest.cut()


def _group(address: str) -> str:
    """Whose connections are counted together: those of an IPv4 address, or of an IPv6 network of 64 bits. Empty: no
    one's."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # no address of the network
        return ""
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    if mapped.is_loopback:
        return ""
    return str(mapped) if mapped.version == 4 else str(mapped.packed[:8])


def connection_limit(asked: int | None) -> int:
    """The most connections: as asked, or DEFAULT_LIMIT, or what the process's file descriptors allow. UserError where
    they do not allow what was asked."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = max(8, files - RESERVED_FILES) if files != resource.RLIM_INFINITY else 2**31
    if asked is None:
        return min(DEFAULT_LIMIT, most)
    if asked > most:
        raise UserError(
            f"--max-connections {asked} needs {asked + RESERVED_FILES} file descriptors, and this process may have "
            f"{files} (ulimit -n {asked + RESERVED_FILES}, or at most {most} connections)"
        )
    return asked


class Listener(socket.socket):
    """A listening socket that outlives a lack of file descriptors.

    asyncio, told by the kernel that there are none, logs it and tries again at once, for ever. Here one descriptor is
    kept aside: it is given up, so that the connection can be accepted and closed, and taken back.
    """

    _spare: int | None = None

    def listen(self, _: int = 0) -> None:
        super().listen(BACKLOG)
        if self._spare is None:
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            super().accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
            log.error("no file descriptor is left: a connection was closed unanswered")
        raise BlockingIOError  # for this turn of the event loop

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()
