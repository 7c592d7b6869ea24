"""The command line: demo, new, try, run, report, compare, export, validate, ls.

Exit codes: 0 success; 2 the request cannot be run as written; 3 a run failed; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from mocosfl_priv.errors import MocosflPrivError, unknown_name

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment, RunResult

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


@app.command("ls")
def list_(
    kind: Annotated[str, typer.Argument(metavar="{attacks|defenses|datasets|models|configs|capabilities}")],
    debug: DebugOption = False,
) -> None:
    """List what can be named in a configuration."""
    listings = {
        "attacks": _list_attacks,
        "defenses": _list_defenses,
        "datasets": _list_datasets,
        "models": _list_models,
        "configs": _list_configs,
        "capabilities": _list_capabilities,
    }
    if kind not in listings:
        raise unknown_name("kind", kind, listings)
    table = Table(box=None, pad_edge=False)
    header, rows = listings[kind]()
    for column in header:
        table.add_column(column, no_wrap=column == header[0])
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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
    from mocosfl_priv.config import load_config

    return ["name", "what it shows"], [
        [name, load_config(path).description] for name, path in _shipped_configs().items()
    ]


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
    from mocosfl_priv.config import load_config, with_added_plugins

    path = Path(config)
    if not path.is_file():
        shipped = _shipped_configs()
        if config not in shipped:
            raise unknown_name("configuration (no such file)", config, shipped)
        path = shipped[config]
    return Experiment(with_added_plugins(load_config(path, overrides or [], scale), defenses or [], attacks or []))


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
        _fail("interrupted; no result was written", EXIT_INTERRUPTED)
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
