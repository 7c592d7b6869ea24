"""The interface of a connection between device and server, messages over it, and an in-process implementation."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

from .messages import LONGEST_TEXT, Header, InOrder, Message, Reason, Refusal, RefusedError, pack, payload, unpack

MOST_WAITING = 4  # frames that may wait in each direction before the sender blocks
SEND_SECONDS = 30.0
REFUSAL_SECONDS = 1.0


class ClosedError(Exception):
    """The connection has ended, because the other end closed it or the network failed.

    reason: why the other end refused a message, if it did.
    """

    def __init__(self, text: str, reason: Reason | None = None) -> None:
        super().__init__(text)
        self.reason = reason


class Conversation(Protocol):
    """An open connection that carries frames (bytes) both ways, in order, each at most once.

    peer: the name in the other end's certificate; empty without a certificate.
    """

    peer: str

    def send(self, frame: bytes, seconds: float) -> None:
        """Send a frame; blocks while too many frames wait. Raises TimeoutError or ClosedError."""

    def receive(self, seconds: float) -> bytes:
        """Return the next frame; raises TimeoutError, or ClosedError if there will be none."""

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """End the connection; a second call has no effect. reason, detail: sent to the other end if it is refused."""

    def wire_bytes(self) -> tuple[int, int] | None:
        """Return the bytes sent and received, including framing and encryption; None if unknown."""


@dataclass
class Traffic:
    """What one end has sent and received, over one or several connections.

    payload_sent, payload_received: bytes of tensors and programs.
    wire_sent, wire_received: all bytes of the connections; None if unknown for a connection.
    """

    messages_sent: int = 0
    messages_received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    wire_sent: int | None = 0
    wire_received: int | None = 0

    def add(self, other: Traffic) -> None:
        """Add the traffic of another connection."""
        self.messages_sent += other.messages_sent
        self.messages_received += other.messages_received
        self.payload_sent += other.payload_sent
        self.payload_received += other.payload_received
        self.wire_sent = _sum(self.wire_sent, other.wire_sent)
        self.wire_received = _sum(self.wire_received, other.wire_received)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


class Dialogue:
    """Sends and receives messages over a conversation: numbers outgoing, checks incoming, and counts all messages.

    Several threads may send, but only one may receive. `run` and `session` are empty until the server has named them.
    """

    def __init__(self, conversation: Conversation, largest_frame: int, run: str = "") -> None:
        self.conversation = conversation
        self.run = run
        self.session = ""
        self.traffic = Traffic(wire_sent=None, wire_received=None)
        self._largest = largest_frame
        self._sent = 0
        self._incoming = InOrder(run, "")
        self._sending = threading.Lock()

    def name(self, run: str, session: str) -> None:
        """Set run and session, which all further messages in both directions must have."""
        with self._sending:
            self.run, self.session = run, session
        self._incoming.run, self._incoming.session = run, session

    def send(self, message: Message, seconds: float = SEND_SECONDS) -> None:
        """Send a message; raises TimeoutError or ClosedError. After a timeout the connection can no longer be used."""
        with self._sending:
            frame = pack(Header(self.run, self.session, self._sent), message)
            self.conversation.send(frame, seconds)
            self._sent += 1
            self.traffic.messages_sent += 1
            self.traffic.payload_sent += payload(message)

    def receive(self, seconds: float) -> Message:
        """Return the next message; raises TimeoutError, ClosedError, or RefusedError for an invalid message."""
        header, message = unpack(self.conversation.receive(seconds), self._largest)
        self._incoming.check(header)
        if isinstance(message, Refusal):
            raise ClosedError(f"the other end refused a message: {message.detail}", _reason(message))
        self.traffic.messages_received += 1
        self.traffic.payload_received += payload(message)
        return message

    def traffic_so_far(self) -> Traffic:
        """Return the traffic of this connection while it is still open."""
        sent, received = self.conversation.wire_bytes() or (None, None)
        return replace(self.traffic, wire_sent=sent, wire_received=received)

    def first(self, seconds: float) -> tuple[Header, Message]:
        """Return a device's first message with its header, whose run the caller must check."""
        header, message = unpack(self.conversation.receive(seconds), self._largest)
        if header.sequence != 0 or header.session:
            raise RefusedError(Reason.OUT_OF_ORDER, "a conversation begins with message 0 and without a session")
        self._incoming.next = 1
        self.traffic.messages_received += 1
        return header, message

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """End the connection, and count its bytes.

        reason, detail: sent to the other end first, if given.
        """
        if reason is not None:
            with contextlib.suppress(ClosedError, TimeoutError):
                self.send(Refusal(reason, detail[:LONGEST_TEXT]), REFUSAL_SECONDS)
        before = self.conversation.wire_bytes()
        self.conversation.close(reason, detail)
        moved = self.conversation.wire_bytes() or before  # the connection may be gone by now
        if moved is not None:
            self.traffic.wire_sent, self.traffic.wire_received = moved


def _reason(refusal: Refusal) -> Reason | None:
    return Reason(refusal.reason) if refusal.reason in set(Reason) else None


class Inbox:
    """A bounded queue of frames that either end can close."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._frames: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closed: ClosedError | None = None

    def put(self, frame: bytes, seconds: float) -> None:
        """Add a frame, and wait for a free place if needed; raises TimeoutError or ClosedError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or len(self._frames) < self._most, seconds):
                raise TimeoutError(f"the other end accepted no message within {seconds:g} s")
            if self._closed:
                raise ClosedError(str(self._closed), self._closed.reason)
            self._frames.append(frame)
            self._changed.notify_all()

    def get(self, seconds: float) -> bytes:
        """Return the next frame, also after closing while frames are left; raises TimeoutError or ClosedError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._frames, seconds):
                raise TimeoutError(f"no message within {seconds:g} s")
            if not self._frames:
                assert self._closed is not None
                raise ClosedError(str(self._closed), self._closed.reason)
            self._changed.notify_all()
            return self._frames.popleft()

    def close(self, why: ClosedError) -> None:
        """Accept no more frames; the error of the first call is raised from then on."""
        with self._changed:
            self._closed = self._closed or why
            self._changed.notify_all()


class InProcess:
    """One end of a conversation between two threads of this process."""

    def __init__(self, peer: str, incoming: Inbox, outgoing: Inbox) -> None:
        self.peer = peer
        self._incoming = incoming
        self._outgoing = outgoing
        self._moved = [0, 0]

    def send(self, frame: bytes, seconds: float) -> None:
        """See :class:`Conversation`."""
        self._outgoing.put(frame, seconds)
        self._moved[0] += len(frame)

    def receive(self, seconds: float) -> bytes:
        """See :class:`Conversation`."""
        frame = self._incoming.get(seconds)
        self._moved[1] += len(frame)
        return frame

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """See :class:`Conversation`."""
        self._outgoing.close(ClosedError(detail or "the other end has left", reason))
        self._incoming.close(ClosedError("this end has left"))

    def wire_bytes(self) -> tuple[int, int] | None:
        """Return the bytes of the frames; there is no further framing within a process."""
        return self._moved[0], self._moved[1]


def in_process(device: str) -> tuple[InProcess, InProcess]:
    """Return both ends of a connection: that of the device with this name, and the server's."""
    up, down = Inbox(), Inbox()
    return InProcess("", down, up), InProcess(device, up, down)
