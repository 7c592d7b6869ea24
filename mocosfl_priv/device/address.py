"""HOST:PORT as people write it: checked before anything else happens, and found through the system's resolver."""

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
    """A host, without the brackets of IPv6, and a port. host: empty for every interface of this machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, option: str, *, listening: bool = False) -> Address:
    """The address that `text` says; DeviceError, in one line with the name of the `option`, where it says none.

    listening: the host may be left out, and the port be 0 for any free one.
    """
    if "://" in text or "/" in text:
        raise DeviceError(f"{option} {text}: write HOST:PORT, without {text.partition('://')[0]}:// and without a path")
    host, colon, port = text.rpartition(":")
    if not colon or not port or (":" in host and not host.startswith("[")):
        inside = " (an IPv6 address in brackets, as in [::1]:7443)" if ":" in host else ""
        raise DeviceError(f"{option} {text}: the port is missing: write HOST:PORT, as in pc.local:7443{inside}")
    if not (port.isascii() and port.isdecimal()) or not (0 if listening else 1) <= int(port) <= LARGEST_PORT:
        least = 0 if listening else 1
        raise DeviceError(f"{option} {text}: a port is a number from {least} to {LARGEST_PORT}, and {port} is none")
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
        raise DeviceError(f"{what}: {host or 'nothing'} is neither a host's name nor an IP address")


def resolve(address: Address) -> str:
    """`address` as gRPC's target, with the addresses that this system's resolver finds; OSError where it finds none.

    gRPC's resolver asks DNS only; names such as ``pc.local`` are known to mDNS, which the system asks.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a name that IDNA cannot encode
        raise OSError(f"{address.host} is no host's name") from error
    family = found[0][0]  # the system puts first what it can reach
    if family == socket.AF_INET6:
        hosts = [socket.getnameinfo(place[4], socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0] for place in found
                 if place[0] == family]  # fmt: skip
        return "ipv6:" + ",".join(f"[{host.replace('%', '%25')}]:{address.port}" for host in dict.fromkeys(hosts))
    hosts = [str(place[4][0]) for place in found if place[0] == family]
    return "ipv4:" + ",".join(f"{host}:{address.port}" for host in dict.fromkeys(hosts))


class HeldPort:
    """A port to listen on, tried and kept from others until :meth:`release`, right before the server takes it.

    Raises DeviceError where the port is taken, or the host is not this machine's.
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
                    missing = error  # a name may have an IPv6 address that this machine does not use
            if missing is not None and not self._sockets:
                raise missing
        except OSError as error:
            self.release()
            raise DeviceError(f"{option} {address}: cannot listen there: {error.strerror or error}") from error

    @staticmethod
    def _places(address: Address) -> list[Any]:
        if address.port == 0:  # any free one: there is nothing to hold
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
            held.listen(1)  # a port that is bound only, another one may bind as well
        except OSError:
            held.close()
            raise
        return held

    def release(self) -> None:
        """Let go of it; at the second time without effect."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()
