"""The server's side of the communication with devices: registration, requests, validation and accounting.

Each connection ("conversation") with a device runs in its own thread, which validates every message. The training
engine gets arrays of the shape that it asked for, or nothing. A device that sends anything else is disconnected with
the reason; other devices are not affected.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np

from mocosfl_priv.device.codecs import Codec
from mocosfl_priv.device.messages import (
    Finish,
    Message,
    Reason,
    RefusedError,
    Register,
    Report,
    Smashed,
    Weights,
    Welcome,
)
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.device.transport import ClosedError, Conversation, Dialogue, Traffic

LOG = logging.getLogger("mocosfl-priv-server")
REGISTER_SECONDS = 30.0
FAREWELL_SECONDS = 10.0  # time for devices to send a last report and disconnect after the end
ENVELOPE_BYTES = 64 * 2**10  # largest size of a message without its tensors
SILENT_BEATS = 4  # a device that is silent for this number of heartbeat intervals is disconnected

COUNTED = (*(column.name for column in fields(Traffic)), "steps_missed", "images")  # columns of a ledger

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Terms:
    """The settings that are the same for all devices of a run.

    run: its name, the same after a restart of the server.
    program: the client that devices run.
    seed: decides which images devices draw, and how they are augmented.
    activations, gradients: codecs of smashed data and gradients.
    drop_partial: whether the rest of a pass over the images that no longer fills a batch is skipped.
    heartbeat_seconds: interval of the devices' heartbeats.
    """

    run: str
    program: ClientProgram
    seed: int
    activations: Codec = "fp32"
    gradients: Codec = "fp32"
    drop_partial: bool = False
    heartbeat_seconds: float = 5.0


@dataclass
class Request:
    """A request to a device, for smashed data ("queries" and "keys") or for weights.

    shapes: expected shapes of the arrays by name.
    kind: expected type of the answer.
    asked_at: time of the request, of the monotonic clock.
    answer: the arrays by name; None before they have arrived.
    seconds: how long the answer took.
    lost: whether it will never arrive.
    """

    number: int
    member: Member
    shapes: Shapes
    kind: type[Smashed] | type[Weights]
    asked_at: float
    answer: dict[str, np.ndarray] | None = None
    seconds: float = 0.0
    lost: bool = False


@dataclass
class Member:
    """A connected device.

    images: number of images that it holds.
    serial: serial number of the weights that it holds.
    has_state: whether it holds its momentum model and optimiser state, from an earlier connection or handed out.
    asked: the request that it has not answered yet; until then it gets no other.
    gone: whether it has disconnected.
    """

    client: int
    name: str
    dialogue: Dialogue
    images: int
    serial: int
    has_state: bool
    asked: Request | None = None
    gone: bool = False


@dataclass
class Account:
    """The record of one client over all its connections: traffic, last report, latencies and refusals.

    conversations: number of connections.
    refusals: number of refused messages by reason.
    steps_missed: steps whose deadline it missed.
    images: images that it held at its last connection; 0 before the first.
    """

    name: str
    traffic: Traffic = field(default_factory=Traffic)
    report: Report = field(default_factory=Report)
    latencies: list[float] = field(default_factory=list)
    conversations: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    steps_missed: int = 0
    images: int = 0


class Reception:
    """Registers devices, passes requests and answers between the engine and devices, and keeps accounts.

    Args:
        terms: Settings for all devices.
        clients: Index of each device's client, by the name in its certificate.
        rows: Largest number of queries in a request. Messages larger than `largest_frame` bytes, which follows from it,
            are refused unread.
        trusting: Whether to believe the names that devices give without certificates; for a single machine only.

    """

    def __init__(self, terms: Terms, clients: Mapping[str, int], rows: int, *, trusting: bool = False) -> None:
        self.terms = terms
        self.accounts = {client: Account(name) for name, client in sorted(clients.items())}
        self._clients = dict(clients)
        self._trusting = trusting
        self._program = terms.program.to_bytes()
        self._members: dict[int, Member] = {}
        self._sessions: dict[int, str] = {}
        self._changed = threading.Condition()
        self._numbers = 0
        self._finished = False
        parameters = 4 * sum(value.size for value in terms.program.parameters.values())
        maps = (
            2 * rows * (4 + 4) * int(np.prod(terms.program.smashed_shape))
        )  # 4 bytes a number, and at most as many scales of 4 bytes
        self.largest_frame = max(3 * parameters, maps) + ENVELOPE_BYTES

    # Methods that run in the threads of conversations.

    def attend(self, conversation: Conversation) -> None:
        """Serve a device until its connection ends. Invalid messages end the connection and raise nothing."""
        dialogue = Dialogue(conversation, self.largest_frame)
        member: Member | None = None
        who = conversation.peer or "a device"
        try:
            member = self._admit(dialogue)
            who = member.name
            while True:
                self._take(member, dialogue.receive(SILENT_BEATS * self.terms.heartbeat_seconds))
        except RefusedError as error:
            LOG.warning("%s: refused: %s", who, error)
            self._note_refusal(conversation.peer, error.reason)
            dialogue.close(error.reason, error.detail)
        except ClosedError as error:
            LOG.info("%s: %s", who, error)
        except TimeoutError as error:
            LOG.warning("%s: silent: %s", who, error)
        finally:
            dialogue.close()
            if member is not None:
                self._leave(member)

    def _admit(self, dialogue: Dialogue) -> Member:
        header, message = dialogue.first(REGISTER_SECONDS)
        if not isinstance(message, Register):
            raise RefusedError(Reason.UNEXPECTED, f"got a {type(message).__name__} before the registration")
        name = message.device if self._trusting else dialogue.conversation.peer
        if message.device not in ("", name) or name not in self._clients:
            raise RefusedError(
                Reason.WRONG_IDENTITY,
                f"the name {message.device[:80]!r} is not that of the certificate, or not a device of this run",
            )
        if header.run not in ("", self.terms.run):
            raise RefusedError(Reason.OTHER_RUN, f"got run {header.run[:80]!r}, but this is {self.terms.run!r}")
        client, session = self._clients[name], secrets.token_hex(8)
        holds_program = message.program_digest == self.terms.program.digest
        with self._changed:
            resumed = holds_program and message.resumes != "" and message.resumes == self._sessions.get(client)
            self._sessions[client] = session
        dialogue.run = header.run
        dialogue.send(
            Welcome(
                self.terms.run, session, client, self.terms.program.digest, b"" if holds_program else self._program,
                self.terms.activations, self.terms.gradients, self.terms.seed, self.terms.drop_partial,
                self.terms.heartbeat_seconds,
            )
        )  # fmt: skip
        dialogue.name(self.terms.run, session)
        serial = message.serial if resumed else 0
        member = Member(client, name, dialogue, message.images, serial, has_state=resumed)
        with self._changed:
            earlier = self._members.get(client)
            self._members[client] = member
            self.accounts[client].conversations += 1
            self._changed.notify_all()
            finished = self._finished
            before, self.accounts[client].images = self.accounts[client].images, message.images
        if before and message.images != before:
            LOG.warning(
                "%s reconnected with %d images, and had %d before: its folder or shard has changed, so from now on it "
                "draws different images than without the interruption",
                member.name, message.images, before,
            )  # fmt: skip
        if earlier is not None:
            earlier.dialogue.close(Reason.REPLACED, "this device has opened another connection")
        LOG.info("%s: client %d, %d images%s", member.name, client, member.images, ", resumed" if resumed else "")
        if finished:
            dialogue.send(Finish())
        return member

    def _take(self, member: Member, message: Message) -> None:
        if isinstance(message, Report):
            self.accounts[member.client].report = message
            return
        request = member.asked
        if request is None or not isinstance(message, request.kind) or message.request != request.number:
            raise RefusedError(Reason.UNEXPECTED, f"got a {type(message).__name__} that was not requested")
        if isinstance(message, Smashed):
            codec = self.terms.activations
            answer = {
                "queries": message.queries.array(request.shapes["queries"], codec),
                "keys": message.keys.array(request.shapes["keys"], codec),
            }
        else:
            answer = message.arrays(request.shapes)
        with self._changed:
            request.answer, request.seconds = answer, time.monotonic() - request.asked_at
            member.asked = None
            self._changed.notify_all()

    def _leave(self, member: Member) -> None:
        with self._changed:
            member.gone = True
            if member.asked is not None:
                member.asked.lost = True
            if self._members.get(member.client) is member:
                del self._members[member.client]
            self.accounts[member.client].traffic.add(member.dialogue.traffic)
            self._changed.notify_all()

    def _note_refusal(self, name: str, reason: Reason) -> None:
        client = self._clients.get(name)
        if client is not None:
            with self._changed:
                counts = self.accounts[client].refusals
                counts[reason.name.lower()] = counts.get(reason.name.lower(), 0) + 1

    # Methods that run in the engine's thread.

    def idle(self) -> dict[int, Member]:
        """Return the connected devices without an open request, by client."""
        with self._changed:
            return {client: member for client, member in self._members.items() if member.asked is None}

    def wait_for_idle(self, clients: Iterable[int], least: int, seconds: float) -> bool:
        """Wait until `least` of `clients` are connected without an open request; returns False after `seconds`."""
        wanted = set(clients)

        def enough() -> bool:
            return sum(member.asked is None for c, member in self._members.items() if c in wanted) >= least

        with self._changed:
            return self._changed.wait_for(enough, seconds)

    def tell(self, member: Member, message: Message, seconds: float) -> bool:
        """Send a message that has no answer. If it cannot be sent, disconnect the device and return False."""
        try:
            member.dialogue.send(message, seconds)
        except (ClosedError, TimeoutError) as error:
            LOG.warning("%s: %s", member.name, error)
            member.dialogue.close()
            return False
        return True

    def ask(
        self, member: Member, make: Callable[[int], Message], kind: type[Smashed] | type[Weights], shapes: Shapes,
        seconds: float,
    ) -> Request:  # fmt: skip
        """Send a request, and return it without waiting for its answer (see :meth:`wait`).

        Args:
            member: The device.
            make: Makes the message from the number of the request.
            kind: Expected type of the answer.
            shapes: Expected shapes of the arrays in the answer, by name.
            seconds: Time limit for sending.

        """
        with self._changed:
            self._numbers += 1
            request = Request(self._numbers, member, shapes, kind, time.monotonic(), lost=member.gone)
            member.asked = request
        if not self.tell(member, make(request.number), seconds):
            request.lost = True
        return request

    def wait(self, requests: Sequence[Request], seconds: float) -> None:
        """Wait until all `requests` are answered or lost, or `seconds` have passed."""
        with self._changed:
            self._changed.wait_for(lambda: all(r.lost or r.answer is not None for r in requests), seconds)

    def ledger(self) -> np.ndarray:
        """Return the accounts of all clients for a checkpoint, int64 (clients, 8), with the columns `COUNTED`.

        -1 stands for unknown numbers of bytes on the wire.
        """
        with self._changed:
            members = dict(self._members)
            rows = []
            for client, account in self.accounts.items():
                traffic = replace(account.traffic)
                if client in members:
                    traffic.add(members[client].dialogue.traffic_so_far())
                counts = [-1 if count is None else count for count in astuple(traffic)]
                rows.append([*counts, account.steps_missed, account.images])
        return np.array(rows, np.int64)

    def load_ledger(self, ledger: np.ndarray) -> None:
        """Restore the accounts that :meth:`ledger` returned, before any device connects.

        A ledger of an older version lacks the column of images.
        """
        for account, row in zip(self.accounts.values(), ledger.tolist(), strict=True):
            counts = dict(zip(COUNTED, row, strict=False))
            account.images = counts.pop("images", 0)
            account.steps_missed = counts.pop("steps_missed")
            account.traffic = Traffic(**counts)
            if counts["wire_sent"] < 0 or counts["wire_received"] < 0:
                account.traffic.wire_sent = account.traffic.wire_received = None

    def finish(self) -> None:
        """Tell all devices that the run is over, wait for their last reports, and end all connections."""
        with self._changed:
            self._finished = True
            members = list(self._members.values())
        for member in members:
            self.tell(member, Finish(), FAREWELL_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: not self._members, FAREWELL_SECONDS)
            members = list(self._members.values())
        for member in members:
            member.dialogue.close()
