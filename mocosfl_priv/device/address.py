"""Parse, check and resolve network addresses of the form HOST:PORT."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from typing import Any, NamedTuple

from .errors import DeviceError

LARGEST_PORT = 65535
HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
LONGEST_HOST = 253
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class Address(NamedTuple):
    """A host (IPv6 without brackets) and a port. host: empty for all interfaces of this machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, option: str, *, listening: bool = False) -> Address:
    """Parse an address HOST:PORT.

    Args:
        text: The address; an IPv6 host is in brackets.
        option: Name of the command-line option, for error messages.
        listening: Whether the host may be left out, and the port may be 0 (any free port).

    Raises:
        DeviceError: `text` is not an address.

    """
    if "://" in text or "/" in text:
        raise DeviceError(f"{option} {text}: write HOST:PORT, without {text.partition('://')[0]}:// and without a path")
    host, colon, port = text.rpartition(":")
    if not colon or not port or (":" in host and not host.startswith("[")):
        inside = " (an IPv6 address in brackets, as in [::1]:7443)" if ":" in host else ""
        raise DeviceError(f"{option} {text}: the port is missing: write HOST:PORT, as in pc.local:7443{inside}")
    if not (port.isascii() and port.isdecimal()) or not (0 if listening else 1) <= int(port) <= LARGEST_PORT:
        least = 0 if listening else 1
        raise DeviceError(f"{option} {text}: a port is a number from {least} to {LARGEST_PORT}, not {port}")
    if host or not listening:
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        require_host(host, f"{option} {text}")
    return Address(host, int(port))


def require_host(host: str, what: str) -> None:
    """Raise DeviceError, beginning with `what`, unless `host` is an IP address or a name that certificates can hold."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.partition("%")[0])
        return
    if not host.isascii():
        with contextlib.suppress(UnicodeError):
            ascii_name = host.encode("idna").decode()
            raise DeviceError(f"{what}: names in certificates are ASCII: use {ascii_name}, or the IP address")
    if not HOST_NAME.fullmatch(host) or len(host) > LONGEST_HOST:
        raise DeviceError(f"{what}: {host or 'nothing'} is neither a host name nor an IP address")


def resolve(address: Address) -> str:
    """Resolve `address` with the system's resolver, and return it as a target for gRPC.

    gRPC's own resolver uses DNS only; names such as ``pc.local`` need mDNS, which the system's resolver supports.
    Raises OSError if the host is not found.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a name that IDNA cannot encode
        raise OSError(f"{address.host} is not a valid host name") from error
    family = found[0][0]  # the system sorts addresses by preference, those that it can reach first
    if family == socket.AF_INET6:
        hosts = [socket.getnameinfo(place[4], socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0] for place in found
                 if place[0] == family]  # fmt: skip
        return "ipv6:" + ",".join(f"[{host.replace('%', '%25')}]:{address.port}" for host in dict.fromkeys(hosts))
    hosts = [str(place[4][0]) for place in found if place[0] == family]
    return "ipv4:" + ",".join(f"{host}:{address.port}" for host in dict.fromkeys(hosts))


class HeldPort:
    """Reserves a port for a server that starts later: no other process can take it before :meth:`release`.

    Raises DeviceError if the port is in use, or the host is not an address of this machine.
    """

    def __init__(self, address: Address, option: str) -> None:
        self._sockets: list[socket.socket] = []
        missing: OSError | None = None
        try:
            for family, kind, protocol, _, place in self._places(address):
                try:
                    self._sockets.append(self._listening(family, kind, protocol, place))
                except OSError as error:
                    if error.errno not in NO_SUCH_ADDRESS:
                        raise
                    missing = error  # the name may have another address that this machine does use
            if missing is not None and not self._sockets:
                raise missing
        except OSError as error:
            self.release()
            raise DeviceError(f"{option} {address}: cannot listen there: {error.strerror or error}") from error

    @staticmethod
    def _places(address: Address) -> list[Any]:
        if address.port == 0:  # any free port: nothing to reserve
            return []
        return socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)

    @staticmethod
    def _listening(family: int, kind: int, protocol: int, place: Any) -> socket.socket:
        held = socket.socket(family, kind, protocol)
        try:
            if family == socket.AF_INET6:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
            held.bind(place)
            held.listen(1)  # with SO_REUSEADDR, a port that is only bound can be bound by others too
        except OSError:
            held.close()
            raise
        return held

    def release(self) -> None:
        """Release the port; a second call has no effect."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()
