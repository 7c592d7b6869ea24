"""What the attacks do to a training that they attend, beyond the contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.sdar import SdarAttack, Simulation
from mocosfl_priv.compute import Compute
from mocosfl_priv.data.augmentation import moco_v2_view
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.models.colour_match import ColourMatch
from mocosfl_priv.models.critic import Labelled, build_critic
from mocosfl_priv.threat import AttackerView, AuxiliaryData, Budget, Capability, StreamView
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
