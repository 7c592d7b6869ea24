"""What every attack promises, as checks: for the tests of this project, for a user's own, and for `mocosfl-priv check`.

A check takes a function that makes a fresh attack (the class itself, where all its parameters have defaults), tries it
on a small client with a noisy defense, and raises AssertionError with a sentence where it breaks its promise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mocosfl_priv.config import ComputeConfig
from mocosfl_priv.errors import ThreatModelError
from mocosfl_priv.plugins.attack import Attack
from mocosfl_priv.plugins.budget import Budget
from mocosfl_priv.plugins.contract import copied, require, same
from mocosfl_priv.plugins.threat import Capability, with_implied
from mocosfl_priv.plugins.views import AttackerView, AuxiliaryData, StreamView
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import global_seed
from mocosfl_priv.training.hooks import Message, ServerHooks

VICTIMS, AUXILIARY, SIDE, CHANNELS = 6, 80, 16, 8
STEPS = 12  # of the budget of a check
NOISE = 0.05  # deviation of what the defense adds
MESSAGES = 3  # of the training that an attack attends
NO_TIME = 1e-9  # seconds

Make = Callable[[], Attack]


def returns_images_of_the_victims(make: Make) -> None:
    """One image per victim: float, of the victims' shape, finite, in [0, 1]."""
    attack = make()
    _check_images(_reconstruct(attack, small_view(attack)))


def repeats_itself_without_the_victims_images(make: Make) -> None:
    """Same view and seed, same reconstruction, also where the victims' images are gone: it saw their messages only."""
    reconstructions = []
    for gone in (False, True):
        attack, victims = make(), small_victims()  # they stay in memory, as in a run
        view = small_view(attack, victims=victims)
        if gone:
            victims.fill_(float("nan"))
        reconstructions.append(_reconstruct(attack, view).detach().cpu().numpy().copy())  # no tensor to be found again
        del victims
    first, second = reconstructions
    assert np.array_equal(first, second), (
        "with the same seed it reconstructs something else the second time, when the victims' images are gone: draw "
        "from `seed`, and look at nothing but `view`"
    )


def works_with_what_it_declares(make: Make) -> None:
    """Its `needs` suffice, and it does not work without any of them."""
    attack = make()
    try:
        _reconstruct(attack, small_view(attack, with_implied(attack.needs)))
    except ThreatModelError as error:
        raise AssertionError(f"with nothing but its `needs` it does not work: {error}") from error
    for need in sorted(attack.needs):
        rest = frozenset(other for other in attack.needs if need not in with_implied({other}))
        try:
            _reconstruct(make(), small_view(attack, with_implied(rest)))
        except ThreatModelError:
            continue
        raise AssertionError(f"it works without {need}, which it lists in `needs`: move that to `optional`")


def keeps_to_its_budget(make: Make) -> None:
    """Without any time left it takes no step and has an answer all the same; steps are drawn from the budget."""
    attack = make()
    view = small_view(attack)
    with _optimiser_steps() as taken:  # steps taken while observing a training are not the budget's
        _check_images(_reconstruct(attack, view, Budget(seconds=NO_TIME)))
    assert not taken, (
        f"with no time left it takes {len(taken)} optimiser steps: draw each from `budget.iterate(planned)`"
    )
    taken_of = {}
    for steps in (1, STEPS):
        limited = small_view(attack)
        with _optimiser_steps() as taken:
            _check_images(_reconstruct(attack, limited, Budget(steps=steps)))
        taken_of[steps] = len(taken)
    assert taken_of[STEPS] == 0 or taken_of[1] < taken_of[STEPS], (
        f"it takes {taken_of[1]} optimiser steps with a budget of one step, and {taken_of[STEPS]} with {STEPS}: draw "
        "each from `budget.iterate(planned)`"
    )


def leaves_its_view_as_it_was(make: Make) -> None:
    """Smashed data, auxiliary images, and the networks that it is shown are unchanged afterwards."""
    attack = make()
    everything = frozenset(Capability)
    view = small_view(attack, everything)
    shown = {"client": view.client, "server": view.server, "colluder": view.colluder}
    before = {name: copied(network.state_dict()) for name, network in shown.items()}
    smashed, images = view.smashed.clone(), view.auxiliary.images.clone()
    _reconstruct(attack, view)
    assert torch.equal(view.smashed, smashed), "it changes view.smashed: work on a clone"
    assert torch.equal(view.auxiliary.images, images), "it changes view.auxiliary.images: work on a clone"
    for name, network in shown.items():
        assert same(network.state_dict(), before[name]), (
            f"it changes the weights of view.{name}: work on copy.deepcopy(view.{name})"
        )


def is_blind_if_it_says_so(make: Make) -> None:
    """An attack that declares `blind` does not look at the smashed data."""
    attack = make()
    if not attack.blind:
        return
    view, other = small_view(attack), small_view(attack)
    other.smashed = torch.randn_like(other.smashed)
    assert torch.equal(_reconstruct(attack, view), _reconstruct(make(), other)), (
        "the class says blind = True, but other smashed data makes another reconstruction"
    )


def keeps_what_it_heard(make: Make) -> None:
    """The listener of an attack that attends a training comes back from its state."""
    attack = make()
    visible = with_implied(attack.needs | attack.optional)
    if Capability.TRAINING_STREAM not in visible or (listener := _attend(attack, visible, MESSAGES)) is None:
        return
    heard = copied(listener.state())
    again_made = make()
    other = _attend(again_made, visible, 0)
    assert other is not None, "it attends a training the first time, but not the second"
    other.load_state(heard)
    again = other.state()
    assert same(heard, again), "load_state of its listener does not bring back what state returned"
    first = _reconstruct(attack, small_view(attack, listener=listener))
    second = _reconstruct(again_made, small_view(again_made, listener=other))
    assert torch.equal(first, second), (
        "a listener that comes back from its state leads to another reconstruction: state must hold all that it learned"
    )


CHECKS = (
    returns_images_of_the_victims,
    repeats_itself_without_the_victims_images,
    works_with_what_it_declares,
    keeps_to_its_budget,
    leaves_its_view_as_it_was,
    is_blind_if_it_says_so,
    keeps_what_it_heard,
)


def require_attack_contract(make: Make, who: str) -> None:
    """Raise ConfigurationError, in one line that names `who`, unless all `CHECKS` pass."""
    require(CHECKS, make, who, "an attack", "six small images", broken=(AssertionError, ThreatModelError))


def small_victims() -> Tensor:
    """The images behind the messages of :func:`small_view`: float (6, 3, 16, 16) in [0, 1], smooth and lighter above.

    >>> small_victims().shape
    torch.Size([6, 3, 16, 16])
    """
    return _images(VICTIMS, seed=1)


def small_view(
    attack: Attack,
    visible: frozenset[Capability] | None = None,
    victims: Tensor | None = None,
    listener: ServerHooks | None = None,
) -> AttackerView:
    """A view for `attack` on messages of a small client: a convolution, with noise as its defense.

    An attack that attends trainings has attended one of three messages.

    Args:
        attack: what the view is for.
        visible: capabilities that are granted; by default what the attack declares.
        victims: the images behind the messages; by default :func:`small_victims`.
        listener: what attended the training; by default one that the attack makes.

    Returns:
        The view.
    """
    visible = with_implied(attack.needs | attack.optional) if visible is None else visible
    if listener is None and Capability.TRAINING_STREAM in visible:
        listener = _attend(attack, visible, MESSAGES)
    client, protect = _client(seed=0), _noise(seed=2)
    with torch.no_grad():
        smashed = protect(client(small_victims() if victims is None else victims))
    return AttackerView(
        smashed=smashed,
        image_shape=(3, SIDE, SIDE),
        compute=_compute(),
        visible=visible,
        client=client,
        protect=protect,
        auxiliary=_auxiliary(),
        build_client=_untrained,
        server=_server(),
        colluder=_client(seed=0),
        listener=listener,
    )


def _reconstruct(attack: Attack, view: AttackerView, budget: Budget | None = None) -> Tensor:
    with global_seed(0, "reconstruct"):
        return attack.reconstruct(view, budget or Budget(steps=STEPS), 0)


def _check_images(images: object) -> None:
    shape = (VICTIMS, 3, SIDE, SIDE)
    assert isinstance(images, Tensor), f"reconstruct returns a {type(images).__name__}, not a tensor"
    assert tuple(images.shape) == shape, f"reconstruct returns shape {tuple(images.shape)} for victims of shape {shape}"
    assert images.is_floating_point(), f"reconstruct returns {images.dtype}, not floats in [0, 1]"
    assert bool(images.isfinite().all()), "reconstruct returns NaN or infinity"
    low, high = float(images.min()), float(images.max())
    assert low >= 0 and high <= 1, f"reconstruct returns values from {low:.3g} to {high:.3g}, not in [0, 1]: clamp them"


@contextmanager
def _optimiser_steps() -> Iterator[list[str]]:
    """A list that grows by each step of any optimiser of torch within the block."""
    taken: list[str] = []

    def note(optimiser: torch.optim.Optimizer, _arguments: object, _named: object) -> None:
        taken.append(type(optimiser).__name__)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield taken
    finally:
        handle.remove()


def _attend(attack: Attack, visible: frozenset[Capability], messages: int) -> ServerHooks | None:
    """The listener of `attack` after `messages` messages; None if it is not interested."""
    client, protect, rng = _client(seed=0), _noise(seed=3), torch.Generator().manual_seed(4)
    stream = StreamView(
        smashed_shape=(CHANNELS, SIDE // 2, SIDE // 2),
        image_shape=(3, SIDE, SIDE),
        compute=_compute(),
        visible=visible,
        server=_server(),
        protect=_noise(seed=5),
        auxiliary=_auxiliary(),
        build_client=_untrained,
    )
    with global_seed(0, "attend"):
        listener = attack.attend(stream, 0)
    for step in range(messages if listener is not None else 0):
        assert listener is not None
        with torch.no_grad():
            queries, keys = (protect(client(_images(8, seed=10 + 2 * step + view))) for view in (0, 1))
        message = Message(step, messages, torch.zeros(len(queries), dtype=torch.long), queries, keys)
        gradient = torch.randn(queries.shape, generator=rng)
        with global_seed(0, "received", step):
            listener.received(message)
        with global_seed(0, "returned", step):
            chosen = listener.returned(message, gradient)
        right = isinstance(chosen, Tensor) and chosen.shape == gradient.shape
        assert right, f"its listener returns no gradient of shape {tuple(gradient.shape)}"
    return listener


def _compute() -> Compute:
    return Compute.resolve(ComputeConfig(device="cpu", precision="float32", threads=1))


def _images(count: int, seed: int) -> Tensor:
    """Smooth random images, lighter above as photographs are."""
    coarse = torch.rand((count, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 0.7 * smooth + 0.3 * torch.linspace(1, 0, SIDE).view(1, 1, SIDE, 1)


def _auxiliary() -> AuxiliaryData:
    return AuxiliaryData(_images(AUXILIARY, seed=6), torch.ones(AUXILIARY, dtype=torch.bool))


def _client(seed: int) -> nn.Module:
    with global_seed(seed, "client of the checks"):
        network = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.ReLU())
    return network.eval().requires_grad_(False)


def _untrained() -> nn.Module:
    return _client(seed=7).requires_grad_(True)  # as a freshly built client is


def _server() -> nn.Module:
    with global_seed(0, "server of the checks"):
        trunk = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        network = nn.Sequential(OrderedDict(trunk=trunk, projector=nn.Linear(4 * CHANNELS, 8)))
    return network.eval().requires_grad_(False)


def _noise(seed: int) -> Callable[[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lambda smashed: smashed + NOISE * torch.randn(smashed.shape, generator=rng)
