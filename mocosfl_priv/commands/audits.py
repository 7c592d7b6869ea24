"""Commands that attack models which are there already: a user's own, and those of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mocosfl_priv.commands.options import DebugOption, OverwriteOption, SetOption
from mocosfl_priv.commands.tables import print_places, print_table, show_reading, show_warnings

app = typer.Typer()

NewAttacksOption = Annotated[
    list[str] | None,
    typer.Option("--attack", metavar="NAME|FILE.py[:CLASS]", help="Attack to run. Repeatable. Default: ensemble."),
]
OutOption = Annotated[Path, typer.Option(help="Run directory to write.")]


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:FUNCTION",
            help="A function without arguments that returns the client, (client, server), or with --cut a whole model.",
        ),
    ],
    victims: Annotated[str, typer.Option(metavar="PATH", help="The images under attack: a folder or a file.")],
    auxiliary: Annotated[str, typer.Option(metavar="PATH", help="The attacker's own images.")],
    out: OutOption,
    cut: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Cut the whole model after this module. Repeatable: a curve over cuts."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Classes of the victims: file,label. For accuracies.")
    ] = None,
    attack: NewAttacksOption = None,
    defense: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.py[:CLASS]", help="A defense of messages to compare with none.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Resize images to this many pixels a side.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, max=3, metavar="1|3", help="Grey or colour. Default: as the victims are.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="Attack at most this many victims, drawn at random.")
    ] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws.")] = 0,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what a split model that you trained leaks; nothing is trained but the attacks' own networks."""
    from mocosfl_priv.api import RunResult
    from mocosfl_priv.audits import plan_model_audit, read_audited
    from mocosfl_priv.commands.progress_bars import TerminalProgress
    from mocosfl_priv.experiment.own_audit import image_shape_of, run_own_audit
    from mocosfl_priv.models.own_model import load_own_splits
    from mocosfl_priv.results import Destination
    from mocosfl_priv.runtime.imports import own_package

    own_package("reports")  # fail before the audit, not after it, if the package cannot be used
    console = Console(stderr=True)
    with Destination(out, overwrite) as destination:
        with console.status("reading data"):
            attacked, known = read_audited(
                victims, auxiliary, size=size, channels=channels, labels=labels, limit=limit, seed=seed
            )
        splits = load_own_splits(model, image_shape_of(attacked), cut or ())
        plan = plan_model_audit(
            splits, attacked, known, overrides=set_ or (), defense=defense, model=model,
            settings={"name": "audit", "seeds": [seed], "attacks": attack or ["ensemble"]},
        )  # fmt: skip
        destination.require_room(plan.picture_bytes)
        show_reading(console, plan.context.roles)
        with TerminalProgress(console) as progress:
            result = RunResult(run_own_audit(plan, progress))
        page = result.report_to(destination)
    print_table(result)
    print_places(page)
    result.require_success()


@app.command("attack")
def attack_(
    run: Annotated[Path, typer.Argument(help="A run directory, or the folder of a sweep.")],
    out: OutOption,
    attack: NewAttacksOption = None,
    victims: Annotated[
        str | None, typer.Option(metavar="PATH", help="Other images to attack, of the same size. Default: the run's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Attack at most this many of --victims, drawn at random.")
    ] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Attack the trained systems of a finished run again, with other attacks, budgets or victims; trains nothing."""
    from mocosfl_priv.api import write_results
    from mocosfl_priv.audits import attack_again
    from mocosfl_priv.commands.progress_bars import TerminalProgress
    from mocosfl_priv.experiment.attack_again import AgainPlan
    from mocosfl_priv.results import Destination
    from mocosfl_priv.runtime.imports import own_package

    own_package("reports")
    console = Console(stderr=True)
    sizes: list[int] = []
    with Destination(out, overwrite) as destination:

        def tell(plan: AgainPlan) -> None:
            sizes.append(plan.picture_bytes)
            destination.require_room(sum(sizes))
            show_reading(console, plan.context.roles)
            show_warnings(console, plan.warnings)

        destination.require_apart(run, "the run")
        with TerminalProgress(console) as progress:
            results = attack_again(
                run, attack or ["ensemble"], victims=victims, limit=limit, overrides=set_ or (), progress=progress,
                tell=tell,
            )  # fmt: skip
        page = write_results(results, destination)
    for labels, result in results:
        if labels:
            print("\n" + ", ".join(f"{axis} {label}" for axis, label in labels.items()))
        print_table(result)
    print_places(page)
    for _, result in results:
        result.require_success()
