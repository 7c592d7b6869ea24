"""Running experiments: demo, new, check, try, run, sweep, validate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mocosfl_priv.commands.options import (
    AttackOption,
    DebugOption,
    DefenseOption,
    OverwriteOption,
    ScaleOption,
    SetOption,
    config_path,
    experiment_of,
)
from mocosfl_priv.commands.tables import print_places, print_table, show_reading, show_warnings
from mocosfl_priv.errors import ConfigurationError, unknown_name

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.config import ComputeConfig
    from mocosfl_priv.sweep.schedule import Engine

app = typer.Typer()

ResumeDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Save training checkpoints here; after an interruption, the same command resumes."
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the sweep in --out; stored parts are not computed again.")
]
EngineOption = Annotated[
    str, typer.Option(metavar="local|ray", help="Processes on this machine, or the Ray cluster that RAY_ADDRESS names.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Number of parallel tasks on this machine. Default: one per core, or per GPU."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory to write; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    debug: DebugOption = False,
) -> None:
    """Train, attack and report on photographs that come with the package; takes minutes on two cores."""
    _run("demo", out, set_, defense, attack, overwrite=True)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="attack|defense")],
    file: Annotated[Path, typer.Argument(help="The file to write; its class is named after it.")],
    debug: DebugOption = False,
) -> None:
    """Write a commented attack or defense to start from, and its test beside it."""
    from mocosfl_priv.plugins.scaffold import new_plugin

    then = {"attack": f"mocosfl-priv run demo --attack {file} --out runs/mine", "defense": f"mocosfl-priv try {file}"}
    if kind not in then:
        raise unknown_name("kind", kind, then)
    source, test = new_plugin(kind, file)
    what = "an attack that works" if kind == "attack" else "a defense that works, with every hook"
    print(f"{source}: {what}; edit it\n{test}: pytest {test}")
    print(f"then: {then[kind]}")


@app.command()
def check(
    kind: Annotated[str, typer.Argument(metavar="attack|defense")],
    plugin: Annotated[str, typer.Argument(metavar="FILE.py[:CLASS]|NAME", help="Made with its default parameters.")],
    debug: DebugOption = False,
) -> None:
    """Check an attack or a defense against the contract that all of them keep, on a small model, in seconds."""
    from mocosfl_priv.config import PluginSpec
    from mocosfl_priv.plugins import ATTACKS, DEFENSES
    from mocosfl_priv.plugins.attack_checks import require_attack_contract
    from mocosfl_priv.plugins.defense_checks import require_defense_contract

    spec = PluginSpec(name=plugin)
    if kind == "attack":
        require_attack_contract(lambda: ATTACKS.create(spec).plugin, plugin)
    elif kind == "defense":
        require_defense_contract(lambda: DEFENSES.create(spec).plugin, plugin)
    else:
        raise unknown_name("kind", kind, ("attack", "defense"))
    print(f"{plugin} keeps the contract of {'an attack' if kind == 'attack' else 'a defense'}")


@app.command("try")
def try_(
    defense: Annotated[str, typer.Argument(metavar="FILE.py[:CLASS]|NAME", help="The defense to judge.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory to write; an earlier trial there is replaced. Default: runs/try-NAME."),
    ] = None,
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Compare a defense with no defense and with TAResSFL at matched accuracy, and give a verdict; takes minutes."""
    experiment = _trial(defense, set_)
    _run_to(out or Path("runs") / f"try-{experiment.config.candidate}", experiment, overwrite=True)


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    resume_dir: ResumeDirOption = None,
    overwrite: OverwriteOption = False,
    scale: ScaleOption = None,
    debug: DebugOption = False,
) -> None:
    """Run an experiment and write its results and report to a directory, all of them or none."""
    _run(config, out, set_, defense, attack, overwrite, resume_dir, scale)


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="A YAML file, with or without axes, or a name from `ls configs`.")],
    out: Annotated[
        Path, typer.Option(help="Folder to write: a store of computed parts, and a run directory per variant.")
    ],
    resume: ResumeOption = False,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    scale: ScaleOption = None,
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    debug: DebugOption = False,
) -> None:
    """Run a grid of experiments in parallel. Parts that cells share are computed once; a sweep can be resumed."""
    from mocosfl_priv.api import Sweep
    from mocosfl_priv.commands.progress_bars import TerminalSweep

    planned = Sweep.from_yaml(config_path(config), set_ or [], defense or [], attack or [], scale)
    runs_on = _engine(engine, workers, planned.document.compute)
    with TerminalSweep(Console(stderr=True), runs_on.slots) as progress:
        result = planned.run(out, runs_on, progress, resume=resume)
    for name, run in result.runs.items():
        print_table(run)
        print(f"\nrun: {out / 'runs' / name}\n")
    print(f"table of all variants:  {out / 'results.csv'}")
    if planned.document.variants[0].labels and (result.cells["failure"] == "").any():
        print(f"report of all variants: {result.report()}")
    result.require_success()


@app.command()
def validate(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    scale: ScaleOption = None,
    debug: DebugOption = False,
) -> None:
    """Check a configuration against plugins, models, threat model and data, without training anything."""
    plan = experiment_of(config, set_, defense, attack, scale).checked()
    print("\n".join([*plan.context.roles.reading, *(f"warning: {warning}" for warning in plan.warnings)]))
    print(f"valid: {plan.summary}; configuration {plan.config.digest[:12]}")


def _engine(name: str, workers: int | None, compute: ComputeConfig) -> Engine:
    engines = ("local", "ray")
    if name not in engines:
        raise unknown_name("engine", name, engines)
    threads = compute.threads or 1
    if name == "ray":
        if workers is not None:
            raise ConfigurationError(
                "--workers counts processes on this machine; leave it out with --engine ray, which uses the cluster"
            )
        from mocosfl_priv.sweep.ray_cluster import RayEngine

        return RayEngine(cpus=threads, gpus=1 if compute.device == "cuda" else 0)
    from mocosfl_priv.sweep.processes import local_engine

    return local_engine(compute, workers)


def _trial(reference: str, overrides: Sequence[str] | None) -> Experiment:
    """Return the shipped configuration `try` with the defense `reference` added as its candidate.

    Raises ConfigurationError, before any data is read, if the defense cannot be loaded or fails a basic check.
    """
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.config import PluginSpec, with_candidate
    from mocosfl_priv.plugins import DEFENSES, Defense
    from mocosfl_priv.plugins.defense_checks import require_protection

    spec = PluginSpec(name=reference)
    # a defense with its own `prepare` may take long to prepare; its faults then show in training
    if DEFENSES.load(reference).prepare is Defense.prepare:
        require_protection(lambda: DEFENSES.create(spec).plugin, reference)
    experiment = experiment_of("try", overrides, None, None)
    return Experiment(with_candidate(experiment.config, reference))


def _run(
    config: str,
    out: Path,
    overrides: Sequence[str] | None,
    defenses: Sequence[str] | None,
    attacks: Sequence[str] | None,
    overwrite: bool,
    resume_dir: Path | None = None,
    scale: str | None = None,
) -> None:
    _run_to(out, experiment_of(config, overrides, defenses, attacks, scale), overwrite, resume_dir)


def _run_to(out: Path, experiment: Experiment, overwrite: bool, resume_dir: Path | None = None) -> None:
    """Run an experiment, write its run directory, and print its table, and the verdict if it has a candidate."""
    from mocosfl_priv.api import run_planned
    from mocosfl_priv.commands.progress_bars import TerminalProgress
    from mocosfl_priv.experiment.disk import result_bytes
    from mocosfl_priv.results import Destination
    from mocosfl_priv.runtime.imports import own_package

    own_package("reports")  # fail before the run, not after it, if the package cannot be used
    console = Console(stderr=True)
    with Destination(out, overwrite) as destination:
        if resume_dir is not None:
            destination.require_apart(resume_dir, "--resume-dir")
        with console.status("reading data"):
            plan = experiment.checked()
        destination.require_room(result_bytes(plan))
        show_reading(console, plan.context.roles)
        show_warnings(console, plan.warnings)
        with TerminalProgress(console) as progress:
            result = run_planned(plan, progress, resume_dir)
        page = result.report_to(destination)
    print_table(result)
    print_places(page)
    verdict = page.parent / "verdict.txt"
    if verdict.is_file():
        print(f"\nverdict, also in {verdict}:\n\n{verdict.read_text(encoding='utf-8')}")
    result.require_success()
