from __future__ import annotations

import torch
from torch import nn

from attacks.unsplit import UnsplitAttack
from mocosfl_priv.evaluation.image_metrics import psnr
from mocosfl_priv.plugins import AttackerView, Budget, Capability
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import ColourMixClient, make_view, photo_patches


def test_images_are_found_where_the_clone_is_the_client(compute: Compute) -> None:
    victims = photo_patches(6, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(2), compute, clone=ColourMixClient)
    images = UnsplitAttack(iterations=20, tv=0.0, l2=0.0).reconstruct(view, Budget(), 0)
    assert float(psnr(images, victims).mean()) > 40


def test_the_clone_learns_to_send_what_the_victims_sent(compute: Compute) -> None:
    torch.manual_seed(1)
    smashed = nn.Conv2d(3, 4, 3, padding=1)(photo_patches(6, "test")).detach()
    clone = nn.Conv2d(3, 4, 3, padding=1)
    before = (clone(torch.full((6, 3, 16, 16), 0.5)) - smashed).square().mean()
    view = AttackerView(
        smashed=smashed,
        image_shape=(3, 16, 16),
        compute=compute,
        visible=frozenset({Capability.ARCHITECTURE}),
        build_client=lambda: clone,
    )
    weights = clone.weight.detach().clone()
    images = UnsplitAttack(iterations=20).reconstruct(view, Budget(), 0)
    assert not torch.equal(clone.weight, weights)
    assert float((clone(images) - smashed).square().mean().detach()) < 0.1 * float(before.detach())
