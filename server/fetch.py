"""Files of others, fetched for a client who names them by URL: from hosts that the operator listed, and no further.

A name is resolved once, here, and the connection goes to the very address that was checked: a name that leads to the
machine itself or into a private network is refused, whatever it leads to a moment later. An address or a port that is
listed as such is the operator's own word. Redirects are not followed, and no proxy is asked.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    import httpx

SECONDS = 10.0  # for one file, from the first look-up to its last byte
MAX_BYTES = 20 * 2**20
_PORTS = {"http": 80, "https": 443}


class FetchError(ValueError):
    """Why there is no file; fit for the client to read."""


async def fetch(url: str, hosts: Collection[str]) -> bytes:
    """The body that an http(s) URL answers with. hosts: names or addresses, with a port where it is not the scheme's
    own. FetchError for any other URL, and for whatever goes wrong."""
    parts, host, port = _parsed(url)
    if host not in hosts and f"{host}:{port}" not in hosts:
        raise FetchError(f"{host!r} is none of the hosts that this server fetches from")
    if port != _PORTS[parts.scheme] and f"{host}:{port}" not in hosts:
        raise FetchError(f"port {port} of {host!r} is none that this server fetches from")
    try:
        async with asyncio.timeout(SECONDS):
            return await _body(parts, host, port, await _address(host, port))
    except TimeoutError:
        raise FetchError(f"{host!r} gave no whole file within {SECONDS:g} seconds") from None


def _parsed(url: str) -> tuple[SplitResult, str, int]:
    """A URL with its host and port."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        raise FetchError("this is no http or https URL") from None
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise FetchError("a URL with a host and without a user is wanted")
    return parts, parts.hostname, port


async def _address(host: str, port: int) -> str:
    """Where a host is: itself where it is an address, which was listed, else one that anybody can reach."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"{host!r} is not known") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(ipaddress.ip_address(each).is_global for each in addresses):
        raise FetchError(f"{host!r} leads into a private network")
    return addresses[0]


async def _body(parts: SplitResult, host: str, port: int, address: str) -> bytes:
    import httpx  # here, since few servers fetch anything

    at = f"[{address}]" if ":" in address else address
    url = parts._replace(netloc=f"{at}:{port}", fragment="").geturl()
    named = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
    try:
        async with (
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=SECONDS) as client,
            client.stream(
                "GET",
                url,
                headers={"host": named, "accept": "image/*", "accept-encoding": "identity"},
                extensions={"sni_hostname": host},
            ) as answer,
        ):
            if answer.status_code != 200:
                raise FetchError(f"{host!r} answered with status {answer.status_code}")
            return await _bounded(answer)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"{host!r} gave no file: {type(error).__name__}") from None


async def _bounded(answer: "httpx.Response") -> bytes:
    chunks, size = [], 0
    async for chunk in answer.aiter_raw():
        size += len(chunk)
        if size > MAX_BYTES:
            raise FetchError(f"the file has more than {MAX_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
