"""What the attacks do to a training that they attend, beyond the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.fsha import FshaAttack
from attacks.sdar import SdarAttack, Simulation
from mocosfl_priv.data.augmentation import moco_v2_view
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.inversion.colour_match import ColourMatch
from mocosfl_priv.inversion.discriminator import Labelled, build_critic
from mocosfl_priv.plugins import AttackerView, AuxiliaryData, Budget, Capability, StreamView
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.hooks import Message
from tests.attacks.closed_form import photo_patches

ALL = frozenset(Capability)
CLASSES = 3


def coloured(images: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one of three tints, which is their class: float (n, 3, 16, 16), and labels (n,)."""
    labels = torch.arange(len(images)) % CLASSES
    tint = 0.4 + 0.6 * torch.eye(CLASSES)
    return images * tint[labels].view(-1, 3, 1, 1), labels


def client_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.LeakyReLU(0.2))


def stream_of(server: nn.Module, auxiliary: AuxiliaryData, compute: Compute) -> StreamView:
    return StreamView(
        smashed_shape=(6, 16, 16), image_shape=(3, 16, 16), compute=compute, visible=ALL, server=server,
        auxiliary=auxiliary, build_client=client_network,
    )  # fmt: skip


def test_the_image_discriminator_is_shown_decoded_data_of_the_clients(compute: Compute) -> None:
    """A public port shows it decoded data of the simulator instead."""
    torch.manual_seed(0)
    auxiliary = AuxiliaryData(photo_patches(40), torch.ones(40, dtype=torch.bool))
    server = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(24, 5))
    simulation = SdarAttack("res_normN0C8", rows=16).attend(stream_of(server, auxiliary, compute), 0)
    assert isinstance(simulation, Simulation)
    decoded: list[Tensor] = []
    judged: list[Tensor] = []
    simulation.decoder.network.register_forward_hook(lambda _, given, made: decoded.extend([given[0], made]))
    simulation.image_critic.network.register_forward_hook(lambda _, given, __: judged.append(given[0]))
    sent = torch.randn(16, 6, 16, 16)
    simulation.received(Message(0, 1, torch.zeros(16, dtype=torch.long), sent, sent))
    assert torch.equal(decoded[0].sort(0).values, sent.sort(0).values)  # the clients' data, in another order
    fakes = decoded[1]
    assert torch.equal(judged[0], fakes)  # the decoder is praised for it
    assert [torch.equal(shown, fakes) for shown in judged] == [True, True, False]  # called fakes, beside real images


@pytest.mark.slow
def test_sdar_finds_a_client_that_it_may_only_listen_to(compute: Compute) -> None:
    """No query, no weights, no label: messages about other images than the attacker's, and the architecture."""
    private, known, victims = photo_patches(600)[::2], photo_patches(600)[1::2], photo_patches(64, "test")
    torch.manual_seed(5)
    client = client_network()
    server = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(24, 5))
    auxiliary = AuxiliaryData(known, torch.ones(len(known), dtype=torch.bool))
    attack = SdarAttack("edsr_N1C16", rows=32, epochs=20, starts=3, iterations=1200)
    listener = attack.attend(stream_of(server, auxiliary, compute), 0)
    assert listener is not None
    views = torch.Generator().manual_seed(0)
    client.requires_grad_(False)
    for step in range(20):
        sent = client(moco_v2_view(private[15 * step % 240 :][:60], views))
        listener.received(Message(step, 20, torch.zeros(60, dtype=torch.long), sent, sent))
    smashed = client(victims)
    view = AttackerView(
        smashed=smashed, image_shape=(3, 16, 16), compute=compute, visible=ALL, auxiliary=auxiliary, listener=listener
    )
    torch.manual_seed(0)
    error = mse(attack.reconstruct(view, Budget(), 0), victims)
    assert leak_ratio(error, blind_guess_floor(known, victims).mse) > 0.2
    assert view.queries == 0


def test_fsha_listens_and_then_pushes_whole_channels_no_harder_than_was_honest(compute: Compute) -> None:
    torch.manual_seed(0)
    auxiliary = AuxiliaryData(photo_patches(40), torch.ones(40, dtype=torch.bool))
    attack = FshaAttack("res_normN0C8", patience=3, starts=1, iterations=4, rows=8)
    hijacker = attack.attend(stream_of(nn.Identity(), auxiliary, compute), 0)
    assert hijacker is not None
    honest = [0.01 * torch.randn(16, 6, 16, 16) for _ in range(3)]
    for step in range(8):
        sent = 2 * torch.randn(16, 6, 16, 16) + 1
        message = Message(step, 100, torch.zeros(16, dtype=torch.long), sent, sent)
        hijacker.received(message)
        passed = honest[step] if step < 3 else torch.randn(16, 6, 16, 16)
        returned = hijacker.returned(message, passed)
        if step < 3:
            assert returned is passed
        else:
            largest = max(float(gradient.sum((0, 2, 3)).norm()) for gradient in honest)
            assert 0 < float(returned.sum((0, 2, 3)).norm()) <= largest * 1.001


@pytest.mark.slow
def test_fsha_sees_through_clients_that_it_trains(shared: Path, compute: Compute) -> None:
    """Clients with norms, momentum and ReLU, told what a critic and moments say; photographs at half their size."""
    images = to_unit_range(load_split("cifar10", "train", 32, shared / "data" / "cifar10").images)
    images = F.avg_pool2d(images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:2364]], 2)
    private, known, victims = images.split([1500, 800, 64])

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6), nn.ReLU())

    torch.manual_seed(5)
    client = network()
    server = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(96, 16))
    auxiliary = AuxiliaryData(known, torch.ones(len(known), dtype=torch.bool))
    stream = StreamView(
        smashed_shape=(6, 16, 16), image_shape=(3, 16, 16), compute=compute, visible=ALL, server=server,
        auxiliary=auxiliary, build_client=network,
    )  # fmt: skip
    attack = FshaAttack("res_normN1C16")
    hijacker = attack.attend(stream, 0)
    assert hijacker is not None
    optimiser = torch.optim.SGD(client.parameters(), lr=0.02, momentum=0.9)
    rng = torch.Generator().manual_seed(0)
    for step in range(300):
        images = private[torch.randint(len(private), (60,), generator=rng)]
        queries, keys = client(moco_v2_view(images, rng)), client(moco_v2_view(images, rng)).detach()
        sent = queries.detach().requires_grad_(True)
        first, second = (F.normalize(server(smashed), dim=1) for smashed in (sent, keys))
        (gradient,) = torch.autograd.grad(F.cross_entropy(first @ second.T / 0.2, torch.arange(60)), sent)
        message = Message(step, 300, torch.zeros(60, dtype=torch.long), queries.detach().clone(), keys)
        hijacker.received(message)
        optimiser.zero_grad()
        queries.backward(hijacker.returned(message, gradient).detach())
        optimiser.step()
    view = AttackerView(
        smashed=client(victims).detach(), image_shape=(3, 16, 16), compute=compute, visible=ALL, auxiliary=auxiliary,
        listener=hijacker,
    )  # fmt: skip
    torch.manual_seed(0)
    error = mse(attack.reconstruct(view, Budget(), 0), victims)
    assert leak_ratio(error, blind_guess_floor(known, victims).mse) > 0.2


def test_colours_are_matched_without_pairs_and_contrast_is_never_raised() -> None:
    truth = torch.rand(200, 3, 4, 4)
    tinted = 0.2 + 0.5 * truth
    match = ColourMatch(foreign=tinted, familiar=truth, truth=truth)
    assert torch.allclose(match(tinted).mean((0, 2, 3)), truth.mean((0, 2, 3)), atol=1e-5)
    assert float(match(tinted).std()) == pytest.approx(float(tinted.std()), rel=0.01)
    loud = ColourMatch(foreign=truth, familiar=tinted, truth=truth)
    assert float(loud(truth).std()) == pytest.approx(float(tinted.std()), rel=0.01)
    blind = ColourMatch(foreign=torch.full((5, 3, 4, 4), 0.9), familiar=truth, truth=truth)
    torch.testing.assert_close(blind(torch.full((2, 3, 4, 4), 0.9))[1, :, 0, 0], truth.mean((0, 2, 3)))


def test_critics_take_maps_of_any_size_and_labels_make_a_difference() -> None:
    for shape in ((3, 32, 32), (7, 5, 6), (4, 1, 1)):
        assert build_critic(shape)(torch.randn(2, *shape)).shape == (2, 1)
    critic = Labelled(build_critic((4, 8, 8)), CLASSES, (8, 8))
    maps = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    scores = critic(maps, torch.tensor([0, 1]))
    assert scores.shape == (2, 1) and not torch.equal(scores[0], scores[1])
