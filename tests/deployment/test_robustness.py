"""Devices that lie, stall, die and come back, and servers that restart: in process, so that every moment is chosen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mocosfl_priv.deployment.deployment import Deployment
from mocosfl_priv.deployment.remote_clients import Patience
from mocosfl_priv.device.messages import Draw, Header, Message, Packed, Reason, Register, Smashed, Weights, pack, unpack
from mocosfl_priv.device.transport import ClosedError, Conversation
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.mocosfl import MocoSFL
from tests.deployment.devices import STEPS, Threads, deployment, engine, shard_views, training_of

PATIENCE = Patience(answers=5.0, anybody=20.0)


class Spoiled:
    """A device's conversation in which `alter` says what is sent instead of a frame."""

    def __init__(self, conversation: Conversation, alter: Callable[[Header, Message, bytes], list[bytes]]) -> None:
        self.peer = conversation.peer
        self._inner = conversation
        self._alter = alter
        self.receive = conversation.receive
        self.close = conversation.close
        self.wire_bytes = conversation.wire_bytes

    def send(self, frame: bytes, seconds: float) -> None:
        for altered in self._alter(*unpack(frame), frame):
            self._inner.send(altered, seconds)


Lie = Callable[[Header, Smashed], list[bytes]]


def after_registration(
    alter: Lie,
) -> Callable[[Header, Message, bytes], list[bytes]]:
    """Only the smashed data of request 4 and later are altered: a device that behaves at first."""

    def altered(header: Header, message: Message, frame: bytes) -> list[bytes]:
        return alter(header, message) if isinstance(message, Smashed) and message.request > 3 else [frame]

    return altered


def poisoned(value: float) -> Lie:
    def alter(header: Header, message: Smashed) -> list[bytes]:
        queries = message.queries.array(message.queries.shape)
        queries[-1, -1, -1, -1] = value
        packed = replace(message.queries, data=queries.tobytes())
        return [pack(header, replace(message, queries=packed))]

    return alter


def reshaped(header: Header, message: Smashed) -> list[bytes]:
    queries = message.queries
    return [pack(header, replace(message, queries=replace(queries, shape=queries.shape[::-1])))]


def shortened(header: Header, message: Smashed) -> list[bytes]:
    return [pack(header, replace(message, keys=replace(message.keys, data=message.keys.data[:-4])))]


def other_codec(header: Header, message: Smashed) -> list[bytes]:
    halves = Packed.of(message.queries.array(message.queries.shape), "fp16")
    return [pack(header, replace(message, queries=halves))]


def huge(header: Header, message: Smashed) -> list[bytes]:
    return [pack(header, replace(message, queries=replace(message.queries, data=bytes(10**6))))]


LIES: dict[Reason, list[Lie]] = {
    Reason.MALFORMED: [lambda h, m: [b"\xff" * 40], lambda h, m: [b"\x08\x01"]],
    Reason.OTHER_VERSION: [lambda h, m: [b"\x08\x07" + pack(h, m)[2:]]],
    Reason.OTHER_RUN: [lambda h, m: [pack(replace(h, run="another"), m)]],
    Reason.OTHER_SESSION: [lambda h, m: [pack(replace(h, session="0123456789abcdef"), m)]],
    Reason.REPLAYED: [lambda h, m: [pack(h, m), pack(h, m)], lambda h, m: [pack(replace(h, sequence=1), m)]],
    Reason.OUT_OF_ORDER: [lambda h, m: [pack(replace(h, sequence=h.sequence + 1), m)]],
    Reason.UNEXPECTED: [
        lambda h, m: [pack(h, replace(m, request=m.request + 1))],
        lambda h, m: [pack(h, Weights(m.request, 0, 0, {}))],
        lambda h, m: [pack(h, Register("client-0001", 3))],
        lambda h, m: [pack(h, Draw(1, 1, 0, 1))],
    ],
    Reason.WRONG_SHAPE: [reshaped, shortened],
    Reason.WRONG_DTYPE: [other_codec],
    Reason.NOT_FINITE: [poisoned(float("nan")), poisoned(float("-inf"))],
    Reason.OUT_OF_RANGE: [poisoned(1e30)],
    Reason.OVERSIZE: [huge],
}


@pytest.fixture(scope="module")
def honest(compute: Compute) -> list[float]:
    """Losses of the training with three honest devices."""
    remote = deployment(range(3), shard_views(3), patience=PATIENCE)
    return finished_losses(engine(training_of(), compute, remote), remote, 4)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def finished_losses(run: MocoSFL, remote: Deployment, steps: int) -> list[float]:
    losses = [float(run.step()) for _ in range(steps)]
    run.participants.finish()
    remote.close()
    return losses


@pytest.mark.parametrize(("reason", "alter"), [(r, a) for r, all_ in LIES.items() for a in all_])
def test_a_lie_is_refused_with_its_reason_and_costs_the_liar_its_step(
    reason: Reason, alter: Lie, compute: Compute, honest: list[float]
) -> None:
    """The liar's conversation ends; it comes back honest, and the run ends as if nothing had been."""
    lied = threading.Event()

    def once(header: Header, message: Smashed) -> list[bytes]:
        lied.set()
        return alter(header, message)

    def spoil(client: int, conversation: Conversation) -> Conversation:
        return Spoiled(conversation, after_registration(once)) if client == 1 and not lied.is_set() else conversation

    remote = deployment(range(3), shard_views(3), patience=PATIENCE, spoil=spoil)
    run = engine(training_of(), compute, remote)
    losses = finished_losses(run, remote, 4)
    assert remote.reception is not None
    accounts = remote.reception.accounts
    assert accounts[1].refusals == {reason.name.lower(): 1}
    assert accounts[0].refusals == accounts[2].refusals == {}
    assert accounts[0].steps_missed == accounts[2].steps_missed == 0
    assert losses[0] == pytest.approx(honest[0])  # before the lie
    assert np.isfinite(losses).all()
    for parameter in run.server.online.parameters():
        assert bool(torch.isfinite(parameter).all())


class Stalling:
    """A device's conversation that, from its `nth` answer on, sends only when it is let."""

    def __init__(self, conversation: Conversation, nth: int, let: threading.Event) -> None:
        self.peer = conversation.peer
        self._inner = conversation
        self._nth = nth
        self._let = let
        self._answers = 0
        self.receive = conversation.receive
        self.close = conversation.close
        self.wire_bytes = conversation.wire_bytes

    def send(self, frame: bytes, seconds: float) -> None:
        if isinstance(unpack(frame)[1], Smashed):
            self._answers += 1
            if self._answers >= self._nth:
                self._let.wait(20)
        self._inner.send(frame, seconds)


def test_a_step_goes_on_without_a_stalled_device_which_then_catches_up(compute: Compute) -> None:
    let = threading.Event()
    stalls = lambda client, conversation: Stalling(conversation, 2, let) if client == 2 else conversation  # noqa: E731
    remote = deployment(range(3), shard_views(3), patience=Patience(0.5, 20.0), spoil=stalls)
    run = engine(training_of(), compute, remote)
    pools = []
    for step in range(8):
        run.step()
        pools.append(run._pool.tolist())
        if step == 3:
            let.set()
            assert remote.reception is not None and remote.reception.wait_for_idle([2], 1, 10)
    assert pools[0] == [0, 1, 2]
    assert pools[1:4] == [[0, 1]] * 3
    assert pools[4:] == [[0, 1, 2]] * 4
    state = run.participants.state()
    run.participants.finish()
    remote.close()
    assert remote.reception is not None
    assert remote.reception.accounts[2].steps_missed == 3
    assert remote.reception.accounts[2].conversations == 1
    # the last step was followed by an average: whoever was away has the others' model again
    assert run.step_count % 2 == 0
    for name, stack in state.items():
        if name.startswith("clients.online"):
            torch.testing.assert_close(stack[2], stack[0])


class Cut:
    """A device's conversation that breaks off instead of sending its `nth` answer."""

    def __init__(self, conversation: Conversation, nth: int) -> None:
        self.peer = conversation.peer
        self._inner = conversation
        self._left = nth
        self.receive = conversation.receive
        self.close = conversation.close
        self.wire_bytes = conversation.wire_bytes

    def send(self, frame: bytes, seconds: float) -> None:
        if isinstance(unpack(frame)[1], Smashed):
            self._left -= 1
            if self._left == 0:
                self._inner.close()
                raise ClosedError("the network is gone")
        self._inner.send(frame, seconds)


def test_a_lost_connection_costs_a_step_and_the_device_keeps_what_it_learned(compute: Compute) -> None:
    """No average in between: the device goes on with its own models, which the server does not have."""
    cut: list[int] = []

    def once(client: int, conversation: Conversation) -> Conversation:
        if client == 0 and not cut:
            cut.append(client)
            return Cut(conversation, 3)
        return conversation

    remote = deployment(range(2), shard_views(2), patience=PATIENCE, spoil=once)
    run = engine(training_of(clients=2, sync_period=100), compute, remote)
    reception = remote.reception
    assert reception is not None
    for _ in range(2):
        run.step()
    before = run.participants.individual(0)
    run.step()
    assert run._pool.tolist() == [1]
    assert reception.wait_for_idle([0], 1, 10)
    after = run.participants.individual(0)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    run.step()
    assert run._pool.tolist() == [0, 1]
    run.participants.finish()
    remote.close()
    assert reception.accounts[0].conversations == 2


def test_a_device_that_lost_everything_gets_the_last_average(compute: Compute) -> None:
    """As after SIGKILL: a new process with nothing but its certificate and its images."""
    remote = deployment(range(2), shard_views(2), patience=PATIENCE)
    run = engine(training_of(clients=2, sync_period=2), compute, remote)
    for _ in range(2):
        run.step()
    averaged = run.participants.individual(0)
    assert isinstance(remote._transport, Threads)
    remote._transport.devices[0].forget()
    assert remote.reception is not None
    remote.reception.idle()[0].dialogue.close()
    wait_for(lambda: remote.reception is not None and remote.reception.accounts[0].conversations == 2)
    run.step()
    assert run._pool.tolist() == [0, 1]
    device = remote._transport.devices[0].client
    assert device is not None
    wait_for(lambda: device.steps_taken == 3)  # it learns while the server goes on
    velocity = {name: value for name, value in device.state().items() if name.startswith("velocity")}
    rate = run.training.learning_rate * 0.5 * (1 + np.cos(np.pi * 2 / STEPS))
    for name, value in device.parameters().items():
        np.testing.assert_allclose(value, averaged[name].numpy() - rate * velocity[f"velocity.{name}"], atol=1e-6)
    run.participants.finish()
    remote.close()


def test_a_restarted_server_goes_on_from_its_state_as_if_nothing_had_been(compute: Compute) -> None:
    """Devices are ahead of the checkpoint, and get its models, optimisers and places in their data again."""
    training = training_of(sync_period=3)
    whole = deployment(range(3), shard_views(3), patience=PATIENCE)
    expected = finished_losses(engine(training, compute, whole), whole, 6)

    first = deployment(range(3), shard_views(3), patience=PATIENCE)
    run = engine(training, compute, first)
    losses = [float(run.step()) for _ in range(2)]
    tensors, facts = run.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    for _ in range(2):
        run.step()
    assert isinstance(first._transport, Threads) and first.reception is not None
    second = Deployment("test", 0, range(3), first._transport.moved_to, patience=PATIENCE)
    resumed = engine(training, compute, second)
    resumed.load_state(2, tensors, facts)
    for member in first.reception.idle().values():
        member.dialogue.close()
    losses += [float(resumed.step()) for _ in range(4)]
    resumed.participants.finish()
    second.close()
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # counted on: what both servers got since the start, but for what the first got after its checkpoint
    assert whole.reception is not None and second.reception is not None
    for client, account in second.reception.accounts.items():
        maps = 2 * 4 * 4 * int(np.prod(run.model.smashed_shape))  # float32 queries and keys of two images
        assert account.traffic.payload_received > 6 * maps
        assert account.traffic.messages_received > whole.reception.accounts[client].traffic.messages_received


def test_without_any_device_a_run_fails_and_says_so(compute: Compute) -> None:
    remote = deployment([], shard_views(1), patience=Patience(0.2, 0.3))
    remote.remote = range(3)
    with pytest.raises(RunFailedError, match="0 of 3 devices connected within"):
        engine(training_of(), compute, remote).step()


def test_one_device_among_simulated_clients(compute: Compute) -> None:
    remote = deployment([1], shard_views(4), patience=PATIENCE)
    run = engine(training_of(clients=4, sync_period=2), compute, remote)
    for _ in range(4):
        assert np.isfinite(float(run.step()))
        assert run._pool.tolist() == [0, 1, 2, 3]
    state: dict[str, Any] = run.participants.state()
    run.participants.finish()
    remote.close()
    assert remote.participants is not None
    assert remote.participants.drawn == [0, 4, 0, 0]
    for name, stack in state.items():  # step 4 ended with an average over all of them
        if name.startswith("clients.online"):
            for client in range(1, 4):
                torch.testing.assert_close(stack[client], stack[0])
