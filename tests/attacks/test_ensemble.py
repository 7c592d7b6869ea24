from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks import ensemble
from attacks.ensemble import Candidate, EnsembleAttack, Member, choose
from mocosfl_priv import Attack, AttackerView, Budget, Capability
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.plugins import ATTACKS
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import ColourMixClient, ConstantClient, make_view, photo_patches

HERE = "tests.attacks.test_ensemble:"


class Inverse(Attack):
    """Knows the inverse of the colour mix, up to a blur of its own; counts how often it is asked for how many."""

    needs = frozenset({Capability.QUERY})
    asked: list[int] = []

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        Inverse.asked.append(len(view.smashed))
        for _ in budget.iterate(1):
            pass
        matrix = ColourMixClient().get_buffer("matrix")
        images = torch.einsum("dc,nchw->ndhw", torch.linalg.inv(matrix), view.smashed)
        return (images + self.error * torch.randn(images.shape)).clamp(0, 1)


class Failing(Attack):
    """Always fails."""

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        raise RunFailedError("diverged")


class Breaking(Attack):
    """Fails as a library does."""

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        raise RuntimeError("out of memory")


@pytest.fixture
def only_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attack but those given as members."""
    monkeypatch.setattr(ensemble, "WITH_KNOWN_ANSWERS", ())
    Inverse.asked.clear()


@pytest.mark.usefixtures("only_members")
def test_the_best_member_is_found_without_the_victims_and_failures_are_survived(compute: Compute) -> None:
    victims = photo_patches(9, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(120), compute)
    members = (
        {"name": f"{HERE}Failing"},
        {"name": f"{HERE}Breaking"},
        {"name": f"{HERE}Inverse", "error": 0.2},
        {"name": f"{HERE}Inverse", "error": 0.1},
        {"name": f"{HERE}Inverse"},
    )
    images = EnsembleAttack(steps=2000, members=members).reconstruct(view, Budget(), 0)
    assert float(mse(images, victims).mean()) < 1e-6
    # trials see held-out images only; the finalist sees the victims and all that is held out
    assert [count for count in Inverse.asked if count > 18] == [9 + 18]
    assert set(Inverse.asked) == {18, 27}


@pytest.mark.usefixtures("only_members")
def test_a_second_finalist_runs_only_where_it_is_close(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(9, "test"), photo_patches(120), compute)
    for errors, finalists in (((0.2, 0.19, 0.18), 2), ((0.2, 0.19, 0.05), 1)):
        Inverse.asked.clear()
        members = tuple({"name": f"{HERE}Inverse", "error": error} for error in errors)
        EnsembleAttack(steps=2000, members=members).reconstruct(view, Budget(), 0)
        assert Inverse.asked.count(27) == finalists


def test_the_decoder_gets_enough_steps_to_show_something_before_it_is_compared(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same time for all and one step of a decoder each, an ensemble was weaker than its own first member."""
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(40), compute)
    runs: list[tuple[str, int]] = []

    def record(member: Member, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for _ in budget.iterate(10**6):
            pass
        runs.append((member.label, budget.steps))
        return torch.zeros((len(view.smashed), *view.image_shape))

    monkeypatch.setattr(ensemble, "_run", record)
    EnsembleAttack(steps=1000).reconstruct(view, Budget(), 0)
    attacks = [label.split(",")[0] for label, _ in runs]
    # a trial of the decoder that is too short to say anything, one of a search, and both finalists
    assert attacks == ["decoder", "rmle", "decoder", "rmle"]
    assert runs[0][1] == 50 and runs[2][1] > 0.75 * 1000 and runs[3][1] > 0.05 * 1000
    runs.clear()
    EnsembleAttack(steps=60_000).reconstruct(view, Budget(), 0)
    assert runs[0][1] == ensemble.TRIAL_STEPS and len({label for label, _ in runs[:6]}) == 6
    assert runs[-2][1] > 0.6 * 60_000


def test_a_search_that_nearly_inverts_the_client_gets_its_part_of_a_short_budget(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = photo_patches(80)
    view = make_view(ColourMixClient(), photo_patches(4, "test"), known, compute)
    inverse = torch.linalg.inv(ColourMixClient().get_buffer("matrix"))
    runs: list[tuple[str, int]] = []

    def record(member: Member, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for _ in budget.iterate(10**6):
            pass
        runs.append((member.attack, budget.steps))
        exact = torch.einsum("dc,nchw->ndhw", inverse, view.smashed).clamp(0, 1)
        return exact if member.attack == "rmle" else torch.zeros_like(exact)

    monkeypatch.setattr(ensemble, "_run", record)
    images = EnsembleAttack(steps=1000).reconstruct(view, Budget(), 0)
    assert [attack for attack, _ in runs] == ["decoder", "rmle", "rmle", "decoder"]
    assert runs[2][1] > 0.3 * 1000 and runs[3][1] > 0.4 * 1000
    assert float(mse(images, photo_patches(4, "test")).mean()) < 1e-6


@pytest.mark.parametrize(("steps", "grown"), [(ensemble.GROWN_STEPS - 1, False), (ensemble.GROWN_STEPS, True)])
def test_a_larger_network_needs_a_budget_for_many_of_its_steps(steps: int, grown: bool) -> None:
    member = ensemble.WITH_KNOWN_ANSWERS[0]
    trial = ensemble.Trial(member, 0.1, steps=300, seconds=3.0)
    by_steps, by_time = Budget(steps=steps), Budget(seconds=steps * ensemble.GROWN_COST / 100 * 1.0001)
    for part in (by_steps, by_time):
        assert (ensemble._grown(trial, part) is ensemble.LARGE) is grown


def test_the_choice_per_image_follows_the_distance_only_where_held_out_images_say_so() -> None:
    """Two candidates, each good on half of the images: with a telling distance the better is taken, else the mean's."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.rand((60, 3, 4, 4), generator=rng)
    noise = torch.randn(truth.shape, generator=rng)
    good_first = (torch.arange(60) % 2 == 0).view(-1, 1, 1, 1)
    first = truth + noise * torch.where(good_first, 0.01, 0.3)
    second = truth + noise * torch.where(good_first, 0.31, 0.01)
    telling = [Candidate(images, mse(images, truth)) for images in (first, second)]
    chosen = choose(telling, truth[20:])
    assert torch.equal(chosen, torch.where(good_first, first, second)[:20])
    silent = [Candidate(images, torch.rand(60, generator=rng)) for images in (first, second)]
    assert torch.equal(choose(silent, truth[20:]), first[:20])


def test_refinement_moves_to_what_was_received_and_only_if_that_helps(compute: Compute) -> None:
    victims = photo_patches(6, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(80), compute)
    truth = photo_patches(20)
    every = torch.cat([victims, truth])
    start = (every + 0.05 * torch.randn(every.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    refined = ensemble._refine(view, start, view.query(every), truth, Budget())
    assert refined is not None and float(mse(refined, every).mean()) < 0.5 * float(mse(start, every).mean())
    constant = make_view(ConstantClient(), victims, photo_patches(80), compute)
    assert ensemble._refine(constant, start, constant.query(every), truth, Budget()) is None


def test_a_client_that_destroys_everything_leaks_nothing(compute: Compute) -> None:
    victims, known = photo_patches(24, "test"), photo_patches(200)
    view = make_view(ConstantClient(), victims, known, compute)
    images = EnsembleAttack(steps=30).reconstruct(view, Budget(), 0)
    assert leak_ratio(mse(images, victims), blind_guess_floor(known, victims).mse) < 0.02


def test_without_queries_the_strongest_that_is_allowed_runs(compute: Compute) -> None:
    allowed = frozenset({Capability.ARCHITECTURE})
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(40), compute, visible=allowed)
    strongest = ATTACKS.create(PluginSpec(name="unsplit")).plugin
    expected = strongest.reconstruct(view, Budget(steps=5), 0)
    assert torch.equal(EnsembleAttack(steps=5).reconstruct(view, Budget(), 0), expected)


def test_a_defense_s_simulated_attacker_is_tried(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(40), compute)
    view.simulator = "res_normN0C8"
    created: list[str] = []
    original = Member.create

    def recording(self: Member, steps: int) -> Attack:
        created.append(self.label)
        return original(self, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "create", recording)
        EnsembleAttack(steps=12).reconstruct(view, Budget(), 0)
    assert "decoder, architecture=res_normN0C8, ssim_weight=1.0" in created


def test_members_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigurationError, match="unknown parameter"):
        EnsembleAttack(members=({"name": "decoder", "epocs": 3},))


class OnlyTrials(Inverse):
    """Succeeds on the few images of a trial, and fails on more, as an attack that runs out of memory does."""

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        if len(view.smashed) > 18:
            raise RuntimeError("out of memory")
        return super().reconstruct(view, budget, seed)


@pytest.mark.usefixtures("only_members")
def test_a_finalist_that_fails_is_replaced_by_another_member(compute: Compute) -> None:
    victims = photo_patches(9, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(120), compute)
    members = ({"name": f"{HERE}Inverse", "error": 0.3}, {"name": f"{HERE}OnlyTrials"})
    images = EnsembleAttack(steps=2000, members=members).reconstruct(view, Budget(), 0)
    assert float(mse(images, victims).mean()) < 0.1 and float(images.std()) > 0.1
    assert leak_ratio(mse(images, victims), blind_guess_floor(photo_patches(120), victims).mse) > 0


@pytest.mark.usefixtures("only_members")
def test_where_every_member_fails_the_attack_fails_and_guesses_nothing(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(40), compute)
    with pytest.raises(RunFailedError, match="no attack of the ensemble succeeded"):
        EnsembleAttack(steps=100, members=({"name": f"{HERE}Failing"},)).reconstruct(view, Budget(), 0)


def test_named_members_take_the_place_of_the_search_in_a_short_budget(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(40), compute)
    view.simulator = "res_normN0C8"
    runs: list[tuple[str, int]] = []

    def record(member: Member, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for _ in budget.iterate(10**6):
            pass
        runs.append((member.parameters.get("architecture", member.attack), budget.steps))
        return torch.zeros((len(view.smashed), *view.image_shape))

    monkeypatch.setattr(ensemble, "_run", record)
    EnsembleAttack(steps=1000).reconstruct(view, Budget(), 0)
    assert [name for name, _ in runs] == ["unet_N2C32", "unet_N2C32", "res_normN0C8"]
    assert runs[1][1] > 0.5 * 1000 and runs[2][1] > 0.3 * 1000
