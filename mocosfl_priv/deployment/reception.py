"""Where devices arrive: conversations with them, each in a thread of its own, and what the engine asks of them.

Every message is judged here, in the thread of its conversation. The engine gets arrays of the shape that it asked for,
or nothing; a conversation that brings anything else is ended with the reason, and the others do not notice.
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
FAREWELL_SECONDS = 10.0  # in which devices report and leave after the end
ENVELOPE_BYTES = 64 * 2**10  # of a message around its tensors, at most
SILENT_BEATS = 4  # heartbeats that may be missed

COUNTED = (*(column.name for column in fields(Traffic)), "steps_missed", "images")  # columns of a ledger

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Terms:
    """What holds for all devices of a run.

    run: its name, the same after a restart of the server. seed: decides which images devices draw, and their views.
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
    """Something that a device was asked for: smashed data of `shapes` "queries" and "keys", or weights by name.

    answer: the arrays once they are there. seconds: how long they took. lost: they will not come.
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
    """A device in conversation.

    serial: of the weights that it has. has_state: it kept momentum model and optimiser of its own since its last
    conversation. asked: what it has not answered yet; it is asked for nothing else until it has.
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
    """What is known of one client over all its conversations. images: how many it had last; 0 before the first."""

    name: str
    traffic: Traffic = field(default_factory=Traffic)
    report: Report = field(default_factory=Report)
    latencies: list[float] = field(default_factory=list)
    conversations: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    steps_missed: int = 0
    images: int = 0


class Reception:
    """Registers devices, hands the engine what they send, and keeps account.

    clients: the number of each device's client, by the name in its certificate. rows: the most that a device is asked
        for; what is larger is refused before it is read. largest_frame: bytes of such a message.
    trusting: names are not vouched for by certificates, so what a device says is believed; for a single machine only.
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
        maps = 2 * rows * (4 + 4) * int(np.prod(terms.program.smashed_shape))  # numbers, and at most as many scales
        self.largest_frame = max(3 * parameters, maps) + ENVELOPE_BYTES

    # In the threads of conversations.

    def attend(self, conversation: Conversation) -> None:
        """Talk with a device until the conversation ends; nothing that it sends is raised."""
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
            raise RefusedError(Reason.UNEXPECTED, f"a {type(message).__name__} before the registration")
        name = message.device if self._trusting else dialogue.conversation.peer
        if message.device not in ("", name) or name not in self._clients:
            raise RefusedError(Reason.WRONG_IDENTITY, f"{message.device[:80]!r} is not this device, or not of this run")
        if header.run not in ("", self.terms.run):
            raise RefusedError(Reason.OTHER_RUN, f"run {header.run[:80]!r} where this is {self.terms.run!r}")
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
                "%s came back with %d images, and had %d before: its folder or shard has changed, so what it draws "
                "from here on is other images than without the interruption",
                member.name, message.images, before,
            )  # fmt: skip
        if earlier is not None:
            earlier.dialogue.close(Reason.REPLACED, "this device has opened another conversation")
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
            raise RefusedError(Reason.UNEXPECTED, f"a {type(message).__name__} that was not asked for")
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

    # In the engine's thread.

    def idle(self) -> dict[int, Member]:
        """The devices that can be asked for something now, by client."""
        with self._changed:
            return {client: member for client, member in self._members.items() if member.asked is None}

    def wait_for_idle(self, clients: Iterable[int], least: int, seconds: float) -> bool:
        """Wait until `least` of these clients can be asked; False after `seconds`."""
        wanted = set(clients)

        def enough() -> bool:
            return sum(member.asked is None for c, member in self._members.items() if c in wanted) >= least

        with self._changed:
            return self._changed.wait_for(enough, seconds)

    def tell(self, member: Member, message: Message, seconds: float) -> bool:
        """Send something that has no answer; False, and the end of the conversation, where it cannot be sent."""
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
        """Send the message that `make` makes of a request's number; the answer is waited for with :meth:`wait`."""
        with self._changed:
            self._numbers += 1
            request = Request(self._numbers, member, shapes, kind, time.monotonic(), lost=member.gone)
            member.asked = request
        if not self.tell(member, make(request.number), seconds):
            request.lost = True
        return request

    def wait(self, requests: Sequence[Request], seconds: float) -> None:
        """Until all are answered or lost, or `seconds` have passed; what comes later is thrown away."""
        with self._changed:
            self._changed.wait_for(lambda: all(r.lost or r.answer is not None for r in requests), seconds)

    def ledger(self) -> np.ndarray:
        """What each client has cost so far, int64 (clients, 8), for a checkpoint: traffic, steps missed, its images.

        -1 where the wire's bytes are not known.
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
        """Count on from :meth:`ledger`, before any device is there; one of an older version has no images."""
        for account, row in zip(self.accounts.values(), ledger.tolist(), strict=True):
            counts = dict(zip(COUNTED, row, strict=False))
            account.images = counts.pop("images", 0)
            account.steps_missed = counts.pop("steps_missed")
            account.traffic = Traffic(**counts)
            if counts["wire_sent"] < 0 or counts["wire_received"] < 0:
                account.traffic.wire_sent = account.traffic.wire_received = None

    def finish(self) -> None:
        """Tell everybody that the run is over, take their last reports, and end all conversations."""
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
