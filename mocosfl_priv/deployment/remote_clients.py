"""Devices as participants of a training, together with simulated clients or alone.

The server keeps a row of the client bank for every device, which holds the last known state of its models. Between two
FedAvg rounds the models on the device are newer than its row; the server fetches them for FedAvg, a validation or a
checkpoint. FedAvg writes its result into the rows, and a device is sent its row before its next request. The same rule
covers devices that were always connected, that reconnect, and that lost their state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mocosfl_priv.deployment.reception import Member, Reception, Request
from mocosfl_priv.device.messages import Ask, Draw, Gradient, Packed, Smashed, Weights
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.training.clients import ClientBank
from mocosfl_priv.training.message_count import rows_per_image
from mocosfl_priv.training.participants import Sent, Simulated
from mocosfl_priv.training.sampling import ClientBatch
from mocosfl_priv.training.state import State

LOG = logging.getLogger("mocosfl-priv-server")
ONLINE, KEY, VELOCITY = "online", "key", "velocity"


@dataclass(frozen=True)
class Patience:
    """How long a server waits, in seconds.

    answers: for the answers of a step's devices.
    anybody: for any device at all, before the run fails.
    """

    answers: float = 10.0
    anybody: float = 600.0


class RemoteClients:
    """The participants of a training with devices; see :class:`mocosfl_priv.training.participants.Participants`.

    A step waits for its devices until the deadline, and continues with those that answered: the loss is the mean over
    their images. A device that is late gets its next request when it has answered.

    Args:
        simulated: All clients, of which those in `remote` are not simulated.
        reception: The connections to the devices.
        remote: Indices of the clients that are devices.
        least: Devices that must be connected before the first step.
        patience: How long to wait.

    """

    def __init__(
        self, simulated: Simulated, reception: Reception, remote: Iterable[int], least: int, patience: Patience
    ) -> None:
        self._simulated = simulated
        self._reception = reception
        self._remote = frozenset(remote)
        self._patience = patience
        self._awaited = least
        self._training = simulated.training
        self._rows_per_image = rows_per_image(self._training, not self.trainable)
        self._smashed_shape = reception.terms.program.smashed_shape
        self._drawn = torch.zeros(len(simulated.clients.steps_taken), dtype=torch.long)  # number of images by client
        self._serials = dict.fromkeys(self._remote, 0)
        self._fresh: dict[int, set[str]] = {client: {ONLINE, KEY, VELOCITY} for client in self._remote}
        self._rewritten: set[int] = set()  # clients whose row differs from the initial parameters in the program
        self._answers: dict[int, Request] = {}

    @property
    def trainable(self) -> bool:
        """Whether clients learn."""
        return self._simulated.clients.trainable

    @property
    def rows_per_image(self) -> int:
        """Number of queries per image; there are as many keys."""
        return self._rows_per_image

    @property
    def drawn(self) -> list[int]:
        """Number of images that each client has drawn; 0 for simulated clients."""
        drawn: list[int] = self._drawn.tolist()
        return drawn

    def present(self, batch: ClientBatch, step: int, learning: bool) -> ClientBatch:  # noqa: ARG002
        """Request the messages of the pool's devices, and return the part of `batch` whose clients answered.

        Raises RunFailedError if no client answers within `Patience.anybody`.
        """
        wanted = {c: size for c, size in zip(batch.pool.tolist(), batch.sizes, strict=True) if c in self._remote}
        self._await_first()
        until = time.monotonic() + self._patience.anybody
        while True:
            self._answers = self._draw(wanted, step)
            missing = set(wanted) - set(self._answers)
            if len(missing) < len(batch.pool):
                break
            if not self._reception.wait_for_idle(missing, 1, until - time.monotonic()):
                raise RunFailedError(f"no device has answered for {self._patience.anybody:g} s")
        for client in missing:
            self._reception.accounts[client].steps_missed += 1
        if missing:
            LOG.warning("step %d continues without %d of %d clients", step, len(missing), len(batch.pool))
        return batch.without(missing)

    def _await_first(self) -> None:
        """Wait for devices before the first step of this process.

        This is not done earlier because a training that was finished before a restart needs no devices.
        """
        if self._awaited and not self._reception.wait_for_idle(self._remote, self._awaited, self._patience.anybody):
            there = len(self._reception.idle())
            raise RunFailedError(f"{there} of {self._awaited} devices connected within {self._patience.anybody:g} s")
        self._awaited = 0

    def _draw(self, wanted: Mapping[int, int], step: int) -> dict[int, Request]:
        idle = self._reception.idle()
        requests: dict[int, Request] = {}
        for client, size in wanted.items():
            if client in idle and self._bring_up_to_date(idle[client]):
                shape = (size * self._rows_per_image, *self._smashed_shape)
                requests[client] = self._reception.ask(
                    idle[client],
                    partial(Draw, step=step, offset=int(self._drawn[client]), count=size),
                    Smashed,
                    {"queries": shape, "keys": shape},
                    self._patience.answers,
                )
        self._reception.wait(list(requests.values()), self._patience.answers)
        answered = {client: request for client, request in requests.items() if request.answer is not None}
        for client, request in answered.items():
            self._drawn[client] += wanted[client]
            self._reception.accounts[client].latencies.append(request.seconds)
        return answered

    def send(self, part: ClientBatch, step: int, learning: bool) -> Sent:
        """See :class:`Participants`."""
        ours = part.without(self._remote & set(part.pool.tolist()))
        queries, keys = {}, {}
        if len(ours.pool):
            sent = self._simulated.send(ours, step, learning)
            queries = self._by_client(ours, sent.queries)
            keys = self._by_client(ours, sent.keys)
        device = self._simulated.device
        for client in self._remote & set(part.pool.tolist()):
            answer = self._answers[client].answer
            assert answer is not None
            queries[client] = torch.from_numpy(answer["queries"]).to(device)
            keys[client] = torch.from_numpy(answer["keys"]).to(device)
        order = part.pool.tolist()
        return Sent(torch.cat([queries[c] for c in order]), torch.cat([keys[c] for c in order]))

    def receive(self, part: ClientBatch, gradient: Tensor, share: float, rates: Tensor) -> None:
        """See :class:`Participants`."""
        gradients = self._by_client(part, gradient)
        rate_of = dict(zip(part.pool.tolist(), rates.tolist(), strict=True))
        remote = self._remote & set(part.pool.tolist())
        idle = self._reception.idle()
        for client in sorted(remote):
            self._simulated.clients.steps_taken[client] += 1
            self._fresh[client].clear()
            if client in idle and idle[client] is self._answers[client].member:
                packed = Packed.of(gradients[client].float().cpu().numpy(), self._reception.terms.gradients)
                message = Gradient(self._answers[client].number, rate_of[client], packed, share / len(gradient))
                self._reception.tell(idle[client], message, self._patience.answers)
        ours = part.without(remote)
        if len(ours.pool):
            order = ours.pool.tolist()
            theirs = torch.cat([gradients[c] for c in order])
            their_rates = torch.tensor([rate_of[c] for c in order], dtype=rates.dtype)
            self._simulated.receive(ours, theirs, share * sum(ours.sizes) / sum(part.sizes), their_rates)

    def _by_client(self, part: ClientBatch, rows: Tensor) -> dict[int, Tensor]:
        sizes = [self._rows_per_image * size for size in part.sizes]
        return dict(zip(part.pool.tolist(), rows.split(sizes), strict=True))

    def end_step(self) -> None:
        """See :class:`Participants`."""
        self._simulated.end_step()

    def average(self, pool: Tensor) -> None:
        """FedAvg over the pool's clients that answer; if none does, all clients keep their models."""
        self._fetch(pool.tolist(), {ONLINE, KEY} if self._training.average_momentum_models else {ONLINE})
        there = self._known(pool)
        if len(there) == 0:
            LOG.warning("FedAvg skipped: none of its clients answered")
            return
        self._simulated.average(there)
        for client in self._remote:
            self._serials[client] += 1
            self._fresh[client].add(ONLINE)
            self._rewritten.add(client)
            if self._training.average_momentum_models:
                self._fresh[client].add(KEY)

    def consensus(self, pool: Tensor) -> State:
        """See :class:`Participants`."""
        self._fetch(pool.tolist(), {ONLINE})
        there = self._known(pool)
        return self._simulated.consensus(there if len(there) else pool)

    def individual(self, client: int) -> State:
        """See :class:`Participants`; for a device that does not answer, its row."""
        if self.trainable:
            self._fetch([client], {ONLINE})
        return self._simulated.individual(client)

    def finish(self) -> None:
        """Tell the devices that the training is over, and collect their last reports."""
        self._reception.finish()

    def state(self) -> State:
        """See :class:`Participants`; models and optimiser states are fetched from the devices first."""
        if self.trainable:
            self._fetch(self._remote, {ONLINE, KEY, VELOCITY})
        ledger = torch.from_numpy(self._reception.ledger())
        return {**self._simulated.state(), "remote.drawn": self._drawn, "remote.ledger": ledger}

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned; devices are reset to their state in it when they connect."""
        self._simulated.load_state(state)
        self._drawn = state["remote.drawn"].clone()
        self._reception.load_ledger(state["remote.ledger"].numpy())
        self._rewritten = set(self._remote) if self.trainable else set()

    def _known(self, pool: Tensor) -> Tensor:
        """The clients of `pool` whose row of the bank holds their current online model."""
        return pool[[client not in self._remote or ONLINE in self._fresh[client] for client in pool.tolist()]]

    def _fetch(self, clients: Iterable[int], kinds: set[str]) -> None:
        """Fetch these kinds of models from the devices among `clients` into the bank, if they answer in time."""
        idle = self._reception.idle()
        requests: dict[int, Request] = {}
        for client in sorted(self._remote & set(clients)):
            lacking = kinds - self._fresh[client]
            if lacking and client in idle and self._bring_up_to_date(idle[client]):
                requests[client] = self._reception.ask(
                    idle[client],
                    partial(Ask, momentum_model=KEY in kinds, velocity=VELOCITY in kinds),
                    Weights,
                    {
                        f"{kind}.{name}": stack.shape[1:]
                        for kind in {ONLINE, *kinds}
                        for name, stack in self._rows(kind)
                    },
                    self._patience.answers,
                )
        self._reception.wait(list(requests.values()), self._patience.answers)
        for client, request in requests.items():
            if request.answer is not None:
                for kind in {ONLINE, *kinds}:
                    for name, stack in self._rows(kind):
                        stack[client] = torch.from_numpy(request.answer[f"{kind}.{name}"])
                    self._fresh[client].add(kind)
                self._rewritten.add(client)

    def _bring_up_to_date(self, member: Member) -> bool:
        """Send a device its row if it differs from what the device holds; False if the device has disconnected."""
        client = member.client
        if member.has_state and member.serial == self._serials[client]:
            return True
        if not member.has_state and client not in self._rewritten:  # its row still holds the program's parameters
            member.has_state, member.serial = True, self._serials[client]
            self._fresh[client] = {ONLINE, KEY, VELOCITY}
            return True
        kinds = [ONLINE, *([KEY] if self._training.average_momentum_models else [])]
        if not member.has_state:
            kinds = [ONLINE, KEY, VELOCITY]
        tensors = {
            f"{kind}.{name}": Packed.of(stack[client].float().cpu().numpy())
            for kind in kinds
            for name, stack in self._rows(kind)
        }
        taken = int(self._simulated.clients.steps_taken[client])
        if not self._reception.tell(member, Weights(0, self._serials[client], taken, tensors), self._patience.answers):
            return False
        if not member.has_state:
            self._fresh[client] = {ONLINE, KEY, VELOCITY}
        member.has_state, member.serial = True, self._serials[client]
        return True

    def _rows(self, kind: str) -> Iterable[tuple[str, Tensor]]:
        bank = self._simulated.clients
        assert isinstance(bank, ClientBank), "frozen clients have no rows"
        return {ONLINE: bank.online, KEY: bank.key, VELOCITY: bank.velocity}[kind].items()
