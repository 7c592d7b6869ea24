"""Bytes that a TCP connection of this process has sent and received, as counted by Linux.

gRPC does not report the bytes of its framing and of TLS. Linux counts them for every socket (TCP_INFO), including
retransmissions, but without the headers of TCP and IP.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

DESCRIPTORS = Path("/proc/self/fd")
RECEIVED, SENT = 128, 200  # offsets of tcpi_bytes_received and tcpi_bytes_sent in struct tcp_info (linux/tcp.h)
INFO_BYTES = 208
COUNTER = struct.Struct("=Q")
MAPPED = "::ffff:"  # prefix of an IPv4 address on a socket for both IPv4 and IPv6
FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Address(NamedTuple):
    """The remote address of a connection."""

    host: str
    port: int

    @classmethod
    def of_grpc(cls, peer: str) -> Address:
        """Parse gRPC's form of an address, ``ipv4:127.0.0.1:1234`` or ``ipv6:%5B::1%5D:1234``."""
        host, _, port = unquote(peer).partition(":")[2].rpartition(":")
        return cls(host.strip("[]"), int(port) if port.isdecimal() else 0)


def moved_bytes(is_it: Callable[[Address], bool]) -> tuple[int, int] | None:
    """Return the bytes sent and received by the connection whose remote address satisfies `is_it`.

    Returns None if not exactly one connection does, or if the system does not count bytes.
    """
    found = [counted for address, counted in _connections() if is_it(address)]
    return found[0] if len(found) == 1 else None


def _connections() -> list[tuple[Address, tuple[int, int]]]:
    if not hasattr(socket, "TCP_INFO") or not DESCRIPTORS.is_dir():
        return []
    found = []
    for entry in os.listdir(DESCRIPTORS):  # noqa: PTH208 - names only; descriptors may be closed meanwhile
        with suppress(OSError, struct.error):
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                with socket.socket(fileno=os.dup(int(entry))) as copy:
                    if copy.family in FAMILIES and copy.type == socket.SOCK_STREAM:
                        host, port = copy.getpeername()[:2]
                        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
                        counted = (COUNTER.unpack_from(info, SENT)[0], COUNTER.unpack_from(info, RECEIVED)[0])
                        found.append((Address(host.removeprefix(MAPPED), port), counted))
    return found
