"""Codecs in simulation: what a device's codec would leave, its bytes, and who meets it."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.func import grad, vmap

from mocosfl_priv import Capability, Message
from mocosfl_priv.api import Experiment
from mocosfl_priv.config import CodecName
from mocosfl_priv.device.codecs import CODECS, Codec, decode, encode
from mocosfl_priv.evaluation.utility import features, to_unit_range
from mocosfl_priv.experiment.attack import grant_view
from mocosfl_priv.experiment.attack_system import grant_stream, target_of
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.system import HONEST, TrainedSystem
from mocosfl_priv.experiment.train import train_system, training_document
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.codecs import as_received, message_bytes
from mocosfl_priv.training.hooks import NoHooks, Unattended
from tests.conftest import TINY
from tests.experiment.test_observers import Listening
from tests.training.test_mocosfl import model, state, train

LOSSY: list[Codec] = ["fp16", "int8"]
# Beyond 1e38 a scale times its largest level may overflow; servers refuse anything beyond 1e6.
FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)
ARRAYS = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 3), *[st.integers(1, 4)] * 3), elements=FLOATS | st.floats(-1, 1, width=32)
)


def by_a_device(message: Tensor, codec: Codec) -> Tensor:
    """What a server reads of the bytes that a device writes."""
    array = message.detach().numpy()
    return torch.from_numpy(decode(*encode(array, codec), array.shape, codec))


def bits(message: Tensor) -> list[int]:
    numbers: list[int] = message.contiguous().view(torch.int32).flatten().tolist()
    return numbers


@given(ARRAYS, st.sampled_from(CODECS))
def test_a_message_arrives_as_from_a_device_bit_for_bit(array: np.ndarray, codec: Codec) -> None:
    message = torch.from_numpy(array)
    assert bits(as_received(message, codec)) == bits(by_a_device(message, codec))
    assert message_bytes(message, codec) == encode(array, codec).nbytes


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("size", [1e-42, 1e-9, 1.0, 1e6])
def test_many_numbers_of_one_size_arrive_bit_for_bit(codec: Codec, size: float) -> None:
    message = torch.randn(40, 6, 12, 12, generator=torch.Generator().manual_seed(0)) * size
    assert bits(as_received(message, codec)) == bits(by_a_device(message, codec))


@pytest.mark.parametrize("codec", LOSSY)
def test_the_gradient_passes_as_if_nothing_had_happened(codec: Codec) -> None:
    message = torch.randn(3, 2, 4, 4, requires_grad=True)
    weight = torch.randn(3, 2, 4, 4)
    received = as_received(message, codec)
    assert not torch.equal(received, message)
    (received * weight).sum().backward()
    assert message.grad is not None and torch.equal(message.grad, weight)


@pytest.mark.slow  # of seconds that torch takes to load what it needs
def test_the_gradient_passes_image_by_image() -> None:
    message, weight = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def loss(one: Tensor, its_weight: Tensor) -> Tensor:
        return (as_received(one[None], "int8") * its_weight).sum()

    assert torch.equal(vmap(grad(loss))(message, weight), weight)


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_not_finite_is_not_hidden(codec: Codec) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        message = torch.ones(1, 1, 2, 2)
        message[0, 0, 1, 0] = bad
        assert not as_received(message, codec).isfinite().all()


def test_exact_messages_are_not_touched_and_all_codecs_can_be_configured() -> None:
    message = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert as_received(message, "fp32") is message
    assert get_args(CodecName) == CODECS


class Computed(NoHooks):
    """Keeps what clients compute, and what of the server's gradient they get."""

    def __init__(self) -> None:
        self.messages: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        self.messages.append(smashed.detach().clone())
        return smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        self.gradients.append(gradient.clone())
        return gradient


class Heard(Unattended):
    """Keeps what the server receives, and what it answers."""

    def __init__(self) -> None:
        self.messages: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def received(self, message: Message) -> None:
        self.messages += [message.queries.clone(), message.keys.clone()]

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        self.gradients.append(gradient.clone())
        return gradient


@pytest.mark.parametrize(("codec", "gradient_codec"), [("int8", "fp16"), ("fp16", "int8"), ("fp32", "int8")])
def test_both_sides_of_a_training_see_what_arrives_and_every_byte_counts(
    codec: Codec, gradient_codec: Codec, compute: Compute
) -> None:
    clients, server = Computed(), Heard()
    settings: dict[str, Any] = {"codec": codec, "gradient_codec": gradient_codec}
    outcome = train(model(), compute, hooks=clients, server_hooks=server, **settings)
    assert len(server.messages) == len(clients.messages) > 0 and len(server.gradients) == len(clients.gradients) > 0
    for computed, heard in zip(clients.messages, server.messages, strict=True):
        assert torch.equal(heard, by_a_device(computed, codec))
    for answered, learned in zip(server.gradients, clients.gradients, strict=True):
        assert torch.equal(learned, by_a_device(answered, gradient_codec))
    up = sum(encode(message.numpy(), codec).nbytes for message in clients.messages)
    down = sum(encode(gradient.numpy(), gradient_codec).nbytes for gradient in server.gradients)
    assert (outcome.traffic.smashed_up, outcome.traffic.gradient_down) == (up, down)


def test_bytes_of_a_training_by_hand(compute: Compute) -> None:
    split = model()
    traffic = train(split, compute, steps=6, codec="int8", gradient_codec="fp16").traffic
    channels, height, width = split.smashed_shape
    queries = 6 * 6 * 2  # 6 steps of 6 images in two views
    assert traffic.smashed_up == 2 * queries * channels * (height * width + 4)  # and as many keys
    assert traffic.gradient_down == queries * (2 * channels * height * width + 4)


def test_eight_bits_are_enough_to_learn_by(compute: Compute) -> None:
    """The task of `test_training_lowers_the_loss_on_a_fixed_task`."""
    settings: dict[str, Any] = {"steps": 60, "epochs": 6, "queue_size": 2, "temperature": 1.0}
    split, exact = model(), model()
    before = state(split)
    outcome = train(split, compute, **settings, codec="int8", gradient_codec="int8")
    assert outcome.history[-1]["loss"] < 2 * math.log(3)
    reference = train(exact, compute, **settings)
    assert outcome.history[-1]["loss"] == pytest.approx(reference.history[-1]["loss"], rel=0.05)
    assert not all(torch.equal(a, b) for a, b in zip(state(split), state(exact), strict=True))
    client = len(list(split.client.parameters()))
    assert all(not torch.equal(a, b) for a, b in zip(before[:client], state(split)[:client], strict=True))


class Attentive(Listening):
    """Attends training, and takes all that it is given."""

    optional = frozenset({Capability.CLIENT_WEIGHTS})


def small(**training: Any) -> Plan:
    """A plan with a defense and a listener, for the shortest training."""
    return Experiment.from_dict(
        {
            **TINY,
            "defenses": ["tests.experiment.test_experiment:Shouting"],
            "attacks": [f"{__name__}:Attentive"],
            "threat": {"grants": ["client_weights", "auxiliary_data", "architecture", "training_stream"]},
            "data": TINY["data"] | {"train_limit": 200, "test_limit": 100},
            "training": TINY["training"] | training,
            "evaluation": TINY["evaluation"] | {"recognition_epochs": 0, "label_fractions": []},
        }
    ).plan()


@pytest.fixture(scope="module")
def eight_bits() -> tuple[Plan, TrainedSystem]:
    """A system trained with messages of eight bits."""
    plan = small(codec="int8", gradient_codec="int8")
    return plan, train_system(plan.context, plan.systems[0])


def test_utility_is_measured_on_what_arrives(eight_bits: tuple[Plan, TrainedSystem], compute: Compute) -> None:
    plan, trained = eight_bits
    images, network = plan.context.probes.data.test.images, trained.model
    rng = torch.Generator().manual_seed(0)
    defense = trained.system.defense.plugin
    with torch.no_grad():
        expected = network.trunk(by_a_device(10 * network.client(to_unit_range(images)), "int8"))
    found = features(network, images, defense, compute, rng, "int8")
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, features(network, images, defense, compute, rng))


def test_attackers_get_and_simulate_what_arrives(eight_bits: tuple[Plan, TrainedSystem]) -> None:
    plan, trained = eight_bits
    context, attack = plan.context, plan.attacks[0]
    victims = context.victims.images
    with torch.no_grad():
        plain = trained.model.client(victims)
    arrived = by_a_device(10 * plain, "int8")
    view = grant_view(context.conditions, target_of(context, trained.system, trained.model), attack, victims)
    assert torch.equal(view.smashed, arrived) and not torch.equal(view.smashed, 10 * plain)
    assert torch.equal(view.query(victims), arrived) and torch.equal(view.protect(plain), arrived)
    stream = grant_stream(context, trained.system, trained.model, attack)
    assert torch.equal(stream.protect(plain), arrived)


def test_who_does_not_know_the_defense_still_knows_the_codec(eight_bits: tuple[Plan, TrainedSystem]) -> None:
    _, trained = eight_bits
    plan = small(codec="int8")
    context, attack = plan.context, plan.attacks[0]
    object.__setattr__(context.threat, "adaptive", False)
    victims = context.victims.images
    with torch.no_grad():
        plain = trained.model.client(victims)
    arrived = by_a_device(plain, "int8")
    view = grant_view(context.conditions, target_of(context, trained.system, trained.model), attack, victims)
    assert torch.equal(view.query(victims), arrived) and torch.equal(view.protect(plain), arrived)
    assert torch.equal(grant_stream(context, trained.system, trained.model, attack).protect(plain), arrived)


def test_rows_have_the_bytes_and_a_training_is_known_by_its_codecs(eight_bits: tuple[Plan, TrainedSystem]) -> None:
    plan, trained = eight_bits
    channels, height, width = trained.model.smashed_shape
    assert trained.cost["smashed_bytes_per_image"] == channels * (height * width + 4)
    traffic = trained.trained.traffic
    assert trained.cost["training_megabytes"] == pytest.approx(traffic.total / 2**20)
    documents = [
        training_document(each.context, each.systems[0], HONEST)
        for each in (plan, small(codec="int8"), small(gradient_codec="int8"), small())
    ]
    assert all(a != b for i, a in enumerate(documents) for b in documents[:i])
