"""Attack a split model that a user trained, at one or more cuts; nothing is trained but the attacks' own networks."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import DataRoles, Role, check_disjoint, check_groups, role_record
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.cross_validation import FEWEST, FOLDS, cross_validated_knn, cross_validated_probe, folds_of
from mocosfl_priv.evaluation.perceptual import load_lpips
from mocosfl_priv.evaluation.utility import BATCH, to_unit_range
from mocosfl_priv.experiment.attack import Target
from mocosfl_priv.experiment.conditions import ONLY_IN_TRAINING, AttackConditions
from mocosfl_priv.experiment.linkage import Library, Linked, link, linkage_info, linkage_segments, linkage_table
from mocosfl_priv.experiment.provenance import common_info, gather, pictures
from mocosfl_priv.experiment.rows import CellResult, client_cost, try_attack
from mocosfl_priv.experiment.scoring import Scoring
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.models.client_check import check_client
from mocosfl_priv.models.initialisation import reinitialised
from mocosfl_priv.models.own_model import OwnSplit
from mocosfl_priv.plugins import ATTACKS, Attack, AuxiliaryData, Capability, Defense, Loaded, ThreatModel
from mocosfl_priv.plugins.defense import ExpertDefense, overrides
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.results import ROLES, TEST_VICTIMS, RunRecord
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Progress, Segment, Silent
from mocosfl_priv.runtime.seeding import derive_seed, drawn_generator, generator, global_seed

SECONDS_PER_ATTACK = 60.0  # a first guess, soon replaced
WHILE_TRAINING = ("architecture", "prepare", "client_loss", "joint_loss", "filter_gradient")


@dataclass(frozen=True)
class OwnContext:
    """What all attacks of the audit share; the parts that :mod:`provenance` reads, without a training."""

    config: ExperimentConfig
    roles: DataRoles
    conditions: AttackConditions
    scoring: Scoring
    victims: VictimSet
    library: Library
    clients_add_noise: bool = False

    @property
    def represented(self) -> ImageSet:
        """The images that the victims should be like: the attacker's, from which the blind guess comes."""
        return self.roles[Role.AUXILIARY_SOURCE]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The victims' classes."""
        return self.roles[Role.VICTIMS].class_names


@dataclass(frozen=True)
class OwnAuditPlan:
    """A checked audit of a user's model, ready to run.

    model: what results call the model. splits: the client and server at every cut. build_untrained: makes a client
    like the user's with new weights, from a seed, for each of them; empty where that cannot be done.
    """

    config: ExperimentConfig
    splits: tuple[OwnSplit, ...]
    build_untrained: tuple[Callable[[int], nn.Module], ...]
    attacks: tuple[Loaded[Attack], ...]
    defenses: tuple[Loaded[Defense], ...]
    context: OwnContext
    model: str

    @property
    def victims(self) -> int:
        """How many images are attacked."""
        return len(self.context.victims.images)

    @property
    def cells(self) -> int:
        """Rows of the result."""
        return len(self.splits) * len(self.defenses) * len(self.attacks) * len(self.config.seeds)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the pictures that the result will hold."""
        return self.context.victims.images.numel() * (self.cells + 1)


def plan_own_audit(
    config: ExperimentConfig,
    splits: Sequence[OwnSplit],
    victims: ImageSet,
    auxiliary: ImageSet,
    defenses: Sequence[Loaded[Defense]],
    build_untrained: Sequence[Callable[[], nn.Module]] = (),
    model: str = "given in Python",
) -> OwnAuditPlan:
    """Check an audit of a user's model.

    Args:
        config: Attacks, threat model, seeds, metrics and the machine; its other sections are not used.
        splits: The user's client and server, at every cut.
        victims: The images under attack.
        auxiliary: The attacker's images. Those that are victims, too, are left out.
        defenses: What is applied to messages; the first should be the undefended control.
        build_untrained: For every split, makes a client with new weights; empty to draw the user's client anew.
        model: What results call the model.

    Returns:
        The plan.

    Raises:
        ConfigurationError: The images or the defenses do not fit (ThreatModelError for attacks that are not granted
            what they need).

    """
    if victims.images.shape[1:] != auxiliary.images.shape[1:]:
        raise ConfigurationError(
            f"auxiliary: images of {_size(auxiliary)}, but the victims have {_size(victims)}; give both one size"
        )
    for defense in defenses:
        if isinstance(defense.plugin, ExpertDefense) or any(overrides(defense.plugin, hook) for hook in WHILE_TRAINING):
            raise ConfigurationError(
                f"defense {defense.label!r} works while a model trains; audit a model that was trained with it, or "
                "name a defense that only changes messages"
            )
    compute = Compute.resolve(config.compute)
    builders, why = _builders(splits, build_untrained)
    absent, remarks = set(ONLY_IN_TRAINING), []
    if any(split.server is None for split in splits):
        absent.add(Capability.SERVER_MODEL)
        if len(splits) > 1:
            without = ", ".join(split.cut for split in splits if split.server is None)
            remarks.append(f"the network after {without} is not known by itself; attacks get the server at no cut")
    if not builders:
        absent.add(Capability.ARCHITECTURE)
        remarks.append(f"{why}; attacks get no untrained client")
    threat = ThreatModel.of(config.threat.grants, config.threat.adaptive).without(absent)
    attacks = tuple(ATTACKS.create(spec) for spec in config.attacks)
    for attack in attacks:
        threat.require(attack.plugin.needs, attack.label)
        for split in splits:
            attack.plugin.check(split.smashed_shape, image_shape_of(victims))
    roles = own_roles(victims, auxiliary)
    if roles.labelled and not _enough_for_probes(victims):
        remarks.append(
            f"accuracies are not measured: that takes {FEWEST} labelled victims of {FOLDS} groups that share no pixels"
        )
    roles = replace(roles, reading=(*roles.reading, *remarks))
    known = to_unit_range(roles[Role.AUXILIARY_SOURCE].images)
    auxiliary_data = AuxiliaryData(
        roles[Role.AUXILIARY_SOURCE].images, torch.zeros(len(known), dtype=torch.bool, device=compute.device)
    )
    context = OwnContext(
        config,
        roles,
        AttackConditions.of(config.threat, threat, auxiliary_data, compute),
        Scoring(*load_lpips(config.evaluation.lpips_network), lambda: None),
        VictimSet.of(TEST_VICTIMS, to_unit_range(victims.images), ROLES, known, victims.groups),
        # nobody knows what the model trained on, so that no image is counted as seen
        Library.draw(victims, [roles[Role.AUXILIARY_SOURCE]], [], config.evaluation.linkage_candidates, 0),
        any(split.randomised for split in splits),
    )
    return OwnAuditPlan(config, tuple(splits), builders, attacks, tuple(defenses), context, model)


def _builders(
    splits: Sequence[OwnSplit], given: Sequence[Callable[[], nn.Module]]
) -> tuple[tuple[Callable[[int], nn.Module], ...], str]:
    """What makes untrained clients, one for every split; or none and the reason. None of them holds trained weights.

    Raises ConfigurationError where the user's functions do not make clients like the user's.
    """
    if given:
        if len(given) != len(splits):
            raise ConfigurationError(
                f"build_untrained: {len(given)} functions for {len(splits)} cuts; give one per cut"
            )
        for build, split in zip(given, splits, strict=True):
            made = check_client(build(), split.image_shape, "build_untrained: the client")
            if made.smashed_shape != split.smashed_shape:
                raise ConfigurationError(
                    f"build_untrained: smashed data of shape {made.smashed_shape}, but that of the client has "
                    f"{split.smashed_shape}"
                )
        return tuple(_Ignoring(build) for build in given), ""
    try:
        # a network that was drawn anew draws others: the user's own weights must not be reachable from it
        return tuple(split.untrained(derive_seed(0, "blank")).build_untrained for split in splits), ""
    except ConfigurationError as error:
        return (), str(error)


@dataclass(frozen=True)
class _Ignoring:
    """A user's function, which takes no seed; it draws from torch's global generator."""

    build: Callable[[], nn.Module]

    def __call__(self, _seed: int) -> nn.Module:
        return self.build()


def own_roles(victims: ImageSet, auxiliary: ImageSet) -> DataRoles:
    """The roles of an audit's images. Auxiliary images are left out that are victims, too, that occur twice, or whose
    group has the name of a victim's group.
    """
    seen = set(victims.digests().tolist())
    taken = victims.names_of_groups()
    kept = []
    for index, digest in enumerate(auxiliary.digests().tolist()):
        group = auxiliary.group_names[int(auxiliary.groups[index])] if auxiliary.group_names else None
        if digest not in seen and group not in taken:
            seen.add(digest)
            kept.append(index)
    dropped = len(auxiliary) - len(kept)
    if not kept:
        raise ConfigurationError(
            "auxiliary: every image is also a victim, or of a victim's group; give the attacker other images"
        )
    sets = {Role.VICTIMS: victims, Role.AUXILIARY_SOURCE: auxiliary.select(torch.tensor(kept))}
    check_groups(sets)
    digests = {role: images.digests() for role, images in sets.items()}
    check_disjoint(digests)
    remarks = [
        f"{dropped} auxiliary images are left out: they are victims, too, occur twice, or share a group with a victim"
    ]
    return DataRoles(
        sets,
        {role: role_record(images, torch.arange(len(images)), digests[role]) for role, images in sets.items()},
        training_size=len(kept),
        duplicates_dropped=dropped,
        reading=(victims.description, auxiliary.description, *(remarks if dropped else ())),
    )


def run_own_audit(plan: OwnAuditPlan, progress: Progress | None = None) -> RunRecord:
    """Attack the model at every cut, behind every defense, with every attack, and gather the record.

    In its rows, `cut_layer` is the place of the cut in the order in which cuts were given, from 1.
    """
    progress = progress or Silent()
    started = time.monotonic()
    context, config = plan.context, plan.config
    systems = [
        (place, split, defense, seed)
        for seed in config.seeds
        for place, split in enumerate(plan.splits)
        for defense in plan.defenses
    ]
    linking = [
        linkage_segments(_title(split, defense), context.conditions, context.library, [context.victims])
        for _, split, defense, _ in systems
    ]
    progress.plan([
        segment
        for (_, split, defense, _), before in zip(systems, linking, strict=True)
        for segment in (*before, *(_attack_segment(plan, split, defense, attack) for attack in plan.attacks))
    ])  # fmt: skip
    cells: list[CellResult] = []
    probes: list[pd.DataFrame] = []
    described: list[dict[str, Any]] = []
    linked: list[Linked] = []
    of_splits = [_of_split(split) for split in plan.splits]
    floors = {(place, seed): _floors(plan, place, seed) for seed in config.seeds for place in range(len(plan.splits))}
    try:
        for (place, split, defense, seed), before in zip(systems, linking, strict=True):
            keys = {"defense": defense.label, "cut_layer": place + 1, "target_fraction": 0.0, "seed": seed}
            facts, cost = of_splits[place]
            probe = {**_probe(plan, place, defense, seed), **floors[place, seed]}
            rest = {"checkpoint": split.cut, **_accuracies(probe), **cost, **context.scoring.recognition_levels}
            target = _target(plan, place, defense, seed)
            for _ in before:
                progress.segment()
            (linkage,) = link(context.conditions, context.library, target, [context.victims])
            linked.append((keys, linkage))
            rest |= linkage.columns
            for attack in plan.attacks:
                progress.segment()
                tried = try_attack(context.conditions, context.scoring, target, attack, [context.victims], progress)
                cells += [CellResult.of(scored, {**keys, "attack": attack.label}, rest) for scored in tried]
            probes.append(pd.DataFrame({**{key: [value] * plan.victims for key, value in keys.items()}, **probe}))
            described.append({**keys, **facts})
    except ConfigurationError as error:  # found too late to be called a request that was refused
        raise RunFailedError(str(error)) from error
    by_label = {defense.label: defense for defense in plan.defenses}
    table, per_image, flags = gather(context, cells, plan.attacks, by_label, [context.victims])
    return RunRecord(
        cells=table,
        per_image=per_image,
        probe=pd.concat(probes, ignore_index=True),
        linkage=linkage_table(linked),
        images=pictures(cells, [context.victims]),
        info={
            **common_info(context, plan.attacks, by_label, flags, time.monotonic() - started),
            "linkage": linkage_info(linked),
            "systems": described,
            "cuts": {str(place): split.cut for place, split in enumerate(plan.splits, start=1) if split.cut},
            "own_model": plan.model,
        },
        config_yaml=config.to_yaml(),
    )


def _attack_segment(plan: OwnAuditPlan, split: OwnSplit, defense: Loaded[Defense], attack: Loaded[Attack]) -> Segment:
    seconds = 0.0 if attack.plugin.blind else plan.config.threat.seconds or SECONDS_PER_ATTACK
    return Segment(f"attack {_title(split, defense)}: {attack.label}", attack.label, seconds)


def _of_split(split: OwnSplit) -> tuple[dict[str, Any], dict[str, float]]:
    """What results say of a split, and the cost of its client; neither depends on a defense or a seed."""
    facts = {
        "cut": split.cut,
        "smashed_shape": list(split.smashed_shape),
        "frozen_client": True,
        "guarantee": None,
        "randomised_client": split.randomised,
        "has_server": split.server is not None,
        "client_sha256": _sha256(split.client),
        "server_sha256": _sha256(split.server),
    }
    return facts, client_cost(split.client, split.image_shape)


class RepeatedMessages(nn.Module):
    """A client that adds noise of its own, with its defense, as seen by an attacker who takes the mean of its messages.

    Both draw afresh for every message, from torch's global generator.
    """

    def __init__(self, client: nn.Module, defense: Defense, messages: int) -> None:
        super().__init__()
        self.client = client
        self.defense = defense
        self.messages = messages

    def forward(self, images: Tensor) -> Tensor:
        """The mean of `messages` messages of the same images."""
        sent = [self.defense.protect(self.client(images), drawn_generator(images.device)) for _ in range(self.messages)]
        return torch.stack(sent).mean(0)


class AlreadyApplied(Defense):
    """A defense that is part of the client already: it has nothing left to do, and promises what it promised."""

    def __init__(self, defense: Defense, messages: int) -> None:
        self.defense = defense
        self.messages = messages

    def guarantee(self, messages: int) -> Guarantee | None:
        """See :class:`Defense`."""
        return self.defense.guarantee(messages * self.messages)


def _target(plan: OwnAuditPlan, place: int, defense: Loaded[Defense], seed: int) -> Target:
    split, conditions = plan.splits[place], plan.context.conditions
    client, applied = split.client, defense.plugin
    build = (
        partial(_seeded, plan.build_untrained[place], derive_seed(seed, "attacker's clone"))
        if plan.build_untrained
        else None
    )
    if split.randomised and conditions.threat.adaptive:
        messages = conditions.messages_per_victim
        client, applied = RepeatedMessages(client, applied, messages), AlreadyApplied(applied, messages)
        build = partial(_repeated, build, defense.plugin, messages) if build else None
    return Target(
        title=_title(split, defense),
        client=client,
        image_shape=image_shape_of(plan.context.roles[Role.VICTIMS]),
        defense=applied,
        server=split.server,
        build_client=build,
        seed=seed,
    )


def _seeded(build: Callable[[int], nn.Module], seed: int) -> nn.Module:
    """The same untrained client at every call."""
    with global_seed(seed, "initialisation"):
        return build(seed).eval()


def _repeated(build: Callable[[], nn.Module], defense: Defense, messages: int) -> nn.Module:
    return RepeatedMessages(build(), defense, messages)


def _title(split: OwnSplit, defense: Loaded[Defense]) -> str:
    return f"{defense.label}, cut after {split.cut}" if split.cut else defense.label


def image_shape_of(images: ImageSet) -> tuple[int, int, int]:
    """Channels, height and width."""
    channels, height, width = images.images.shape[1:]
    return channels, height, width


def _size(images: ImageSet) -> str:
    channels, height, width = image_shape_of(images)
    return f"{height} x {width} pixels with {channels} channels"


def _accuracies(probe: Mapping[str, Any]) -> dict[str, Any]:
    mean = {name: float(np.mean(probe[name])) for name in ("knn", "linear", "knn_raw_pixels", "linear_untrained")}
    return {
        "knn_accuracy": mean["knn"],
        "linear_accuracy": mean["linear"],
        "knn_raw_pixels": mean["knn_raw_pixels"],
        "linear_untrained": mean["linear_untrained"],
        "probe_selection": "cross-validation" if not math.isnan(mean["knn"]) else "",
    }


def _probe(plan: OwnAuditPlan, place: int, defense: Loaded[Defense], seed: int) -> dict[str, Any]:
    """Whether each victim is classified correctly, cross-validated among the victims; NaN without enough labels."""
    split, images = plan.splits[place], plan.context.roles[Role.VICTIMS]
    probe: dict[str, Any] = {"image": np.arange(len(images)), "group": images.groups.numpy()}
    if not _probes_measured(plan):
        return {**probe, "knn": _unmeasured(images), "linear": _unmeasured(images)}
    networks = [split.client, *([split.server] if split.server is not None else [])]
    found = _features(networks, defense, images.images, seed, plan.context.conditions.compute.device)
    return {**probe, "knn": _knn(plan, found, seed), "linear": _linear(plan, found, seed)}


def _floors(plan: OwnAuditPlan, place: int, seed: int) -> dict[str, Any]:
    """The same of raw pixels and of the network with new weights, which no defense changes."""
    images = plan.context.roles[Role.VICTIMS]
    floors: dict[str, Any] = dict.fromkeys(("knn_raw_pixels", "linear_untrained"), _unmeasured(images))
    if not _probes_measured(plan):
        return floors
    pixels = to_unit_range(images.images).flatten(1)
    floors["knn_raw_pixels"] = _knn(plan, pixels - pixels.mean(0), seed)
    untrained = _untrained(plan, place, seed)
    if untrained is not None:
        found = _features(untrained, None, images.images, seed, plan.context.conditions.compute.device)
        floors["linear_untrained"] = _linear(plan, found, seed)
    return floors


def _knn(plan: OwnAuditPlan, features: Tensor, seed: int) -> np.ndarray:
    images, temperature = plan.context.roles[Role.VICTIMS], plan.config.evaluation.knn_temperature
    folds = folds_of(images.groups, seed)
    return cross_validated_knn(features, images.labels, folds, len(images.class_names), temperature)


def _linear(plan: OwnAuditPlan, features: Tensor, seed: int) -> np.ndarray:
    images, penalties = plan.context.roles[Role.VICTIMS], plan.config.evaluation.linear_probe_penalties
    return cross_validated_probe(features, images.labels, folds_of(images.groups, seed), penalties)


def _unmeasured(images: ImageSet) -> np.ndarray:
    return np.full(len(images), np.nan)


def _probes_measured(plan: OwnAuditPlan) -> bool:
    return plan.context.roles.labelled and _enough_for_probes(plan.context.roles[Role.VICTIMS])


def _enough_for_probes(images: ImageSet) -> bool:
    return len(images) >= FEWEST and len(images.groups.unique()) >= FOLDS


def _untrained(plan: OwnAuditPlan, place: int, seed: int) -> list[nn.Module] | None:
    """Client and server, if there is one, with new weights; None where they cannot be drawn."""
    server = plan.splits[place].server
    if not plan.build_untrained:
        return None
    fresh = derive_seed(seed, "untrained")
    try:
        parts = [] if server is None else [reinitialised(server, fresh)]
    except ConfigurationError:
        return None
    return [_seeded(plan.build_untrained[place], fresh), *parts]


@torch.no_grad()
def _features(
    networks: Sequence[nn.Module], defense: Loaded[Defense] | None, images: Tensor, seed: int, device: torch.device
) -> Tensor:
    """What the last network makes of the client's messages, flattened: float (n, d), on the CPU."""
    client, *server = (copy.deepcopy(network).to(device) for network in networks)
    rng = generator(seed, "probe", device=device)
    out = []
    with global_seed(seed, "probe"):
        for batch in images.split(BATCH):
            values = client(to_unit_range(batch.to(device)))
            if defense is not None:
                values = defense.plugin.protect(values, rng)
            for network in server:
                values = network(values)
            out.append(values.flatten(1).float().cpu())
    return torch.cat(out)


def _sha256(network: nn.Module | None) -> str | None:
    """Of parameters and buffers by their names; None for no network."""
    if network is None:
        return None
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def limited(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    """At most `limit` of the images, drawn evenly from their classes by `seed`; all for None."""
    return images if limit is None else replace(images.balanced(limit, generator(seed, "victims")), read=images.read)
