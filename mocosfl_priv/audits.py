"""Attacks on models that are there already: a split model of your own, and the trained systems of a finished run.

from mocosfl_priv import audit
found = audit(client, victims=images, auxiliary=others)
found.report("runs/mine")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mocosfl_priv.api import RunResult
from mocosfl_priv.config import parse_config
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.own_data import read_images
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.experiment.attack_again import AgainPlan, plan_again, require_settable, run_again, stored_system
from mocosfl_priv.experiment.own_audit import OwnAuditPlan, image_shape_of, limited, plan_own_audit, run_own_audit
from mocosfl_priv.models.own_model import OwnSplit, own_splits
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.results import read_record, run_folders
from mocosfl_priv.runtime.progress import Progress

MOST_VICTIMS = 128  # of an audit, unless more are asked for
SECONDS = 120  # of one attack, unless a limit is given: the ensemble would take hours without one


def audit(
    client: nn.Module,
    server: nn.Module | None = None,
    *,
    victims: Any,
    auxiliary: Any,
    cuts: Sequence[str] = (),
    build_untrained: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]] | None = None,
    defense: str | Mapping[str, Any] | None = None,
    attacks: Sequence[str | Mapping[str, Any]] = ("ensemble",),
    labels: Any = None,
    threat: Mapping[str, Any] | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = MOST_VICTIMS,
    linkage_candidates: int | None = None,
    seed: int = 0,
    name: str = "audit",
    progress: Progress | None = None,
) -> RunResult:
    """Measure what a split model of your own leaks. Nothing is trained but the attacks' own networks.

    Args:
        client: The layers that a device runs, or with `cuts` a whole network: images float (n, c, h, w) in [0, 1] to
            smashed data (n, ...). Normalisation belongs to it. It is used in eval mode, and is not changed.
        server: The layers that the server runs, if it is known: smashed data to features or class scores.
        victims: The images under attack: an array, tensor, path or data set; see docs/tasks/own-data.md. The model was
            best not trained on them, unless the question is what it leaks of its training images.
        auxiliary: The attacker's images, likewise. The closer they are to the victims, the stronger is the attacker.
        cuts: Names of modules of a whole network: it is cut after each, and every cut is attacked.
        build_untrained: Makes a client with new weights, for several cuts one function each; by default, the weights of
            `client` are drawn anew.
        defense: A defense that changes messages, by name or as a mapping with parameters; it is compared with none.
        attacks: Attacks by name, or as mappings with parameters. The blind guess is always among them.
        labels: Classes of the victims, (n,), or a CSV file; for accuracies, cross-validated among the victims.
        threat: The keys of the configuration's section `threat`, such as ``{"seconds": 600}``. Without a limit in it,
            an attack on one system takes at most 120 seconds; ``{"seconds": None}`` sets none.
        size: Pixels per side, or (height, width), to which images are resized; None leaves them as they are.
        channels: 1 for grey, 3 for colour; None for what the victims are.
        limit: At most this many victims, drawn by `seed`; None for all.
        linkage_candidates: Images with which the victims' messages are matched: the victims' own and auxiliary ones; 0
            for none. None for 2000, or at least 1000.
        seed: Of all draws.
        name: In the report.
        progress: What is told how far the audit is.

    Returns:
        The result, with one system per cut and defense.

    Raises:
        ConfigurationError: The model, the images or the settings do not fit, before anything is computed.
        RunFailedError: While the audit runs.

    >>> import torch
    >>> images = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> found = audit(torch.nn.Conv2d(3, 8, 3, padding=1), victims=images[:8], auxiliary=images[8:], attacks=["floor"])
    >>> found.table()["attack"].tolist()
    ['floor']
    """
    cuts = [cuts] if isinstance(cuts, str) else cuts
    attacked, known = read_audited(
        victims, auxiliary, size=size, channels=channels, labels=labels, limit=limit, seed=seed
    )  # fmt: skip
    splits = own_splits(client if server is None else (client, server), image_shape_of(attacked), cuts)
    planned = plan_model_audit(
        splits, attacked, known, build_untrained=build_untrained, defense=defense,
        settings={"name": name, "seeds": [seed], "attacks": attacks, "threat": threat or {}},
        overrides=[] if linkage_candidates is None else [f"evaluation.linkage_candidates={linkage_candidates}"],
    )  # fmt: skip
    return RunResult(run_own_audit(planned, progress))


def read_audited(
    victims: Any,
    auxiliary: Any,
    *,
    size: int | tuple[int, int] | None,
    channels: int | None,
    labels: Any,
    limit: int | None,
    seed: int,
) -> tuple[ImageSet, ImageSet]:
    """Read the victims and the attacker's images of an audit; see :func:`audit` for the arguments."""
    require_limit(limit)
    attacked, _ = read_images(victims, size=size, channels=channels, labels=labels)
    known, _ = read_images(auxiliary, size=size, channels=attacked.images.shape[1])
    return limited(attacked, limit, seed), known


def require_limit(limit: int | None) -> None:
    """Raise ConfigurationError unless `limit`, of the number of victims, is None or at least 1."""
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit: at least one victim has to be attacked, not {limit}")


def plan_model_audit(
    splits: Sequence[OwnSplit],
    victims: ImageSet,
    auxiliary: ImageSet,
    *,
    settings: Mapping[str, Any],
    overrides: Sequence[str] = (),
    build_untrained: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]] | None = None,
    defense: str | Mapping[str, Any] | None = None,
    model: str = "given in Python",
) -> OwnAuditPlan:
    """Check an audit of a model of one's own; see :func:`audit`. settings: sections of a configuration."""
    require_settable(overrides, "an audit has no other settings")
    threat = settings.get("threat", {})
    if not isinstance(threat, Mapping):
        raise ConfigurationError(f"threat: a mapping of keys is needed, not {threat!r}")
    chosen = {f"threat.{key}" for key in threat} | {text.partition("=")[0].strip() for text in overrides}
    default = {} if chosen & {"threat.seconds", "threat.steps"} else {"seconds": SECONDS}
    document = {
        **settings,
        "threat": {**default, **threat},
        "attacks": _with_floor(settings["attacks"]),
        "defenses": ["none"] if defense in (None, "none") else ["none", defense],
        "cut_layers": list(range(1, len(splits) + 1)),
        "data": {"dataset": victims.name, "source": auxiliary.name, "victims": len(victims)},
        "evaluation": {"recognition_epochs": 0, "label_fractions": []},
    }
    config = parse_config(document, overrides)
    defenses = [DEFENSES.create(spec) for spec in config.defenses]
    builders = [build_untrained] if callable(build_untrained) else build_untrained or ()
    return plan_own_audit(config, splits, victims, auxiliary, defenses, builders, model)


def attack_again(
    folder: Path | str,
    attacks: Sequence[str | Mapping[str, Any]] = ("ensemble",),
    *,
    victims: Any = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    tell: Callable[[AgainPlan], None] = lambda _: None,
) -> list[tuple[dict[str, str], RunResult]]:
    """Attack the trained systems of a finished run or sweep again. Nothing is trained but the attacks' own networks.

    Args:
        folder: A run directory, or the folder of a sweep.
        attacks: Names or references, or mappings with parameters. The blind guess is always among them.
        victims: Other images to attack, of the same size; see docs/tasks/own-data.md. None for the run's own.
        limit: At most so many of `victims`, drawn by seed 0.
        overrides: ``key=value`` texts for threat model, metrics and machine, and for `attacks` with parameters.
        progress: What is told how far it is.
        tell: Called with every plan before anything is computed.

    Returns:
        The results, a run each, with its labels on the axes of the sweep; none for a single run. Their rows identify
        the systems as the rows of the run do, and repeat what was measured of them.

    Raises:
        ConfigurationError: Before anything is computed: the runs hold no trained systems, or what was asked for does
            not fit them.
        RunFailedError: While attacks run.

    >>> attack_again("runs/no-such-run", ["floor"])
    Traceback (most recent call last):
        ...
    mocosfl_priv.errors.ConfigurationError: ...

    """
    require_limit(limit)
    if limit is not None and victims is None:
        raise ConfigurationError("limit: it is about `victims`; without them, the run's own are attacked, all of them")
    runs = [(place, labels, read_record(place)) for place, labels in run_folders(Path(folder))]
    others = None
    if victims is not None:
        _, channels, height, width = next(iter(runs[0][2].images.values())).shape
        others = limited(read_images(victims, size=(height, width), channels=channels)[0], limit, 0)
    chosen = _with_floor(attacks)
    plans = [(labels, plan_again(place, record, chosen, overrides, others)) for place, labels, record in runs]
    for _, planned in plans:
        tell(planned)
    if progress is not None:
        progress.plan([segment for _, planned in plans for segment in planned.segments])
    return [(labels, RunResult(run_again(planned, progress))) for labels, planned in plans]


def load_model(
    folder: Path | str,
    *,
    defense: str | None = None,
    cut_layer: int | None = None,
    target_fraction: float | None = None,
    seed: int | None = None,
) -> SplitModel:
    """Load a trained model of a finished run. Its data must still be where the run found it.

    Args:
        folder: A run directory.
        defense: Its label; may be left out where the run has only one, as may the others.
        cut_layer: The cut, from 1.
        target_fraction: The share of target data of the defense.
        seed: The training seed.

    Returns:
        The model in eval mode: `client`, images float (n, 3, h, w) in [0, 1] to smashed data; `trunk`, smashed data to
        features float (n, d); and `projector`. What the defense does to messages is not part of it.

    Raises:
        ConfigurationError: No system, or more than one, has these keys; or its file cannot be used.

    >>> load_model("runs/no-such-run", seed=0)
    Traceback (most recent call last):
        ...
    mocosfl_priv.errors.ConfigurationError: ...

    """
    place = Path(folder)
    record = read_record(place)
    asked = {"defense": defense, "cut_layer": cut_layer, "target_fraction": target_fraction, "seed": seed}
    asked = {name: value for name, value in asked.items() if value is not None}
    planned = plan_again(place, record, ["floor"]).plan
    found = [system for system in planned.systems if asked.items() <= system.keys.items()]
    if len(found) != 1:
        there = "; ".join(system.title for system in planned.systems)
        raise ConfigurationError(f"{place}: {len(found)} systems have {asked}; it holds {there}")
    _, model = stored_system(planned.context, found[0], place)
    for part in (model.client, model.trunk, model.projector):
        part.eval()
    return model


def _with_floor(attacks: str | Sequence[str | Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
    """The attacks, with the blind guess first where it is not among them."""
    entries = [attacks] if isinstance(attacks, str | Mapping) else list(attacks)
    for entry in entries:
        if not isinstance(entry, str | Mapping):
            raise ConfigurationError(f"attacks: {entry!r} is neither a name nor a mapping with a name and parameters")
    names = [entry if isinstance(entry, str) else entry.get("name") for entry in entries]
    return [*([] if "floor" in names else ["floor"]), *entries]
