"""SplitGuard: the score against plain lists, what is sent and dropped, and small trainings of both kinds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from skimage import data
from torch import Tensor

from attacks.fsha import FshaAttack
from defenses.splitguard import SplitGuard, splitguard_score
from mocosfl_priv.config import ModelConfig, PluginSpec, TrainingConfig
from mocosfl_priv.data.partitions import iid
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.experiment.observers import MaliciousServer, attach, live_server
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import DEFENSES, AuxiliaryData, Capability, Loaded, StreamView
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.hooks import Message, NoHooks, ServerHooks, Unattended
from mocosfl_priv.training.mocosfl import MocoSFL
from mocosfl_priv.training.sampling import PooledClients, PoolShape


def guard(compute: Compute, clients: int = 3, **parameters: Any) -> SplitGuard:
    detector = SplitGuard(**({"fake_probability": 0.4, "warmup": 3, "window": 2, "wait": 2} | parameters))
    detector.prepare(SimpleNamespace(training=SimpleNamespace(clients=clients), compute=compute))  # type: ignore[arg-type]
    return detector


def plain_score(fakes: list[Tensor], some: list[Tensor], others: list[Tensor], alpha: float, beta: float) -> float:
    """The published score of messages (rows, ...), one message at a time."""

    def mean(messages: list[Tensor]) -> list[float]:
        rows = [message.mean(0).flatten().tolist() for message in messages]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def size(messages: list[Tensor]) -> float:
        return sum(float(message.mean(0).norm()) for message in messages) / len(messages)

    def angle(a: list[float], b: list[float]) -> float:
        return math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b))

    between = abs(size(fakes) - (size(some) + size(others)) / 2)
    within = abs(size(some) - size(others))
    s = angle(mean(fakes), mean(some + others)) * between - angle(mean(some), mean(others)) * within
    return (1 / (1 + math.exp(-alpha * s / (between + within)))) ** beta


def test_the_score_is_the_published_one(compute: Compute) -> None:
    detector, noise = guard(compute, alpha=2.0), torch.Generator().manual_seed(0)
    seen: dict[int, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {client: ([], [], []) for client in range(3)}
    client_ids = torch.tensor([0, 0, 1, 2, 2, 2])
    for step in range(30):
        keys = torch.randn(6, 2, 3, 3, generator=noise)
        detector.replace_keys(keys, client_ids, step, noise)
        gradient = torch.randn(6, 2, 3, 3, generator=noise) + 0.3
        detector.filter_gradient(gradient, noise)
        if step >= 3:
            for client, group in enumerate(detector._sent.group.tolist()):  # type: ignore[union-attr]
                seen[client][group].append(gradient[client_ids == client].double())
                if group == 0 and all(seen[client]):
                    expected = plain_score(*seen[client], alpha=2.0, beta=2.0)
                    assert float(detector.state()["scores"][client, -1]) == pytest.approx(expected, rel=1e-4)
    assert detector.detection().fakes_judged > 20 and detector.detection().clients_judging == 3


def test_the_score_in_closed_form() -> None:
    axes = torch.eye(3)
    same, apart = torch.stack([axes[:1], axes[:1], axes[:1]]), torch.stack([axes[1:2], axes[:1], axes[:1]])
    equal, larger = torch.ones(3, 1), torch.tensor([[2.0], [1.0], [1.0]])
    assert float(splitguard_score(same, equal, 5.0, 2.0)) == pytest.approx(0.25, abs=1e-3)  # S = 0
    assert float(splitguard_score(apart, equal, 5.0, 2.0)) == pytest.approx(0.25, abs=1e-3)  # no other magnitude
    sure = (1 / (1 + math.exp(-5 * math.pi / 2))) ** 2
    assert float(splitguard_score(apart, larger, 5.0, 2.0)) == pytest.approx(sure)
    assert bool(splitguard_score(torch.zeros(3, 1, 3), torch.zeros(3, 1), 5.0, 2.0).isfinite())


def test_false_messages_carry_the_last_key_of_their_client_and_their_gradient_is_dropped(
    compute: Compute, rng: torch.Generator
) -> None:
    detector, client_ids = guard(compute), torch.tensor([0, 0, 1, 2, 2])
    last, drawn_false = torch.zeros(3, 1, 2, 2), 0
    for step in range(20):
        keys = torch.randn(5, 1, 2, 2, generator=rng)
        sent = detector.replace_keys(keys, client_ids, step, rng)
        returned = detector.filter_gradient(torch.ones(5, 1, 2, 2), rng)
        for client in range(3):
            mine = client_ids == client
            if bool(returned[mine].any()):
                assert torch.equal(sent[mine], keys[mine]) and bool((returned[mine] == 1).all())
            else:
                drawn_false += 1
                assert step >= 3 and all(torch.equal(key, last[client]) for key in sent[mine])
        last = keys[[1, 2, 4]]
    assert 10 < drawn_false < 31  # 51 messages after the warm-up, of which 0.4 are false: 20.4 +- 3.5


def test_alarms_by_every_policy_and_by_majority(compute: Compute) -> None:
    scores = torch.tensor([[1.0] * 9 + [0.2], [0.2] * 9 + [1.0], [1.0] * 10, [0.5, 0.5, 0.5, 0.5, 0.5] + [1.0] * 5])
    wanted = {"fast": [1, 0, 0, 0], "average": [0, 1, 0, 1], "voting": [0, 1, 0, 1]}
    for policy, expected in wanted.items():
        detector = guard(compute, policy=policy, window=10, wait=10)
        assert detector._suspicious(scores).int().tolist() == expected
    detector.replace_keys(torch.zeros(3, 1), torch.arange(3), 0, torch.Generator())
    detector.state()["judged"][:] = torch.tensor([12, 12, 9])  # the third cannot judge yet
    detector.state()["alarm_step"][:] = torch.tensor([40, -1, -1])
    assert not detector.detection().alarm and detector.detection().first_alarm_step is None
    detector.state()["alarm_step"][1] = 70
    assert detector.detection().alarm and detector.detection().first_alarm_step == 70
    with pytest.raises(ConfigurationError, match="multiple of 5"):
        DEFENSES.create(PluginSpec(name="splitguard", policy="voting", window=7))


def test_what_was_judged_stays_judged_on_the_way_back_to_an_earlier_model(compute: Compute) -> None:
    detector, noise = guard(compute), torch.Generator().manual_seed(0)
    earlier: dict[str, Tensor] = {}
    for step in range(30):
        detector.replace_keys(torch.randn(3, 1, generator=noise), torch.arange(3), step, noise)
        detector.filter_gradient(torch.randn(3, 1, generator=noise), noise)
        if step == 15:
            earlier = {name: value.clone() for name, value in detector.state().items()}
    late = detector.detection()
    detector.load_state(earlier)
    assert detector.detection() == late
    resumed = guard(compute)
    resumed.load_state(earlier)
    assert 0 < resumed.detection().fakes_judged < late.fakes_judged


class KeyBlind(Unattended):
    """A server that returns one gradient for all messages, whatever key belongs to them."""

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        return 1e-3 * torch.ones_like(gradient)


class KeyBound(Unattended):
    """A server whose gradient turns by a right angle, and doubles, for keys it has seen in the step before."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {-1: torch.empty(0)}

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        flat = message.keys.flatten(1)
        self.seen[message.step] = flat
        before = self.seen[message.step - 1]
        again = (flat[:, None] == before[None]).all(2).any(1) if len(before) else torch.zeros(len(flat)).bool()
        alternating = torch.ones_like(gradient)
        alternating[..., ::2] = -1
        return 1e-3 * torch.where(again.view(-1, 1, 1, 1), 2 * alternating, torch.ones_like(gradient))


def images() -> Tensor:
    """Plain colours with some noise."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 200, (60, 3, 1, 1), generator=draw)
    return (colours + torch.randint(0, 56, (60, 3, 12, 12), generator=draw)).byte()


def photographs(count: int, seed: int) -> Tensor:
    """Small patches of three photographs."""
    draw, patches = torch.Generator().manual_seed(seed), []
    pictures = [torch.from_numpy(picture().copy()) for picture in (data.astronaut, data.chelsea, data.coffee)]  # type: ignore[no-untyped-call]
    for index in range(count):
        picture = pictures[index % 3]
        y, x = (int(torch.randint(length - 32, (), generator=draw)) for length in picture.shape[:2])
        patches.append(picture[y : y + 32 : 2, x : x + 32 : 2].permute(2, 0, 1))
    return torch.stack(patches)


def split_model(width: int = 4, size: int = 12) -> SplitModel:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet8", width=width, projector_hidden=32, projector_out=32)
    return build_split_model(config, 1, size, [0.5] * 3, [0.25] * 3)


def training(
    compute: Compute, hooks: Any, server: ServerHooks | None = None, split: SplitModel | None = None,
    own: Tensor | None = None, **settings: Any,
) -> MocoSFL:  # fmt: skip
    own = images() if own is None else own
    given = {"clients": 3, "server_batch": 12, "queue_size": 64, "sync_period": 5, "epochs": 2} | settings
    config = TrainingConfig(**given)
    shape = PoolShape.of(config)
    batches = PooledClients(own, iid(len(own), config.clients, generator(0, "p")), shape, generator(0, "b"))
    return MocoSFL(
        split or split_model(), batches, config, steps=250, compute=compute, seed=0, hooks=hooks, server_hooks=server
    )


def steps(run: MocoSFL, count: int) -> MocoSFL:
    for _ in range(count):
        run.step()
    return run


def weights(run: MocoSFL) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.assemble().named_state().items()}


@pytest.mark.parametrize("settings", [{}, {"paper_gradient": "one_sided"}, {"clients": 12, "symmetric": False}])
def test_who_looks_at_keys_is_told_from_who_does_not(compute: Compute, settings: dict[str, Any]) -> None:
    scores = []
    for server in (KeyBound(), KeyBlind()):
        detector = guard(compute, clients=settings.get("clients", 3), window=5, wait=8)
        steps(training(compute, detector, server, **settings), 40)
        scores.append(detector.detection())
    bound, blind = scores
    # a right angle's score is 0.9992; of two false messages in a row the second one's key was never sent before
    assert bound.score > 0.99 and not bound.alarm
    assert blind.score == pytest.approx(0.25, abs=1e-3) and blind.alarm
    assert blind.clients_alarmed == blind.clients_judging > 2


@pytest.mark.parametrize(
    "settings", [{}, {"paper_gradient": "one_sided"}, {"sync_period": 1, "average_momentum_models": True}]
)
def test_until_it_sends_a_false_message_it_changes_nothing(compute: Compute, settings: dict[str, Any]) -> None:
    detector = guard(compute, warmup=100)
    plain = weights(steps(training(compute, NoHooks(), **settings), 6))
    watched = weights(steps(training(compute, detector, **settings), 6))
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert detector.detection().clients_judging == 0 and not detector.detection().alarm


def test_a_resumed_training_goes_on_exactly(compute: Compute) -> None:
    whole, first = guard(compute), guard(compute)
    uninterrupted = steps(training(compute, whole), 20)
    stopped = steps(training(compute, first), 11)
    tensors, facts = stopped.state()
    second = guard(compute)
    resumed = training(compute, second)
    resumed.load_state(11, {name: value.clone() for name, value in tensors.items()}, facts)
    expected, found = weights(uninterrupted), weights(steps(resumed, 9))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert whole.state().keys() == second.state().keys() and whole.detection().fakes_judged > 0
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())


def hijacker(compute: Compute, split: SplitModel, auxiliary: Tensor) -> MaliciousServer:
    stream = StreamView(
        smashed_shape=split.smashed_shape, image_shape=split.image_shape, compute=compute,
        visible=frozenset(Capability), server=live_server(split.trunk, split.projector, compute),
        auxiliary=AuxiliaryData(auxiliary.float() / 255, torch.ones(len(auxiliary), dtype=torch.bool)),
        build_client=lambda: split_model(8, 16).client,
    )  # fmt: skip
    observer = attach(
        Loaded("fsha", FshaAttack("res_normN0C4", rows=16, starts=1, iterations=40), "", ""), stream, 0, None
    )
    assert observer is not None
    return MaliciousServer([observer])


def test_the_contrastive_gradient_depends_on_keys_and_that_of_fsha_does_not(compute: Compute) -> None:
    split = split_model(8, 16)
    run = training(compute, NoHooks(), split=split, own=photographs(60, 0))
    queries, keys, others = torch.randn(3, 6, *split.smashed_shape).unbind()
    client_ids = torch.zeros(6, dtype=torch.long)
    (_, true), (_, false) = (run.server.score(queries, k, client_ids, 1.0, True) for k in (keys, others))
    assert true is not None and false is not None and float((true - false).norm()) > 0.1 * float(true.norm())
    hijack = hijacker(compute, split, photographs(60, 1))
    messages = [Message(0, 10, client_ids, queries, k) for k in (keys, others)]
    for message in messages:  # it listens first
        hijack.received(message)
        assert torch.equal(hijack.returned(message, true), true)
    hijack.received(messages[0])
    first, second = (hijack.returned(message, torch.zeros_like(queries)) for message in messages)
    assert torch.equal(first, second) and bool(first.any())


@pytest.mark.slow
def test_fsha_is_noticed(compute: Compute) -> None:
    detections = []
    for hijacked in (False, True):
        split = split_model(8, 16)
        server = hijacker(compute, split, photographs(200, 1)) if hijacked else None
        detector = guard(compute, 4, fake_probability=0.2, warmup=20, window=10, wait=20)
        settings = {"clients": 4, "server_batch": 16, "queue_size": 256}
        steps(training(compute, detector, server, split, photographs(600, 0), **settings), 250)
        detections.append(detector.detection())
    honest, malicious = detections
    assert honest.score > malicious.score + 0.2, detections
    assert malicious.alarm, detections
