from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from mocosfl_priv.config import ThreatConfig
from mocosfl_priv.errors import ConfigurationError, ThreatModelError
from mocosfl_priv.plugins import DESCRIPTIONS, AttackerView, AuxiliaryData, Budget, Capability, StreamView, ThreatModel
from mocosfl_priv.runtime.compute import Compute

C = Capability


def view(compute: Compute, *visible: Capability) -> AttackerView:
    return AttackerView(
        smashed=torch.zeros(2, 4, 8, 8),
        image_shape=(3, 8, 8),
        compute=compute,
        visible=frozenset(visible),
        client=nn.Conv2d(3, 4, 3, padding=1),
        protect=lambda z: z + 1,
        auxiliary=AuxiliaryData(torch.rand(5, 3, 8, 8), torch.ones(5, dtype=torch.bool)),
        build_client=lambda: nn.Conv2d(3, 4, 3, padding=1),
        server=nn.Linear(8, 5),
        colluder=nn.Conv2d(3, 4, 3, padding=1),
    )


def test_white_box_implies_query_and_architecture() -> None:
    model = ThreatModel.of(["client_weights"])
    assert model.grants == {C.CLIENT_WEIGHTS, C.QUERY, C.ARCHITECTURE}
    model.require(frozenset({C.QUERY}), "x")


def test_participants_know_the_architecture() -> None:
    assert ThreatModel.of(["colluding_client"]).grants == {C.COLLUDING_CLIENT, C.ARCHITECTURE}


def test_missing_capability_is_named() -> None:
    with pytest.raises(ThreatModelError, match="'decoder' needs auxiliary_data, which this threat model"):
        ThreatModel.of(["query"]).require(frozenset({C.QUERY, C.AUXILIARY_DATA}), "decoder")


def test_who_sends_the_gradients_sees_the_messages() -> None:
    assert ThreatModel.of(["gradient_channel"]).grants == {C.GRADIENT_CHANNEL, C.TRAINING_STREAM}
    assert ThreatModel.of(["training_stream"]).grants == {C.TRAINING_STREAM}


def auxiliary_of(target: int, source: int) -> AuxiliaryData:
    """Images that carry their number, those of the target first."""
    count = target + source
    numbered = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return AuxiliaryData(numbered, torch.arange(count) < target)


@pytest.mark.parametrize(("target", "source", "of_target"), [(200, 500, True), (100, 500, False), (0, 200, False)])
def test_images_to_choose_by_are_of_the_target_where_they_are_enough(target: int, source: int, of_target: bool) -> None:
    auxiliary = auxiliary_of(target, source)
    held_out = auxiliary.hold_out(0.1, torch.Generator().manual_seed(0))
    assert len(held_out) == round(0.1 * (target if of_target else target + source)) == len(set(held_out.tolist()))
    assert bool((held_out < target).all()) == of_target
    rest = auxiliary.without(held_out)
    assert sorted([*rest.images[:, 0, 0, 0].long().tolist(), *held_out.tolist()]) == list(range(target + source))
    assert int(rest.of_target.sum()) == target - int((held_out < target).sum())


def test_a_limit_on_what_is_held_out_and_a_single_image() -> None:
    assert len(auxiliary_of(200, 0).hold_out(0.5, torch.Generator(), most=20)) == 20
    assert len(auxiliary_of(3, 0).hold_out(0.01, torch.Generator())) == 1


@pytest.mark.parametrize(("target", "nearest"), [(40, 40), (5, 60), (0, 60)])
def test_few_images_of_the_target_do_not_tell_its_mean(target: int, nearest: int) -> None:
    assert len(auxiliary_of(target, 60 - target).nearest_images) == nearest


@pytest.mark.parametrize(
    ("capability", "reach"),
    [
        (C.TRAINING_STREAM, lambda s: s.server(torch.zeros(1, 4, 8, 8))),
        (C.TRAINING_STREAM, lambda s: s.protect(torch.zeros(1, 4, 8, 8))),
        (C.AUXILIARY_DATA, lambda s: s.auxiliary),
        (C.ARCHITECTURE, lambda s: s.untrained_client()),
    ],
)
def test_at_the_server_too_only_what_is_visible_can_be_reached(compute: Compute, capability: Capability, reach) -> None:  # type: ignore[no-untyped-def]
    def stream(visible: frozenset[Capability]) -> StreamView:
        return StreamView(
            smashed_shape=(4, 8, 8), image_shape=(3, 8, 8), compute=compute, visible=visible, server=nn.Flatten(),
            auxiliary=AuxiliaryData(torch.rand(5, 3, 8, 8), torch.ones(5, dtype=torch.bool)),
            build_client=lambda: nn.Conv2d(3, 4, 3, padding=1),
        )  # fmt: skip

    reach(stream(frozenset({capability})))
    with pytest.raises(ThreatModelError, match=capability.value):
        reach(stream(frozenset(Capability) - {capability}))


def test_unknown_capability() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'client_weights'"):
        ThreatModel.of(["client_weight"])


def test_defaults_grant_known_capabilities() -> None:
    ThreatModel.of(ThreatConfig().grants)
    assert set(DESCRIPTIONS) == set(Capability)


@pytest.mark.parametrize(
    ("capability", "reach"),
    [
        (C.CLIENT_WEIGHTS, lambda v: v.client),
        (C.QUERY, lambda v: v.query(torch.zeros(1, 3, 8, 8))),
        (C.AUXILIARY_DATA, lambda v: v.auxiliary),
        (C.ARCHITECTURE, lambda v: v.untrained_client()),
        (C.SERVER_MODEL, lambda v: v.server),
        (C.COLLUDING_CLIENT, lambda v: v.colluder),
        (C.TRAINING_STREAM, lambda v: v.listener),
    ],
)
def test_only_what_is_visible_can_be_reached(compute: Compute, capability: Capability, reach) -> None:  # type: ignore[no-untyped-def]
    reach(view(compute, capability))
    with pytest.raises(ThreatModelError, match=capability.value):
        reach(view(compute, *(set(Capability) - {capability})))


@pytest.mark.parametrize("capability", [C.CLIENT_WEIGHTS, C.ARCHITECTURE, C.COLLUDING_CLIENT])
def test_who_runs_a_client_at_home_can_protect_its_messages(compute: Compute, capability: Capability) -> None:
    assert bool((view(compute, capability).protect(torch.zeros(1)) == 1).all())
    without = set(Capability) - {C.CLIENT_WEIGHTS, C.ARCHITECTURE, C.COLLUDING_CLIENT}
    with pytest.raises(ThreatModelError, match="client_weights"):
        view(compute, *without).protect(torch.zeros(1))


def test_what_a_system_does_not_have_is_not_in_view(compute: Compute) -> None:
    published = AttackerView(
        smashed=torch.zeros(1), image_shape=(3, 8, 8), compute=compute, visible=frozenset(Capability)
    )
    assert not published.has(C.SERVER_MODEL) and not published.has(C.COLLUDING_CLIENT)
    with pytest.raises(ThreatModelError, match="does not have"):
        _ = published.server


def test_what_is_not_visible_is_not_held(compute: Compute) -> None:
    blind = view(compute)
    held = [value for value in vars(blind).values() if isinstance(value, nn.Module | AuxiliaryData)]
    assert held == []


def test_queries_are_counted_defended_and_without_gradient(compute: Compute) -> None:
    v = view(compute, C.QUERY, C.CLIENT_WEIGHTS)
    images = torch.rand(3, 3, 8, 8)
    answer = v.query(images)
    torch.testing.assert_close(answer, v.client(images).detach() + 1)
    assert v.queries == 3 and not answer.requires_grad


def test_many_queries_are_answered_in_pieces_and_in_order(compute: Compute) -> None:
    v = view(compute, C.QUERY, C.CLIENT_WEIGHTS)
    images = torch.rand(600, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(v.query(images), v.client(images) + 1)


def test_budget_counts_steps_and_ends_in_time() -> None:
    budget = Budget()
    assert list(budget.iterate(5)) == [0, 1, 2, 3, 4]
    assert budget.steps == 5
    assert Budget(seconds=9, spent_seconds=10, spent_steps=3).exhausted
    assert Budget(spent_steps=3).steps == 3
    limited = Budget(seconds=0.05)
    for _ in limited.iterate(10_000):
        time.sleep(0.01)
    assert limited.exhausted and 1 <= limited.steps < 100
    assert list(limited.iterate(5)) == []


def test_stored_bytes_are_the_same_images_and_cannot_be_spoiled() -> None:
    stored = torch.arange(256, dtype=torch.uint8).repeat(3).view(4, 3, 8, 8)
    lab = AuxiliaryData(stored, torch.arange(4) < 3)
    own = lab.copy()
    assert torch.equal(own.images, stored.float() / 255)
    assert torch.equal(own.select(torch.tensor([2, 0])).images, (stored.float() / 255)[[2, 0]])
    own.images.zero_()
    own.nearest_images.zero_()
    own.of_target[:] = False
    assert torch.equal(lab.images, stored.float() / 255)
    assert int(lab.of_target.sum()) == 3


def test_a_copy_of_floats_does_not_share_them() -> None:
    lab = AuxiliaryData(torch.rand(4, 1, 6, 8), torch.ones(4, dtype=torch.bool), torch.arange(4))
    own = lab.copy()
    own.images.zero_()
    assert own.labels is not None and lab.labels is not None
    own.labels.zero_()
    assert float(lab.images.max()) > 0 and lab.labels.tolist() == [0, 1, 2, 3]
