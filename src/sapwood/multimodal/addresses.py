"""Which addresses the server may fetch from: those of the public Internet, and named hosts."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

from sapwood.base.errors import InvalidRequest

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses"""

_NOT_LOCAL = "; an address inside the server's own network is fetched only from hosts that "
_NOT_LOCAL += "--allowed-media-domains names"


async def system_addresses(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


async def checked_address(
    host: str, port: int, *, allowed: frozenset[str], resolve: Resolve
) -> str:
    """The address to connect to: the host's name is resolved here and never again, so that what is
    checked is what is fetched.

    allowed  hosts; if there are any, no others are fetched, and these may be local
    """
    name = host.rstrip(".").lower()
    is_named = name in allowed
    if allowed and not is_named:
        raise InvalidRequest(
            f"is at {host!r}, but --allowed-media-domains of this server names only "
            f"{', '.join(sorted(allowed))}"
        )
    try:
        addresses = await resolve(name, port)
    except (OSError, UnicodeError):
        raise InvalidRequest(f"is at {host!r}, a name that has no address") from None
    if not addresses:
        raise InvalidRequest(f"is at {host!r}, a name that has no address")
    if not is_named and not all(map(is_public, addresses)):
        raise InvalidRequest(f"is at {host!r}, which is not on the public Internet{_NOT_LOCAL}")
    return addresses[0]


def is_public(address: str) -> bool:
    """False for loopback, private, link-local (clouds' metadata), multicast and reserved ones, also
    where an IPv6 address only wraps such an IPv4 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
