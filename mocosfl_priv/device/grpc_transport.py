"""Connections over gRPC: one bidirectional stream per device, HTTP/2 over mutual TLS.

Frames are passed on as bytes and not as parsed messages: the module `messages` validates them, and refuses invalid
ones with a typed reason. Unencrypted connections are only allowed within one machine, for tests and experiments.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from .address import parse, resolve
from .connection import Address, moved_bytes
from .errors import DeviceError
from .messages import LARGEST_FRAME, Reason
from .transport import ClosedError, Conversation, Inbox
from .wire import split_pb2

SERVICE = split_pb2.DESCRIPTOR.services_by_name["Split"].full_name
METHOD = "Converse"
FOREVER = threading.TIMEOUT_MAX
CLOSE_SECONDS = 5.0  # time for the other end to close the connection too
PING_MILLISECONDS = 20_000  # after this long without data, each end checks that the other is still reachable
SPARE_STREAMS = 8  # for devices that reconnect before their old stream has ended

STATUS = {
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.OTHER_VERSION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OTHER_RUN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OTHER_SESSION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.REPLAYED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OUT_OF_ORDER: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNEXPECTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.WRONG_SHAPE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.WRONG_DTYPE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NOT_FINITE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Reason.OVERSIZE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.WRONG_IDENTITY: grpc.StatusCode.PERMISSION_DENIED,
    Reason.REPLACED: grpc.StatusCode.ABORTED,
}


@dataclass(frozen=True)
class Certificates:
    """PEM blocks: the certificate authority that both sides trust, and this side's certificate and key."""

    authority: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def read(cls, folder: Path, name: str) -> Certificates:
        """Read ``ca.pem``, ``<name>.pem`` and ``<name>.key`` in `folder`; raises DeviceError if one cannot be read."""
        try:
            return cls(*((folder / file).read_bytes() for file in ("ca.pem", f"{name}.pem", f"{name}.key")))
        except OSError as error:
            raise DeviceError(f"certificates: {error.filename} cannot be read: {error.strerror}") from error


def connect(server: str, certificates: Certificates | None) -> Conversation:
    """Open a connection to `server`, HOST:PORT; without certificates unencrypted, on this machine only.

    The host is resolved by the system, and the server's certificate must have the name in `server`. Raises DeviceError
    if `server` is not a valid address, and ClosedError if its host is not found. Other connection errors raise
    ClosedError at the first use of the connection.
    """
    if certificates is None:
        require_loopback(server)
    address = parse(server, "--server")
    try:
        target = resolve(address)
    except OSError as error:
        raise ClosedError(f"host {address.host} not found: {error.strerror or error}") from error
    name = address.host.partition("%")[0]  # without the interface of a link-local address
    options = [
        *_options(LARGEST_FRAME),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.default_authority", name),
    ]
    if certificates is None:
        channel = grpc.insecure_channel(target, options)
    else:
        credentials = grpc.ssl_channel_credentials(certificates.authority, certificates.key, certificates.certificate)
        channel = grpc.secure_channel(target, credentials, [*options, ("grpc.ssl_target_name_override", name)])
    return _DeviceEnd(channel, address.port)


class _End:
    """The common part of both ends: two bounded queues between gRPC's threads and ours."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.incoming, self.outgoing = Inbox(), Inbox()

    def send(self, frame: bytes, seconds: float) -> None:
        """See :class:`Conversation`."""
        self.outgoing.put(frame, seconds)

    def receive(self, seconds: float) -> bytes:
        """See :class:`Conversation`."""
        return self.incoming.get(seconds)

    def pump(self, frames: Iterator[bytes]) -> ClosedError:
        """Move frames from gRPC to the queue until there are no more; returns the reason.

        It blocks while the queue is full, so that gRPC's flow control slows the sender down.
        """
        why = ClosedError("the other end has left")
        try:
            for frame in frames:
                self.incoming.put(frame, FOREVER)
        except ClosedError as error:
            why = error
        except grpc.RpcError as error:
            why = _closed(error)
        self.incoming.close(why)
        return why


class _DeviceEnd(_End):
    def __init__(self, channel: Any, port: int) -> None:
        super().__init__("")
        self._channel = channel
        self._port = port
        self._moved: tuple[int, int] | None = None
        self._call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._requests())
        self._pump = threading.Thread(target=self._receive, daemon=True, name="receive")
        self._pump.start()

    def _receive(self) -> None:
        self.outgoing.close(self.pump(self._call))  # the stream has ended, so nothing can be sent

    def _requests(self) -> Iterator[bytes]:
        try:
            while True:
                yield self.outgoing.get(FOREVER)
        except ClosedError:
            return

    def close(self, reason: Reason | None = None, detail: str = "") -> None:  # noqa: ARG002
        """See :class:`Conversation`; the reason was sent as a message before, since a gRPC client sends no status."""
        self.outgoing.close(ClosedError("this end has left"))
        self._pump.join(CLOSE_SECONDS)
        self._moved = self.wire_bytes()
        self._call.cancel()
        self.incoming.close(ClosedError("this end has left"))
        self._channel.close()

    def wire_bytes(self) -> tuple[int, int] | None:
        """See :class:`Conversation`."""
        return self._moved or moved_bytes(lambda address: address.port == self._port)


class _ServerEnd(_End):
    def __init__(self, context: Any) -> None:
        names = context.auth_context().get("x509_common_name", [])
        super().__init__(names[0].decode("utf-8", "replace") if names else "")
        self._address = Address.of_grpc(context.peer())
        self._context = context

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """See :class:`Conversation`."""
        self.outgoing.close(ClosedError(detail, reason))
        self.incoming.close(ClosedError("this end has left"))

    def wire_bytes(self) -> tuple[int, int] | None:
        """See :class:`Conversation`."""
        return moved_bytes(lambda address: address == self._address)

    def replies(self) -> Iterator[bytes]:
        """The frames for gRPC to send; if the device was refused, the stream ends with a status that says why."""
        try:
            while True:
                yield self.outgoing.get(FOREVER)
        except ClosedError as error:
            if error.reason is not None:
                self._context.abort(STATUS[error.reason], f"{error.reason.name}: {error}")


class GrpcServer:
    """Listens for devices, and calls `attend` with each connection in its own thread.

    Args:
        listen: HOST:PORT; port 0 for any free port.
        certificates: None for no encryption, on a loopback address only.
        attend: Serves one connection.
        most: Largest number of devices at a time.
        largest_frame: Largest size of a message in bytes.

    Raises:
        DeviceError: It cannot listen on this address.

    """

    def __init__(
        self, listen: str, certificates: Certificates | None, attend: Callable[[Conversation], None], *, most: int,
        largest_frame: int,
    ) -> None:  # fmt: skip
        self._attend = attend
        self._server = grpc.server(
            ThreadPoolExecutor(most + SPARE_STREAMS, "grpc"),
            options=[*_options(2 * largest_frame), ("grpc.so_reuseport", 0)],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._converse)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        address = parse(listen, "--listen", listening=True)
        try:
            if certificates is None:
                require_loopback(listen)
            listen = str(address) if address.host else f"[::]:{address.port}"
            if certificates is None:
                self.port: int = self._server.add_insecure_port(listen)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(certificates.key, certificates.certificate)], certificates.authority, require_client_auth=True
                )
                self.port = self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise DeviceError(f"cannot listen on {listen}: {error}") from error

    def start(self) -> None:
        """Start to accept devices."""
        self._server.start()

    def stop(self, seconds: float = CLOSE_SECONDS) -> None:
        """Accept no more devices, and wait up to `seconds` for open connections to end."""
        self._server.stop(seconds).wait(seconds + CLOSE_SECONDS)

    def _converse(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        end = _ServerEnd(context)
        context.add_callback(end.close)
        threading.Thread(target=end.pump, args=(frames,), daemon=True, name="receive").start()
        threading.Thread(target=self._talk, args=(end,), daemon=True, name="conversation").start()
        yield from end.replies()

    def _talk(self, end: _ServerEnd) -> None:
        try:
            self._attend(end)
        finally:
            end.close()


def require_loopback(address: str) -> None:
    """Raise DeviceError unless `address`, HOST:PORT, is a loopback address."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside:
        raise DeviceError(
            f"plain text is for loopback addresses only, and {host or 'every interface'} is not one: use TLS"
        )


def _options(largest_frame: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", largest_frame),
        ("grpc.max_send_message_length", LARGEST_FRAME),
        ("grpc.keepalive_time_ms", PING_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", PING_MILLISECONDS),
        ("grpc.http2.max_pings_without_data", 0),  # a device may compute for long
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_MILLISECONDS // 2),
    ]


def _closed(error: Any) -> ClosedError:
    """A gRPC error as a ClosedError, with the server's reason if it gave one."""
    details = str(error.details() or "") if hasattr(error, "details") else str(error)
    name = details.partition(":")[0]
    reason = Reason[name] if name in Reason.__members__ else None
    code = error.code().name.lower() if hasattr(error, "code") else "error"
    return ClosedError(f"{code}: {details}", reason)
