"""One system: train -> measure utility -> let every attack try -> score."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.config import ExperimentConfig, ModelConfig
from mocosfl_priv.data.partitions import make_partition
from mocosfl_priv.data.roles import DataRoles, Role
from mocosfl_priv.device.accounting import FLOAT_BYTES, MEBIBYTE, paper_traffic
from mocosfl_priv.errors import MocosflPrivError, RunFailedError
from mocosfl_priv.evaluation.floor import Floor, blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.linear_probe import linear_probe
from mocosfl_priv.evaluation.perceptual import Lpips, load_lpips
from mocosfl_priv.evaluation.reconstruction import check_reconstruction, score
from mocosfl_priv.evaluation.utility import (
    BATCH,
    ProbeData,
    Utility,
    measure_utility,
    probe_features,
    raw_pixel_knn,
    selection_knn,
    to_unit_range,
)
from mocosfl_priv.models.own_backbone import backbone_code
from mocosfl_priv.models.split import SplitModel, build_split_model, count_parameters, forward_flops
from mocosfl_priv.plugins import Attack, DefenderContext, Defense, Loaded, PreparedModel
from mocosfl_priv.progress import Progress, Silent
from mocosfl_priv.results import CELL_KEYS, METRICS, semi_column
from mocosfl_priv.seeding import derive_seed, drawn_generator, generator, global_seed
from mocosfl_priv.stream import (
    Attendee,
    Audience,
    Hijack,
    Training,
    copied_auxiliary,
    live_server,
    seat,
    visible_to,
)
from mocosfl_priv.threat import AttackerView, AuxiliaryData, Budget, Capability, StreamView, ThreatModel
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.mocosfl import TrainedModel, train_mocosfl
from mocosfl_priv.training.sampling import PooledClients, PoolShape, data_weights, total_steps

HONEST = Training((), ())
DEFENDER = "defender"  # where, among a system's checkpoints, its defense keeps those of its pre-training


@dataclass(frozen=True)
class System:
    """What is trained once and then attacked by every attack: a point of the grid without its attack."""

    defense: Loaded[Defense]
    cut_layer: int
    target_fraction: float
    seed: int

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that identify it in a result."""
        return {
            "defense": self.defense.label,
            "cut_layer": self.cut_layer,
            "target_fraction": self.target_fraction,
            "seed": self.seed,
        }

    @property
    def title(self) -> str:
        """For people."""
        fraction = f", {self.target_fraction:.3g} target data" if self.defense.plugin.uses_target_data else ""
        return f"{self.defense.label}, cut {self.cut_layer}{fraction}, seed {self.seed}"

    @property
    def file_stem(self) -> str:
        """A file name that is unique within a run."""
        return f"{_in_file_name(self.defense.label)}_cut{self.cut_layer}_target{self.target_fraction:g}_seed{self.seed}"

    def trained_title(self, training: Training) -> str:
        """For people: this system, trained in that way."""
        return f"{self.title}, hijacked by {training.hijacker.label}" if training.hijacker else self.title

    def trained_stem(self, training: Training) -> str:
        """A file name for what `training` of this system leaves, unique within a run."""
        hijacker = f"_hijacked_by_{_in_file_name(training.hijacker.label)}" if training.hijacker else ""
        return self.file_stem + hijacker


def _in_file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)


@dataclass
class Laboratory:
    """What all systems of an experiment share: data in their roles, floors, the metrics, the machine."""

    config: ExperimentConfig
    roles: DataRoles
    compute: Compute
    threat: ThreatModel
    curve_attacks: tuple[Loaded[Attack], ...] = ()
    lpips: Lpips | None = field(init=False)
    lpips_note: str = field(init=False)
    _untrained: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lpips, self.lpips_note = load_lpips(self.config.evaluation.lpips_network)

    @cached_property
    def probe_data(self) -> ProbeData:
        """The probe roles."""
        return ProbeData(self.roles[Role.PROBE_TRAIN], self.roles[Role.PROBE_VALIDATION], self.roles[Role.PROBE_TEST])

    @cached_property
    def victims(self) -> Tensor:
        """The true victims, float (n, 3, h, w) in [0, 1]; only scoring reads them."""
        return to_unit_range(self.roles[Role.VICTIMS].images)

    @cached_property
    def floor(self) -> Floor:
        """The blind guess for the victims, from the clients' private images."""
        return blind_guess_floor(to_unit_range(self.roles[Role.CLIENT_PRIVATE].images), self.victims)

    @cached_property
    def raw_pixels(self) -> np.ndarray:
        """Utility floor: correctness of raw-pixel kNN on the probe test role."""
        return raw_pixel_knn(self.probe_data, self.config.evaluation)

    @cached_property
    def auxiliary(self) -> AuxiliaryData:
        """The attacker's images."""
        target, source = self.roles[Role.AUXILIARY_TARGET], self.roles[Role.AUXILIARY_SOURCE]
        return AuxiliaryData(
            to_unit_range(torch.cat([target.images, source.images])).to(self.compute.device),
            torch.arange(len(target) + len(source), device=self.compute.device) < len(target),
        )

    @cached_property
    def colour_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation per colour of the clients' private images, which clients normalise with."""
        images = to_unit_range(self.roles[Role.CLIENT_PRIVATE].images)
        return images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()

    def build_model(self, model: ModelConfig, cut_layer: int, seed: int) -> SplitModel:
        """A fresh model; equal for equal seeds whatever the defense, so that defenses can be compared in pairs."""
        return _fresh_model(model, cut_layer, self.config.data.image_size, self.colour_statistics, seed)

    def untrained_probe(self, model: ModelConfig, cut_layer: int, seed: int) -> np.ndarray:
        """Utility floor: correctness of a linear probe on the same network before training."""
        key = (model.model_dump_json(), cut_layer, seed)
        if key not in self._untrained:
            network = self.build_model(model, cut_layer, seed).to(self.compute.device)
            evaluation, rng = self.config.evaluation, generator(seed, "untrained", device=self.compute.device)
            train, selection, test = probe_features(network, self.probe_data, NoHooks(), evaluation, self.compute, rng)
            self._untrained[key] = linear_probe(train, selection, test, evaluation.linear_probe_penalties).correct
        return self._untrained[key]


@dataclass
class TrainedSystem:
    """A trained system with its utility and cost, and those who attended its training."""

    system: System
    training: Training
    audience: Audience
    trained: TrainedModel
    utility: Utility
    untrained: np.ndarray
    cost: dict[str, float]
    frozen: bool

    @property
    def model(self) -> SplitModel:
        """The selected checkpoint."""
        return self.trained.model

    @property
    def file_stem(self) -> str:
        """A file name that is unique within a run."""
        return self.system.trained_stem(self.training)

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Client, trunk and projector as named arrays."""
        return {name: value.detach().cpu().contiguous().numpy() for name, value in self.model.named_state().items()}


@dataclass(frozen=True)
class CellResult:
    """One attack on one system: its row, its per-image values, and its reconstructions as uint8."""

    row: dict[str, Any]
    per_image: pd.DataFrame
    reconstruction: np.ndarray


def planned_training_steps(lab: Laboratory) -> int:
    """Steps of one training of this experiment."""
    training = lab.config.training
    return total_steps(len(lab.roles[Role.CLIENT_PRIVATE]), PoolShape.of(training).images, training.epochs)


def train_system(
    lab: Laboratory,
    system: System,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    how: Training = HONEST,
) -> TrainedSystem:
    """Train one system, select its checkpoint on validation data, and measure its utility and cost.

    how: who attends, and whether one of them chooses the gradients. A hijacked training has no leakage curve.
    checkpoints: folder in which the training keeps its state, and from which it goes on.
    """
    progress = progress or Silent()
    config, defense, seed = lab.config, system.defense.plugin, system.seed
    training = config.training
    model_config = defense.architecture(config.model)
    started = time.monotonic()
    kept = checkpoints_of(lab, system, checkpoints, how)
    prepared = _prepare(lab, system, model_config, progress, kept)
    audience = _audience(lab, system, prepared.model, how)

    private = lab.roles[Role.CLIENT_PRIVATE]
    shape = PoolShape.of(training)
    partition = make_partition(private.labels, training, data_weights(training), generator(seed, "partition"))
    batches = PooledClients(
        private.images, partition, shape, generator(seed, "client batches"), training.partial_batches == "drop"
    )
    steps = planned_training_steps(lab)
    progress.begin("training", steps)
    try:
        trained = train_mocosfl(
            prepared.model,
            batches,
            training,
            steps=steps,
            compute=lab.compute,
            seed=seed,
            hooks=defense,
            server_hooks=audience,
            frozen_client=prepared.frozen_client,
            learning_rate=prepared.learning_rate,
            validate=lambda model: selection_knn(
                model, lab.probe_data, defense, config.evaluation, lab.compute, seed, on=training.select_on
            ),
            observe=lambda model, step, epoch: _leakage(lab, system, model, step, epoch),
            observe_every=0 if how.hijacker else config.leakage.every,
            checkpoints=kept,
            progress=progress,
        )
    except Exception as error:
        raise _failure(system.trained_title(how), error) from error
    finally:
        progress.end()
    seconds = time.monotonic() - started + prepared.earlier_seconds + trained.earlier_seconds - audience.seconds

    progress.begin("utility", 1)
    utility = measure_utility(trained.model, lab.probe_data, defense, config.evaluation, lab.compute, seed)
    untrained = lab.untrained_probe(model_config, system.cut_layer, seed)
    progress.end()
    elements = int(np.prod(trained.model.smashed_shape))
    parameters = count_parameters(trained.model.client)
    paper = paper_traffic(
        parameters,
        elements,
        images=round(len(private) / training.clients),
        epochs=training.epochs,
        frozen=prepared.frozen_client,
    )
    cost = {
        "client_parameters": parameters,
        "client_flops": forward_flops(trained.model.client, trained.model.image_shape),
        "smashed_bytes_per_image": elements * FLOAT_BYTES,
        "training_megabytes": trained.traffic.total / MEBIBYTE,
        "paper_megabytes_per_client": paper.total,
        "training_seconds": seconds,
    }
    return TrainedSystem(system, how, audience, trained, utility, untrained, cost, prepared.frozen_client)


def checkpoints_of(lab: Laboratory, system: System, folder: Path | None, how: Training = HONEST) -> Checkpoints | None:
    """Where `system` keeps the state of its training below `folder`; None for nowhere."""
    if folder is None:
        return None
    model_config = system.defense.plugin.architecture(lab.config.model)
    return Checkpoints(folder / system.trained_stem(how), _identity(lab, system, model_config, how))


def _identity(lab: Laboratory, system: System, model_config: ModelConfig, how: Training) -> str:
    """Everything that decides how a system's training runs, as a digest: what its checkpoints are recognised by."""
    config, defense = lab.config, system.defense
    curve = lab.curve_attacks if config.leakage.every else ()
    document = {
        "system": system.keys,
        "model": [model_config.model_dump(mode="json"), backbone_code(model_config.backbone)],
        "training": config.training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "monitor": [config.evaluation.knn_neighbours, config.evaluation.knn_temperature],
        "leakage": [
            config.leakage.every,
            *([attack.origin, attack.code_sha256, attack.parameters] for attack in curve),
        ],
        "threat": config.threat.model_dump(mode="json") if curve or how.attending else None,
        "attending": [[attack.label, attack.origin, attack.code_sha256, attack.parameters] for attack in how.attending],
        "hijacked": how.hijacker is not None,
        "compute": lab.compute.describe(),
        "roles": {role: record.content_sha256 for role, record in lab.roles.records.items()},
        "defense": [defense.origin, defense.code_sha256, defense.parameters],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _audience(lab: Laboratory, system: System, model: SplitModel, how: Training) -> Audience:
    """The listeners of those who attend the training of `model`, in it from its first message on."""
    model.to(lab.compute.device)
    limit = lab.config.threat.seconds
    seated = [
        seat(attack, grant_stream(lab, system, model, attack), attack_seed(system, attack), limit)
        for attack in how.attending
    ]
    kind = Hijack if how.hijacker else Audience
    return kind(attendee for attendee in seated if attendee is not None)


def attack_seed(system: System, attack: Loaded[Attack]) -> int:
    """The seed with which `attack` tries `system`."""
    return derive_seed(system.seed, "attack", attack.label)


def defender_context(
    lab: Laboratory,
    system: System,
    model_config: ModelConfig,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> DefenderContext:
    """What the defense of `system` may use before training."""
    expert_seed = derive_seed(system.seed, "defender")
    return DefenderContext(
        target_images=lab.roles.defender_target(system.target_fraction).images,
        source_images=lab.roles[Role.DEFENDER_SOURCE].images,
        build_model=lambda: lab.build_model(model_config, system.cut_layer, system.seed),
        training=lab.config.training,
        compute=lab.compute,
        seed=expert_seed,
        progress=progress,
        checkpoints=checkpoints.below(DEFENDER) if checkpoints else None,
    )


def _prepare(
    lab: Laboratory, system: System, model_config: ModelConfig, progress: Progress, checkpoints: Checkpoints | None
) -> PreparedModel:
    context = defender_context(lab, system, model_config, progress, checkpoints)
    try:
        prepared = system.defense.plugin.prepare(context)
    except Exception as error:
        raise _failure(system.title, error) from error
    return prepared or PreparedModel(context.build_model())


def _failure(title: str, error: Exception) -> MocosflPrivError:
    """What a failed training is reported as; a user's defense can fail in any way."""
    if isinstance(error, RunFailedError):
        return RunFailedError(f"{title}: {error}")
    if isinstance(error, MocosflPrivError):
        return error
    return RunFailedError(f"training {title} failed: {type(error).__name__}: {error}")


def attack_system(
    lab: Laboratory, trained: TrainedSystem, attack: Loaded[Attack], progress: Progress | None = None
) -> CellResult:
    """Let one attack try the victims of a trained system, and score what it returns.

    Raises RunFailedError when the attack breaks its contract, and ThreatModelError when it reaches for more than
    it was granted.
    """
    system = trained.system
    attended = trained.audience.of(attack.label)
    outcome = _attack(lab, system, trained.model, attack, attack_seed(system, attack), progress, attended)
    values, victims = outcome.values, lab.victims
    keys = {**system.keys, "attack": attack.label}
    row: dict[str, Any] = {
        **{key: keys[key] for key in CELL_KEYS},
        "checkpoint": f"checkpoints/{trained.file_stem}.safetensors",
        "victims": "test",
        "knn_accuracy": float(trained.utility.knn.mean()),
        "linear_accuracy": float(trained.utility.linear.mean()),
        **{
            f"{semi_column(fraction)}_accuracy": float(result.correct.mean())
            for fraction, result in trained.utility.semi_supervised.items()
        },
        **outcome.summary,
        "attack_steps": outcome.steps,
        "attack_queries": outcome.queries,
        "attack_out_of_time": outcome.out_of_time,
        "knn_raw_pixels": float(lab.raw_pixels.mean()),
        "linear_untrained": float(trained.untrained.mean()),
        "probe_selection": lab.config.evaluation.probe_selection,
        **trained.cost,
    }
    per_image = pd.DataFrame(
        {
            **{key: [keys[key]] * len(victims) for key in CELL_KEYS},
            "image": range(len(victims)),
            "group": lab.roles[Role.VICTIMS].groups.numpy(),
            **values,
        }
    )
    return CellResult(row, per_image, (outcome.reconstruction * 255).round().byte().numpy())


@dataclass(frozen=True)
class _Outcome:
    """What one attack returned, how it scored per victim, and what it used."""

    reconstruction: Tensor
    values: dict[str, np.ndarray]
    seconds: float
    steps: int
    queries: int
    out_of_time: bool

    @property
    def summary(self) -> dict[str, float]:
        """What every table says of an attack: mean metrics, floor, leak ratio, time."""
        return {
            **{name: float(self.values[name].mean()) for name in METRICS},
            "mse_floor": float(self.values["mse_floor"].mean()),
            "leak_ratio": leak_ratio(self.values["mse"], self.values["mse_floor"]),
            "attack_seconds": self.seconds,
        }


def _attack(
    lab: Laboratory,
    system: System,
    model: SplitModel,
    attack: Loaded[Attack],
    seed: int,
    progress: Progress | None,
    attended: Attendee | None = None,
) -> _Outcome:
    view = grant_view(lab, system, model, attack, attended)
    budget = Budget(
        lab.config.threat.seconds,
        progress,
        spent_seconds=attended.seconds if attended else 0.0,
        spent_steps=attended.messages if attended else 0,
    )
    try:
        with global_seed(seed, "global"):
            returned = attack.plugin.reconstruct(view, budget, seed)
    except MocosflPrivError:
        raise
    except Exception as error:  # a user's attack can fail in any way
        raise RunFailedError(
            f"attack {attack.label!r} on {system.title} failed: {type(error).__name__}: {error}"
        ) from error
    seconds = budget.elapsed
    reconstruction = check_reconstruction(returned, tuple(lab.victims.shape), attack.label)
    scores = score(reconstruction, lab.victims, lab.floor, lab.lpips)
    values = {name: value.numpy() for name, value in scores.items()}
    return _Outcome(reconstruction, values, seconds, budget.steps, view.queries, budget.exhausted)


def _leakage(lab: Laboratory, system: System, model: SplitModel, step: int, epoch: float) -> list[dict[str, Any]]:
    """A point of the training-time leakage curve: every curve attack on the live model. It leaves training alone.

    The attacks start afresh at every point, with the seed they have against the finished model.
    """
    rows = []
    for attack in lab.curve_attacks:
        outcome = _attack(lab, system, model, attack, attack_seed(system, attack), None)
        rows.append({"attack": attack.label, "step": step, "epoch": epoch, **outcome.summary})
    return rows


def grant_stream(lab: Laboratory, system: System, model: SplitModel, attack: Loaded[Attack]) -> StreamView:
    """What one attack holds while it attends the training of `model`, whose server networks it sees live."""
    return StreamView(
        smashed_shape=model.smashed_shape,
        image_shape=model.image_shape,
        compute=lab.compute,
        visible=visible_to(attack, lab.threat),
        server=live_server(model.trunk, model.projector, lab.compute),
        protect=partial(_protect_afresh, system.defense.plugin) if lab.threat.adaptive else None,
        auxiliary=copied_auxiliary(lab.auxiliary),
        build_client=_client_builder(lab, system),
    )


def grant_view(
    lab: Laboratory, system: System, model: SplitModel, attack: Loaded[Attack], attended: Attendee | None = None
) -> AttackerView:
    """The view of one attack: what it declared, as far as the threat model grants it, and nothing else."""
    plugin = attack.plugin
    lab.threat.require(plugin.needs, attack.label)
    device = lab.compute.device
    # Copies: what one attack does to its client or its images must not reach the next attack or the checkpoint.
    client = copy.deepcopy(model.client).to(device).eval().requires_grad_(False)
    auxiliary = copied_auxiliary(lab.auxiliary)
    defense = system.defense.plugin
    with torch.no_grad():
        smashed = torch.cat([client(batch.to(device)) for batch in lab.victims.split(BATCH)])
        smashed = defense.protect(smashed, generator(system.seed, "victims' messages", device=device))
    attacker_rng = generator(system.seed, "attacker's queries", attack.label, device=device)
    return AttackerView(
        smashed=smashed,
        image_shape=model.image_shape,
        compute=lab.compute,
        visible=visible_to(attack, lab.threat),
        client=client,
        protect=partial(_protect, defense, attacker_rng),
        knows_defense=lab.threat.adaptive,
        simulates_queries=Capability.CLIENT_WEIGHTS in lab.threat.grants,
        auxiliary=auxiliary,
        build_client=_client_builder(lab, system),
        listener=attended.listener if attended else None,
    )


def _client_builder(lab: Laboratory, system: System) -> Callable[[], nn.Module]:
    """Builds untrained clients; bound to settings only: a closure over the laboratory would carry the victims along."""
    return partial(
        _untrained_client,
        system.defense.plugin.architecture(lab.config.model),
        system.cut_layer,
        lab.config.data.image_size,
        lab.colour_statistics,
        derive_seed(system.seed, "attacker's clone"),
        lab.compute.device,
    )


def _protect_afresh(defense: Defense, smashed: Tensor) -> Tensor:
    return defense.protect(smashed, drawn_generator(smashed.device))


def _protect(defense: Defense, rng: torch.Generator, smashed: Tensor) -> Tensor:
    return defense.protect(smashed, rng)


def _untrained_client(
    model: ModelConfig,
    cut_layer: int,
    image_size: int,
    colour_statistics: tuple[list[float], list[float]],
    seed: int,
    device: torch.device,
) -> nn.Module:
    return _fresh_model(model, cut_layer, image_size, colour_statistics, seed).client.to(device)


def _fresh_model(
    model: ModelConfig, cut_layer: int, image_size: int, colour_statistics: tuple[list[float], list[float]], seed: int
) -> SplitModel:
    with global_seed(seed, "initialisation"):
        return build_split_model(model, cut_layer, image_size, *colour_statistics)
