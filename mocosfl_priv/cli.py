"""The command line: demo, new, try, run, sweep, report, compare, export, mirror, validate, ls; and for real clients
certs, shard, serve, client, loopback, cost.

Exit codes: 0 success; 2 the request cannot be run as written; 3 a run failed; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from mocosfl_priv.errors import ConfigurationError, MocosflPrivError, unknown_name

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment, RunResult
    from mocosfl_priv.config import ComputeConfig
    from mocosfl_priv.deployment.server import ServeOptions
    from mocosfl_priv.progress import Progress
    from mocosfl_priv.results import RunRecord
    from mocosfl_priv.sweep.grid import Plan
    from mocosfl_priv.sweep.schedule import Engine

EXIT_UNUSABLE, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 130

app = typer.Typer(
    name="mocosfl-priv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How much does a split-learning system leak, and at what price is it defended?\n\n"
    "Start with `mocosfl-priv demo`. Exit codes: 0 success, 2 unusable request, 3 failed run.",
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a configuration key; VALUE is YAML. Repeatable."),
]
DefenseOption = Annotated[
    list[str] | None,
    typer.Option("--defense", metavar="NAME|FILE.py[:CLASS]", help="Add a defense to the configuration. Repeatable."),
]
AttackOption = Annotated[
    list[str] | None,
    typer.Option("--attack", metavar="NAME|FILE.py[:CLASS]", help="Add an attack to the configuration. Repeatable."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
CheckpointsOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep the state of trainings here; after an interruption, go on from it."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on in --out: what is stored there is not computed again.")
]
EngineOption = Annotated[
    str, typer.Option(metavar="local|ray", help="Processes on this machine, or the Ray cluster that RAY_ADDRESS names.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Tasks at once on this machine. [default: one per core, or per GPU]")
]
ScaleOption = Annotated[
    str | None,
    typer.Option(metavar="tiny", help="Shrink the configuration to minutes on two cores; --set goes on top of it."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out, once done.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; an earlier demo there is replaced.")] = Path("runs/demo"),
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    debug: DebugOption = False,
) -> None:
    """Train, attack, report: the whole path on embedded photographs, in minutes on two cores."""
    _run("demo", out, set_, defense, attack, overwrite=True)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="defense")],
    file: Annotated[Path, typer.Argument(help="The file to write; its class is named after it.")],
    debug: DebugOption = False,
) -> None:
    """Write a commented defense to start from, and its test beside it."""
    from mocosfl_priv.scaffold import new_defense

    kinds = {"defense": new_defense}
    if kind not in kinds:
        raise unknown_name("kind", kind, kinds)
    source, test = kinds[kind](file)
    print(f"{source}: a defense that works, with every hook; edit it\n{test}: pytest {test}")
    print(f"then: mocosfl-priv try {source}")


@app.command("try")
def try_(
    defense: Annotated[str, typer.Argument(metavar="FILE.py[:CLASS]|NAME", help="The defense on trial.")],
    out: Annotated[
        Path | None, typer.Option(help="Run directory; an earlier trial there is replaced. [default: runs/try-NAME]")
    ] = None,
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Give a verdict on a defense, against none and TAResSFL at matched accuracy, in minutes on two cores."""
    experiment = _trial(defense, set_)
    _run_to(out or Path("runs") / f"try-{experiment.config.candidate}", experiment, overwrite=True)


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    checkpoints: CheckpointsOption = None,
    overwrite: OverwriteOption = False,
    scale: ScaleOption = None,
    debug: DebugOption = False,
) -> None:
    """Run an experiment and write its results and report to a directory, as a whole or not at all."""
    _run(config, out, set_, defense, attack, overwrite, checkpoints, scale)


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="A YAML file, with axes or without, or a name from `ls configs`.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep: its store, and a run directory per variant.")],
    resume: ResumeOption = False,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    scale: ScaleOption = None,
    set_: SetOption = None,
    defense: DefenseOption = None,
    attack: AttackOption = None,
    debug: DebugOption = False,
) -> None:
    """Run a grid in parallel that survives anything: what is complete is kept, and shared where cells need the same."""
    from mocosfl_priv.api import Sweep
    from mocosfl_priv.display import TerminalSweep

    planned = Sweep.from_yaml(_config_path(config), set_ or [], defense or [], attack or [], scale)
    runs_on = _engine(engine, workers, planned.document.variants[0].config.compute)
    with TerminalSweep(Console(stderr=True), runs_on.slots) as observer:
        result = planned.run(out, runs_on, observer, resume=resume)
    for name, run in result.runs.items():
        _print_table(run)
        print(f"\nreport: {out / 'runs' / name / 'report.html'}\n")
    print(f"table of all:  {out / 'results.csv'}")
    result.require_success()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    debug: DebugOption = False,
) -> None:
    """Write the report of a stored run again."""
    from mocosfl_priv.results import read_record, replace_files
    from reports import write_report

    record = read_record(folder)
    replace_files(folder, lambda staging: write_report(record, staging))
    print(folder / "report.html")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    debug: DebugOption = False,
) -> None:
    """Compare two runs: paired where they attacked the same victims with the same seeds, else saying why not."""
    from mocosfl_priv.results import read_record
    from reports import compare_runs

    found = compare_runs(read_record(first), read_record(second))
    if not found.lines:
        print("no system was attacked by the same attack in both runs, so there is nothing to compare")
    else:
        table = Table()
        for heading in found.headings:
            table.add_column(heading)
        for line in found.lines:
            table.add_row(*line.cells())
        Console(width=None if sys.stdout.isatty() else 200).print(table)
        print(f"Not paired: {found.unpaired}." if found.unpaired else found.statement)
    for note in found.notes:
        print(note)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A row per cell.")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="A row per victim and cell.")] = None,
    latex: Annotated[Path | None, typer.Option(metavar="FILE", help="Tables as papers print them.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="The same as Markdown.")] = None,
    debug: DebugOption = False,
) -> None:
    """Write a stored run's tables to files, those of the papers beside the published numbers."""
    from mocosfl_priv.results import read_record
    from reports import export_tables

    asked = {"csv": csv, "parquet": parquet, "latex": latex, "markdown": markdown}
    files = {form: path for form, path in asked.items() if path is not None}
    export_tables(read_record(folder), files)
    for path in files.values():
        print(path)


@app.command()
def mirror(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write event files into a folder below, named after the run.")
    ] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Log to this tracking server.")] = None,
    debug: DebugOption = False,
) -> None:
    """Show a stored run in TensorBoard or MLflow, beside others."""
    from mocosfl_priv.mirrors import Mirror, MLflow, TensorBoard
    from mocosfl_priv.results import read_record

    if tensorboard is None and mlflow is None:
        raise ConfigurationError("nowhere to show it: name a folder with --tensorboard, or a server with --mlflow")
    record = read_record(folder)
    mirrors: dict[str, Mirror] = {}
    if tensorboard is not None:
        mirrors[str(tensorboard)] = TensorBoard(tensorboard)
    if mlflow is not None:
        mirrors[mlflow] = MLflow(mlflow)
    for place, chosen in mirrors.items():
        chosen.show(record, folder)
        print(f"{folder} is shown at {place}")


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
    plan = _experiment(config, set_, defense, attack, scale).checked()
    print(f"valid: {plan.summary}; configuration {plan.config.digest[:12]}")


CertsOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="As `mocosfl-priv certs` made it: ca.pem and this end's own.")
]
PlainOption = Annotated[bool, typer.Option("--plain", help="No encryption: loopback addresses only.")]
CodecOption = Annotated[
    str | None,
    typer.Option("--codec", metavar="fp32|fp16|int8", help="How smashed data travel. [default: training.codec]"),
]
GradientCodecOption = Annotated[
    str | None,
    typer.Option("--gradient-codec", metavar="fp32|fp16|int8", help="The same for gradients. [default: its own key]"),
]
DeadlineOption = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="A step goes on without devices that have not answered.")
]
PatienceOption = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="The run fails after so long without any device.")
]


@app.command()
def certs(
    out: Annotated[Path, typer.Option(help="Folder to write; devices are added where it has an authority.")],
    devices: Annotated[int, typer.Option(min=1, help="How many devices: client-0000 and so on.")],
    host: Annotated[list[str] | None, typer.Option(help="The server's names and addresses. Repeatable.")] = None,
    debug: DebugOption = False,
) -> None:
    """Make a small certificate authority, and certificates for the server and each device."""
    from mocosfl_priv.deployment.certificates import make_certificates

    made = make_certificates(out, devices, host or [])
    print(f"{out}: the server's, for {', '.join(host or ['this machine only'])}; keep {out / 'ca.key'} to yourself")
    print(f"{made[0]} to {made[-1]}: copy each to its device")


@app.command()
def shard(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Folder for the shard files, one per client.")],
    client: Annotated[int | None, typer.Option(help="Only this client's, counted from 0.")] = None,
    seed: Annotated[int | None, typer.Option(help="One of the configuration's seeds. [default: its first]")] = None,
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the private images of each simulated client to a file for a device."""
    from mocosfl_priv.data.roles import Role
    from mocosfl_priv.deployment.shards import write_shards

    experiment = _experiment(config, set_, None, None)
    chosen = experiment.config.seeds[0] if seed is None else seed
    if chosen not in experiment.config.seeds:
        raise ConfigurationError(f"--seed {chosen} is none of the configuration's: {list(experiment.config.seeds)}")
    private = experiment.plan().laboratory.roles[Role.CLIENT_PRIVATE]
    for path, images in write_shards(private, experiment.config.training, chosen, out, client):
        print(f"{path}: {images} images")


@app.command()
def serve(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT")],
    certs: CertsOption = None,
    plain: PlainOption = False,
    device: Annotated[
        list[int] | None, typer.Option(help="This client is a device, others are simulated. Repeatable. [default: all]")
    ] = None,
    least: Annotated[int | None, typer.Option(help="Begin when so many devices are there. [default: all]")] = None,
    deadline: DeadlineOption = 10.0,
    patience: PatienceOption = 600.0,
    codec: CodecOption = None,
    gradient_codec: GradientCodecOption = None,
    heartbeat: Annotated[float, typer.Option(min=0.1, metavar="SECONDS")] = 5.0,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run's state is kept. [default: beside --out]")
    ] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Run an experiment whose clients are devices. After an interruption the same command goes on."""
    from mocosfl_priv.deployment.server import checkpoints_beside
    from mocosfl_priv.deployment.server import serve as run_server

    if plain == (certs is not None):
        raise ConfigurationError("serve: give the folder with the certificates (--certs), or --plain on loopback only")
    options = _serve_options(listen, certs, deadline, patience, heartbeat, device, least)
    place = checkpoints or checkpoints_beside(out)
    _run_devices(
        out, _device_experiment(config, set_, codec, gradient_codec), overwrite,
        lambda plan, progress: run_server(plan, options, place, progress),
    )  # fmt: skip


@app.command()
def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT")],
    data: Annotated[Path, typer.Option(metavar="SHARD|FOLDER", help="This client's images.")],
    certs: CertsOption = None,
    plain: PlainOption = False,
    name: Annotated[str, typer.Option(help="With --plain: which client this is, as in client-0003.")] = "",
    image_size: Annotated[int | None, typer.Option(help="Of an image folder's images, as in the model.")] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="Give up after so long without a server. [default: never]")
    ] = float("inf"),
    meter: Annotated[
        str | None, typer.Option(help="Of energy: auto, pmic, rapl, ina219:BUS:ADDRESS:SHUNT, ina3221:...")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Take part in a served run; devices have this without torch as `mocosfl-priv-client`."""
    from mocosfl_priv.device.client import run
    from mocosfl_priv.device.errors import DeviceError

    _log_to_terminal()
    try:
        run(server, certs, data, plain, name, image_size, patience, meter)
    except DeviceError as error:
        raise ConfigurationError(str(error)) from error


@app.command()
def loopback(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    clients: Annotated[int, typer.Option(min=1, help="Clients that are processes; all others are simulated.")] = 4,
    plain: PlainOption = False,
    deadline: DeadlineOption = 10.0,
    patience: PatienceOption = 120.0,
    codec: CodecOption = None,
    gradient_codec: GradientCodecOption = None,
    heartbeat: Annotated[float, typer.Option(min=0.1, metavar="SECONDS")] = 1.0,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Server and devices as processes of this machine, with certificates and shards: ends with what each costs."""
    import tempfile

    from mocosfl_priv.deployment.loopback import run_loopback

    experiment = _device_experiment(config, set_, codec, gradient_codec)
    with tempfile.TemporaryDirectory(prefix="mocosfl-priv-loopback-") as folder:
        certs = None if plain else Path(folder)
        options = _serve_options("", certs, deadline, patience, heartbeat, None, None)
        _run_devices(
            out, experiment, overwrite,
            lambda plan, progress: run_loopback(plan, options, clients, Path(folder), progress),
        )  # fmt: skip


@app.command()
def cost(
    folder: Annotated[Path, typer.Argument(help="The run directory of a served run.")],
    debug: DebugOption = False,
) -> None:
    """Show what the devices of a run cost, each number with its method, and write it to cost.csv again."""
    from mocosfl_priv.results import read_record

    _report_cost(read_record(folder).info, folder)


@app.command("ls")
def list_(
    kind: Annotated[str, typer.Argument(metavar="{attacks|defenses|datasets|models|configs|capabilities|results}")],
    folder: Annotated[Path, typer.Option("--in", help="Of results: all run directories below.")] = Path("runs"),
    sql: Annotated[
        str | None, typer.Option(help="Of results: a query on the tables cells and per_image, for DuckDB.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """List what can be named in a configuration, or what has been measured."""
    listings: dict[str, Callable[[], Listing]] = {
        "attacks": _list_attacks,
        "defenses": _list_defenses,
        "datasets": _list_datasets,
        "models": _list_models,
        "configs": _list_configs,
        "capabilities": _list_capabilities,
        "results": partial(_list_results, folder, sql),
    }
    if kind not in listings:
        raise unknown_name("kind", kind, listings)
    table = Table(box=None, pad_edge=False)
    header, rows = listings[kind]()
    for column in header:
        table.add_column(column, no_wrap=column == header[0])
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


Listing = tuple[list[str], list[list[str]]]


def _list_attacks() -> Listing:
    from mocosfl_priv.plugins import ATTACKS, summary

    rows = []
    for name, origin in ATTACKS.origins().items():
        cls = ATTACKS.load(name)
        rows.append([name, ", ".join(sorted(cls.needs)) or "nothing", summary(cls), origin])
    return ["name", "needs", "what it does", "from"], rows


def _list_defenses() -> Listing:
    from mocosfl_priv.plugins import DEFENSES, summary

    return ["name", "what it does", "from"], [
        [name, summary(DEFENSES.load(name)), origin] for name, origin in DEFENSES.origins().items()
    ]


def _list_datasets() -> Listing:
    from mocosfl_priv.data.datasets import NAMES

    return ["name", "what it is"], [[name, text] for name, text in NAMES.items()]


def _list_models() -> Listing:
    from mocosfl_priv.models.backbones import BACKBONES

    listed = [[name, f"1 to {backbone.units}", backbone.summary] for name, backbone in BACKBONES.items()]
    own = [
        "FILE.py:FUNCTION",
        "1 to its units",
        "your own list of torch modules",
    ]
    return ["name", "cut layers", "what it is"], [*listed, own]


def _list_configs() -> Listing:
    from mocosfl_priv.config import read_document

    return ["name", "what it shows"], [
        [name, str(read_document(path).get("description", ""))] for name, path in _shipped_configs().items()
    ]


def _list_results(folder: Path, sql: str | None) -> Listing:
    from mocosfl_priv.catalogue import OVERVIEW, query

    found = query(folder, sql or OVERVIEW)
    return list(found.columns), [[_shown(value) for value in row] for row in found.itertuples(index=False)]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _list_capabilities() -> Listing:
    from mocosfl_priv.threat import DESCRIPTIONS

    return ["name", "what it grants an attacker"], [
        [capability.value, text] for capability, text in DESCRIPTIONS.items()
    ]


def _shipped_configs() -> dict[str, Path]:
    """Configurations by name: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def _experiment(
    config: str,
    overrides: Sequence[str] | None,
    defenses: Sequence[str] | None,
    attacks: Sequence[str] | None,
    scale: str | None = None,
) -> Experiment:
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.config import parse_config, read_document, with_added_plugins
    from mocosfl_priv.scale import scaled

    path = _config_path(config)
    parsed = parse_config(scaled(read_document(path), scale), overrides or [], where=str(path))
    return Experiment(with_added_plugins(parsed, defenses or [], attacks or []))


def _engine(name: str, workers: int | None, compute: ComputeConfig) -> Engine:
    engines = ("local", "ray")
    if name not in engines:
        raise unknown_name("engine", name, engines)
    threads = compute.threads or 1
    if name == "ray":
        from mocosfl_priv.sweep.ray_cluster import RayEngine

        return RayEngine(cpus=threads, gpus=1 if compute.device == "cuda" else 0)
    from mocosfl_priv.sweep.processes import LocalEngine, default_workers

    count, gpus = default_workers(compute)
    return LocalEngine(workers or count, gpus)


def _config_path(config: str) -> Path:
    path = Path(config)
    if path.is_file():
        return path
    shipped = _shipped_configs()
    if config not in shipped:
        raise unknown_name("configuration (no such file)", config, shipped)
    return shipped[config]


def _trial(reference: str, overrides: Sequence[str] | None) -> Experiment:
    """The shipped trial with one more defense; ConfigurationError, before any data is read, if that is broken."""
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.config import PluginSpec, with_candidate
    from mocosfl_priv.defense_contract import require_protection
    from mocosfl_priv.plugins import DEFENSES, Defense

    spec = PluginSpec(name=reference)
    if DEFENSES.load(reference).prepare is Defense.prepare:  # another one may take long: training will show its faults
        require_protection(lambda: DEFENSES.create(spec).plugin, reference)
    experiment = _experiment("try", overrides, None, None)
    return Experiment(with_candidate(experiment.config, reference))


def _run(
    config: str,
    out: Path,
    overrides: Sequence[str] | None,
    defenses: Sequence[str] | None,
    attacks: Sequence[str] | None,
    overwrite: bool,
    checkpoints: Path | None = None,
    scale: str | None = None,
) -> None:
    _run_to(out, _experiment(config, overrides, defenses, attacks, scale), overwrite, checkpoints)


def _run_to(out: Path, experiment: Experiment, overwrite: bool, checkpoints: Path | None = None) -> None:
    """Run, write, and print the table, and the verdict if there was a candidate."""
    from mocosfl_priv.api import run_planned
    from mocosfl_priv.display import TerminalProgress
    from mocosfl_priv.results import Destination

    console = Console(stderr=True)
    with Destination(out, overwrite) as destination:
        with console.status("reading data"):
            plan = experiment.checked()
        with TerminalProgress(console) as progress:
            result = run_planned(plan, progress, checkpoints)
        page = result.report_to(destination)
    _print_table(result)
    print(f"\nreport: {page}\ntable:  {page.parent / 'results.csv'}")
    verdict = page.parent / "verdict.txt"
    if verdict.is_file():
        print(f"\nverdict, also in {verdict}:\n\n{verdict.read_text(encoding='utf-8')}")
    result.require_success()


def _serve_options(
    listen: str,
    certs: Path | None,
    deadline: float,
    patience: float,
    heartbeat: float,
    devices: Sequence[int] | None,
    least: int | None,
) -> ServeOptions:
    from mocosfl_priv.deployment.remote_clients import Patience
    from mocosfl_priv.deployment.server import ServeOptions

    return ServeOptions(listen, certs, devices, Patience(deadline, patience), heartbeat, least)


def _device_experiment(
    config: str, overrides: Sequence[str] | None, codec: str | None, gradient_codec: str | None
) -> Experiment:
    """The configuration says how messages travel, so that utility and attacks meet what devices send."""
    codecs = {"training.codec": codec, "training.gradient_codec": gradient_codec}
    chosen = [f"{key}={name}" for key, name in codecs.items() if name is not None]
    return _experiment(config, [*(overrides or []), *chosen], None, None)


def _run_devices(
    out: Path, experiment: Experiment, overwrite: bool, run: Callable[[Plan, Progress], RunRecord]
) -> None:
    """Run a plan with devices, write results, report and cost table, and print both tables."""
    from mocosfl_priv.api import RunResult
    from mocosfl_priv.display import TerminalProgress
    from mocosfl_priv.results import Destination

    _log_to_terminal()
    console = Console(stderr=True)
    with Destination(out, overwrite) as destination:
        with console.status("reading data"):
            plan = experiment.plan()
        with TerminalProgress(console) as progress:
            result = RunResult(run(plan, progress))
        page = result.report_to(destination)
    _print_table(result)
    _report_cost(result.record.info, out)
    print(f"\nreport: {page}\ntable:  {page.parent / 'results.csv'}\ncosts:  {out / 'cost.csv'}")
    result.require_success()


def _report_cost(info: Mapping[str, Any], folder: Path) -> None:
    from mocosfl_priv.deployment.cost import CLIENT_OF_THE_TABLE, cost_table, write_costs
    from mocosfl_priv.results import replace_files

    if "devices" not in info:
        raise ConfigurationError(f"{folder}: no device took part in this run; its results.csv has the analytic costs")
    replace_files(folder, lambda staging: write_costs(info["devices"], staging / "cost.csv"))
    lines = cost_table(info["devices"])
    table = Table(title="costs of an average device, and the paper's accounting", title_justify="left")
    for heading in ("of", "quantity", "value", "unit", "method"):
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading != "method")
    for _, line in lines[lines["client"].isin(CLIENT_OF_THE_TABLE)].iterrows():
        value = "-" if line["value"] != line["value"] else f"{line['value']:,.6g}"
        table.add_row(line["client"], line["quantity"], value, line["unit"], line["method"])
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _log_to_terminal() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)


TEXTS = ("defense", "attack", "victims")


def _print_table(result: RunResult) -> None:
    audit = "audit" in result.record.info  # of clients without a server, so without utility
    utility = [
        ("linear_accuracy", "linear", "{:.3f}"),
        ("linear_untrained", "untrained", "{:.3f}"),
        ("knn_accuracy", "kNN", "{:.3f}"),
        ("knn_raw_pixels", "pixels", "{:.3f}"),
    ]
    columns = [
        ("defense", "checkpoint" if audit else "defense", "{}"),
        ("attack", "attack", "{}"),
        *([("victims", "victims", "{}")] if audit else []),
        ("cut_layer", "cut", "{}"),
        ("target_fraction", "target", "{:g}"),
        ("seed", "seed", "{}"),
        ("leak_ratio", "leak R", "{:.3f}"),
        ("mse", "MSE", "{:.4f}"),
        ("mse_floor", "floor", "{:.4f}"),
        *([("mse_bound", "bound", "{:.4f}")] if result.table()["mse_bound"].notna().any() else []),
        ("ssim", "SSIM", "{:.3f}"),
        *([] if audit else utility),
        ("attack_seconds", "attack s", "{:.1f}"),
    ]
    table = Table(title="leak R: 1 is perfect reconstruction, 0 or less a blind guess", title_justify="left")
    for name, heading, _ in columns:
        table.add_column(heading, justify="left" if name in TEXTS else "right", no_wrap=name != "defense")
    for _, row in result.table().iterrows():
        # an audit has no utility, and a failed attack no number
        table.add_row(*("-" if row[name] != row[name] else form.format(row[name]) for name, _, form in columns))
    width = None if sys.stdout.isatty() else 150
    Console(width=width).print(table)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command, and turn every error into one line and an exit code."""
    # OpenMP threads that spin for long starve each other beside a busy neighbour; ones that sleep at once cost a
    # quarter of the speed. Must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        kept = "what is complete is kept, --resume goes on" if words[:1] == ["sweep"] else "no result was written"
        _fail(f"interrupted; {kept}", EXIT_INTERRUPTED)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except MocosflPrivError as error:
        if "--debug" in words:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error; its class is private to typer's copy of click
            _fail(str(error.format_message()), EXIT_UNUSABLE)
        if "--debug" in words:
            traceback.print_exc()
        _fail(f"unexpected {type(error).__name__}: {error} (add --debug for the traceback)", EXIT_FAILED)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM; unlike KeyboardInterrupt it reaches :func:`main` through typer."""


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise _Interrupted


def _fail(message: str, code: int) -> NoReturn:
    print("mocosfl-priv: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
