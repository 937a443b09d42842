"""Asks a port for /health ten times a second until its standard input ends, then prints how many seconds each answer
took, "inf" for none within LIMIT. A process of its own: what it measures must not be the attacker's own slowness."""

import select
import socket
import sys
import time

LIMIT = 10.0  # seconds
REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def ask(port: int) -> float:
    start = time.perf_counter()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as sock:
            sock.sendall(REQUEST)
            if sock.recv(64).startswith(b"HTTP/1.1 200 "):
                return time.perf_counter() - start
    except OSError:
        pass
    return float("inf")


if __name__ == "__main__":
    latencies = [ask(int(sys.argv[1]))]
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        latencies.append(ask(int(sys.argv[1])))
    print(*latencies)
