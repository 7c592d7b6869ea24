"""One attack on one client: build its view, let it try, and keep what it returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mocosfl_priv.device.codecs import Codec
from mocosfl_priv.errors import RunFailedError, ThreatModelError
from mocosfl_priv.evaluation.utility import BATCH
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.observers import Observer
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.plugins import Attack, AttackerView, Capability, Defense, Loaded
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.results import ATTACK_COSTS
from mocosfl_priv.runtime.imports import cause
from mocosfl_priv.runtime.peak_memory import peak_memory
from mocosfl_priv.runtime.progress import Progress
from mocosfl_priv.runtime.seeding import derive_seed, drawn_generator, generator, global_seed
from mocosfl_priv.training.codecs import as_received


@dataclass(frozen=True)
class Target:
    """What is attacked: a client as training left it, behind its defense.

    title: for people. client: images (n, 3, h, w) in [0, 1] to smashed data before the defense.
    server: smashed data to embeddings; None where only the client is known.
    participants: parameters of two participants' own clients, before they were averaged; empty where all are equal.
    build_client: a freshly initialised client of the same layers; None where there is none. It is bound to settings
        only: it goes to the attacker, and must not carry data or trained weights along.
    seed: of the victims' messages and of the attacks.
    training_messages: the most that training made of one image.
    codec: how messages travel. Everybody knows it: it is no defense.
    """

    title: str
    client: nn.Module
    image_shape: tuple[int, int, int]
    defense: Defense
    build_client: Callable[[], nn.Module] | None
    seed: int
    server: nn.Module | None = None
    participants: Sequence[Mapping[str, Tensor]] = ()
    training_messages: int = 0
    codec: Codec = "fp32"


@dataclass(frozen=True)
class Promise:
    """What a defense promises of any attacker that saw as much as this one.

    mse_lower_bound: (n,), per victim, terms of the mean MSE that is promised.
    """

    claim: str
    epsilon: float
    delta: float
    mse_lower_bound: np.ndarray


@dataclass(frozen=True)
class Attempt:
    """What an attack returned for one set of victims, and what it used; nobody has compared it with them yet.

    reconstruction: float32 (n, 3, h, w) in [0, 1]; None if the attack failed.
    cost: `ATTACK_COSTS`. failure: the cause in one line, empty if there is none.
    promise: None if the defense promises nothing.
    """

    reconstruction: Tensor | None
    cost: dict[str, Any]
    failure: str = ""
    promise: Promise | None = None


def attempt(
    conditions: AttackConditions,
    target: Target,
    attack: Loaded[Attack],
    victim_sets: Sequence[VictimSet],
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> list[Attempt]:
    """Run `attack` once on the messages of all victims; what it returned for each set.

    observer: of the attack in the training of this client, if it had one; its costs count.

    An attack that raises, or returns what its contract forbids, has failed: its attempts say why. Raises
    ThreatModelError when it reaches for more than it was granted.
    """
    seed = attack_seed(target.seed, attack)
    view = grant_view(conditions, target, attack, torch.cat([victims.images for victims in victim_sets]), observer)
    budget = conditions.budget(
        progress,
        spent_seconds=observer.seconds if observer else 0.0,
        spent_steps=observer.messages if observer else 0,
    )
    failure, reconstruction = "", None
    device = conditions.compute.device
    try:
        with peak_memory(device) as memory, global_seed(seed, "global"):
            if observer is not None and observer.failure:
                raise RunFailedError(observer.failure)
            returned = attack.plugin.reconstruct(view, budget, seed)
        expected = (len(view.smashed), *target.image_shape)
        reconstruction = check_reconstruction(returned, expected, attack.label)
    except ThreatModelError:
        raise
    except Exception as error:  # a user's attack can fail in any way
        failure = cause(error)
    cost = {
        "attack_seconds": budget.elapsed,
        "attack_peak_megabytes": memory.device_added if device.type == "cuda" else memory.resident_added,
        "attack_steps": budget.steps,
        "attack_queries": view.queries,
        "attack_out_of_time": budget.exhausted,
    }
    assert cost.keys() == set(ATTACK_COSTS)
    guarantee = target.defense.guarantee(_messages_seen(conditions, target, observer))
    promises = [_promise(guarantee, victims) for victims in victim_sets]
    if reconstruction is None:
        return [Attempt(None, cost, failure, promise) for promise in promises]
    parts = reconstruction.split([len(victims.images) for victims in victim_sets])
    return [Attempt(part, cost, promise=promise) for part, promise in zip(parts, promises, strict=True)]


def _promise(guarantee: Guarantee | None, victims: VictimSet) -> Promise | None:
    if guarantee is None:
        return None
    return Promise(guarantee.claim, guarantee.epsilon, guarantee.delta, victims.mse_lower_bound(guarantee))


def check_reconstruction(reconstruction: object, victims_shape: tuple[int, ...], attack: str) -> Tensor:
    """The reconstruction if it is what the contract promises; RunFailedError says what is wrong otherwise."""
    if not isinstance(reconstruction, Tensor):
        raise RunFailedError(f"attack {attack!r} returned {type(reconstruction).__name__}, not a tensor")
    if tuple(reconstruction.shape) != victims_shape:
        raise RunFailedError(
            f"attack {attack!r} returned shape {tuple(reconstruction.shape)} for victims of shape {victims_shape}"
        )
    if not bool(torch.isfinite(reconstruction).all()):
        raise RunFailedError(f"attack {attack!r} diverged: its reconstruction is not finite")
    return reconstruction.detach().float().cpu().clamp(0, 1)


def grant_view(
    conditions: AttackConditions,
    target: Target,
    attack: Loaded[Attack],
    victims: Tensor,
    observer: Observer | None = None,
) -> AttackerView:
    """The view of one attack: what it declared, as far as the threat model grants it, and nothing else.

    victims: float (n, 3, h, w) in [0, 1]; the view holds their messages only.
    """
    conditions.threat.require(attack.plugin.needs, attack.label)
    return make_view(conditions, target, attack.label, conditions.visible_to(attack), victims, observer)


def make_view(
    conditions: AttackConditions,
    target: Target,
    label: str,
    visible: frozenset[Capability],
    victims: Tensor,
    observer: Observer | None = None,
) -> AttackerView:
    """The view of somebody who is called `label` and holds `visible`; other arguments: see :func:`grant_view`."""
    threat, compute = conditions.threat, conditions.compute
    defense, device = copy.copy(target.defense), compute.device
    # Copies: what one attack does to its client or its images must not reach the next attack or the checkpoint.
    client = _own_copy(target.client, device)
    server = colluder = None
    if target.server is not None and Capability.SERVER_MODEL in visible:
        server = _own_copy(target.server, device)
    if Capability.COLLUDING_CLIENT in visible:
        # the victims' messages are then made by their own copy, which the colluder's need not equal
        colluder = _own_copy(client, device)
        for own, parameters in zip((client, colluder), target.participants, strict=False):
            own.load_state_dict(parameters, strict=False)  # buffers are constants of the architecture
    messages_per_victim, codec = conditions.count_messages(defense), target.codec
    messages_rng = generator(target.seed, "victims' messages", device=device)
    attacker_rng = generator(target.seed, "attacker's queries", label, device=device)
    # a client may add noise of its own, from torch's global generator
    with torch.no_grad(), global_seed(target.seed, "victims' messages"):
        smashed = torch.cat([client(batch.to(device)) for batch in victims.split(BATCH)])
        smashed = mean_message(defense, messages_rng, messages_per_victim, smashed, codec)
    return AttackerView(
        smashed=smashed,
        image_shape=target.image_shape,
        compute=compute,
        visible=visible,
        client=client,
        protect=partial(mean_message, defense, attacker_rng, messages_per_victim, codec=codec),
        undefended=partial(as_received, codec=codec),
        knows_defense=threat.adaptive,
        simulates_queries=Capability.CLIENT_WEIGHTS in threat.grants,
        auxiliary=conditions.auxiliary.copy(),
        build_client=partial(on_device, target.build_client, device) if target.build_client else None,
        server=server,
        colluder=colluder,
        simulator=defense.simulator,
        listener=observer.listener if observer else None,
    )


def _messages_seen(conditions: AttackConditions, target: Target, observer: Observer | None) -> int:
    """How many messages of one image an attacker has; an observer of training has all that training makes of an image,
    too.

    Victims take no part in training, so this is more than was used against them: the promise also holds for the private
    images, and is the smaller for it.
    """
    return conditions.count_messages(target.defense) + (target.training_messages if observer else 0)


def _own_copy(module: nn.Module, device: torch.device) -> nn.Module:
    return copy.deepcopy(module).to(device).eval().requires_grad_(False)


def mean_message(
    defense: Defense, rng: torch.Generator, messages_per_victim: int, smashed: Tensor, codec: Codec = "fp32"
) -> Tensor:
    """The mean of `messages_per_victim` messages of the same smashed data, as they arrive; the defense draws afresh for
    each.
    """
    received = [as_received(defense.protect(smashed, rng), codec) for _ in range(messages_per_victim)]
    return received[0] if messages_per_victim == 1 else torch.stack(received).mean(0)


def attack_seed(seed: int, attack: Loaded[Attack]) -> int:
    """What `attack` draws from on a target of `seed`."""
    return derive_seed(seed, "attack", attack.label)


def protect_afresh(defense: Defense, smashed: Tensor, codec: Codec = "fp32") -> Tensor:
    """What arrives after the defense's transformation, with randomness from torch's global generator.

    By a copy that shares what the defense has learned: what hooks remember between two calls belongs to the training.
    """
    return as_received(copy.copy(defense).protect(smashed, drawn_generator(smashed.device)), codec)


def on_device(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """What `build` makes, there."""
    return build().to(device)
