"""How frames get from a device to a server and back: one interface, and its implementation within a process."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

from .messages import LONGEST_TEXT, Header, InOrder, Message, Reason, Refusal, RefusedError, pack, payload, unpack

MOST_WAITING = 4  # frames in each direction; a sender waits for the receiver beyond
SEND_SECONDS = 30.0
REFUSAL_SECONDS = 1.0


class ClosedError(Exception):
    """The conversation is over: the other end left, or the network did.

    reason: set where the other end has refused something.
    """

    def __init__(self, text: str, reason: Reason | None = None) -> None:
        super().__init__(text)
        self.reason = reason


class Conversation(Protocol):
    """An open connection that carries frames (bytes) both ways, in order, each once or not at all.

    peer: the name of the other end, as its certificate says it; empty where nothing vouches for it.
    """

    peer: str

    def send(self, frame: bytes, seconds: float) -> None:
        """Hand a frame over; waits while too many are on their way. Raises TimeoutError or ClosedError."""

    def receive(self, seconds: float) -> bytes:
        """The next frame; raises TimeoutError, or ClosedError when there will be none."""

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """End it, at the second time without effect. reason: what the other end is told, where it did wrong."""

    def wire_bytes(self) -> tuple[int, int] | None:
        """Bytes that the connection has sent and received, framing and encryption included; None if not known."""


@dataclass
class Traffic:
    """What one end of conversations has sent and received: messages, and the bytes of their tensors and programs.

    wire_sent, wire_received: all bytes of the connections; None where a connection could not tell.
    """

    messages_sent: int = 0
    messages_received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    wire_sent: int | None = 0
    wire_received: int | None = 0

    def add(self, other: Traffic) -> None:
        """Add another conversation's."""
        self.messages_sent += other.messages_sent
        self.messages_received += other.messages_received
        self.payload_sent += other.payload_sent
        self.payload_received += other.payload_received
        self.wire_sent = _sum(self.wire_sent, other.wire_sent)
        self.wire_received = _sum(self.wire_received, other.wire_received)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


class Dialogue:
    """Messages over a conversation: numbers those that go out, checks those that come in, counts both.

    Several threads may send; one receives. `run` and `session` are empty until the server has named them.
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
        """From here on both ends say that they are of this run and session."""
        with self._sending:
            self.run, self.session = run, session
        self._incoming.run, self._incoming.session = run, session

    def send(self, message: Message, seconds: float = SEND_SECONDS) -> None:
        """Raises TimeoutError or ClosedError; after a timeout the conversation cannot be used any more."""
        with self._sending:
            frame = pack(Header(self.run, self.session, self._sent), message)
            self.conversation.send(frame, seconds)
            self._sent += 1
            self.traffic.messages_sent += 1
            self.traffic.payload_sent += payload(message)

    def receive(self, seconds: float) -> Message:
        """Raises TimeoutError, ClosedError, or RefusedError for what must not be heeded."""
        header, message = unpack(self.conversation.receive(seconds), self._largest)
        self._incoming.check(header)
        if isinstance(message, Refusal):
            raise ClosedError(f"the other end refused a message: {message.detail}", _reason(message))
        self.traffic.messages_received += 1
        self.traffic.payload_received += payload(message)
        return message

    def traffic_so_far(self) -> Traffic:
        """What this conversation has moved, which is still open."""
        sent, received = self.conversation.wire_bytes() or (None, None)
        return replace(self.traffic, wire_sent=sent, wire_received=received)

    def first(self, seconds: float) -> tuple[Header, Message]:
        """A device's first message, whose run and session the caller judges."""
        header, message = unpack(self.conversation.receive(seconds), self._largest)
        if header.sequence != 0 or header.session:
            raise RefusedError(Reason.OUT_OF_ORDER, "a conversation begins with message 0 and without a session")
        self._incoming.next = 1
        self.traffic.messages_received += 1
        return header, message

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """End the conversation, and count what the connection has moved.

        reason: what is told to the other end first.
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
        """Waits for a free place; raises TimeoutError or ClosedError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or len(self._frames) < self._most, seconds):
                raise TimeoutError(f"nobody took a message within {seconds:g} s")
            if self._closed:
                raise ClosedError(str(self._closed), self._closed.reason)
            self._frames.append(frame)
            self._changed.notify_all()

    def get(self, seconds: float) -> bytes:
        """What was put before the end still comes; raises TimeoutError or ClosedError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._frames, seconds):
                raise TimeoutError(f"no message within {seconds:g} s")
            if not self._frames:
                assert self._closed is not None
                raise ClosedError(str(self._closed), self._closed.reason)
            self._changed.notify_all()
            return self._frames.popleft()

    def close(self, why: ClosedError) -> None:
        """No frame is taken any more; only the first call says why."""
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
        """The frames: there is nothing around them here."""
        return self._moved[0], self._moved[1]


def in_process(device: str) -> tuple[InProcess, InProcess]:
    """Both ends of a conversation: that of the device of this name, and the server's."""
    up, down = Inbox(), Inbox()
    return InProcess("", down, up), InProcess(device, up, down)
