"""Commands for clients that run on real devices: certs, shard, serve, client, loopback, cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mocosfl_priv.commands.options import DebugOption, OverwriteOption, SetOption, experiment_of
from mocosfl_priv.commands.tables import print_places, print_table, show_reading
from mocosfl_priv.errors import ConfigurationError

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.deployment.server import ServeOptions
    from mocosfl_priv.experiment.plan import Plan
    from mocosfl_priv.results import RunRecord
    from mocosfl_priv.runtime.progress import Progress

app = typer.Typer()

CertsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Folder with ca.pem and this side's certificate and key, from `mocosfl-priv certs`."
    ),
]
PlainOption = Annotated[bool, typer.Option("--plain", help="No encryption; only allowed on loopback addresses.")]
CodecOption = Annotated[
    str | None,
    typer.Option("--codec", metavar="fp32|fp16|int8", help="Encoding of smashed data. Default: training.codec."),
]
GradientCodecOption = Annotated[
    str | None,
    typer.Option(
        "--gradient-codec",
        metavar="fp32|fp16|int8",
        help="Encoding of gradients. Default: training.gradient_codec.",
    ),
]
DeadlineOption = Annotated[
    float,
    typer.Option(
        min=0.1, metavar="SECONDS", help="A training step waits this long, then leaves out devices without an answer."
    ),
]
PatienceOption = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="The run fails after this long without any device.")
]
HeartbeatOption = Annotated[
    float,
    typer.Option(
        min=0.1, metavar="SECONDS", help="Interval of the devices' heartbeats; silent devices are disconnected."
    ),
]


@app.command()
def certs(
    out: Annotated[
        Path, typer.Option(help="Folder to write. If it already holds an authority, certificates are added to it.")
    ],
    devices: Annotated[int, typer.Option(min=1, help="Number of devices; they are named client-0000, client-0001...")],
    host: Annotated[
        list[str] | None, typer.Option(help="A host name or address of the server, besides loopback. Repeatable.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Create a certificate authority, and certificates signed by it for the server and each device."""
    from mocosfl_priv.deployment.certificates import LOOPBACK, make_certificates, server_names

    made = make_certificates(out, devices, host or [])
    names = [name for name in server_names(out) if name not in LOOPBACK] or ["this machine only"]
    print(f"{out}: certificate of the server, for {', '.join(names)}; keep {out / 'ca.key'} secret")
    print(f"{made[0]} to {made[-1]}: copy each folder to its device")


@app.command()
def shard(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Folder for the shard files, one per client.")],
    client: Annotated[
        int | None, typer.Option(help="Write only the shard of this client, counted from 0. Default: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="One of the configuration's seeds. Default: the first.")] = None,
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the private images of each client to a shard file, which a device can then train on."""
    from mocosfl_priv.data.roles import Role
    from mocosfl_priv.deployment.shards import write_shards
    from mocosfl_priv.runtime.files import Lock

    experiment = experiment_of(config, set_, None, None)
    chosen = experiment.config.seeds[0] if seed is None else seed
    if chosen not in experiment.config.seeds:
        raise ConfigurationError(
            f"--seed {chosen} is not among the seeds of the configuration: {list(experiment.config.seeds)}"
        )
    with ExitStack() as held:
        try:  # before data is read
            held.enter_context(Lock(out / ".lock"))
        except OSError as error:
            raise ConfigurationError(f"--out {out} cannot be written: {error.strerror}") from error
        private = experiment.plan().context.roles[Role.CLIENT_PRIVATE]
        for path, images in write_shards(private, experiment.config.training, chosen, out, client):
            print(f"{path}: {images} images")


@app.command()
def serve(
    config: Annotated[str, typer.Argument(help="A YAML file, or a name from `mocosfl-priv ls configs`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address that the server listens on.")],
    certs: CertsOption = None,
    plain: PlainOption = False,
    device: Annotated[
        list[int] | None,
        typer.Option(
            help="Index of a client that is a device; all others are simulated. Repeatable. Default: all are devices."
        ),
    ] = None,
    least: Annotated[
        int | None, typer.Option(help="Begin as soon as this many devices are connected. Default: all.")
    ] = None,
    deadline: DeadlineOption = 10.0,
    patience: PatienceOption = 600.0,
    codec: CodecOption = None,
    gradient_codec: GradientCodecOption = None,
    heartbeat: HeartbeatOption = 5.0,
    resume_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the state of unfinished training. Default: beside --out."),
    ] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Run an experiment with devices as clients. After an interruption, the same command resumes it."""
    from mocosfl_priv.deployment.server import checkpoints_beside
    from mocosfl_priv.deployment.server import serve as run_server

    if plain == (certs is not None):
        raise ConfigurationError("serve: give either --certs FOLDER, or --plain (loopback addresses only)")
    _require_address(listen)  # before data is read
    options = _serve_options(listen, certs, deadline, patience, heartbeat, device, least)
    place = resume_dir or checkpoints_beside(out)
    _run_devices(
        out, device_experiment(config, set_, codec, gradient_codec), overwrite,
        lambda plan, progress: run_server(plan, options, place, progress), place,
    )  # fmt: skip


@app.command()
def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address of the server.")],
    data: Annotated[
        Path, typer.Option(metavar="SHARD|FOLDER", help="This client's images: a shard file or an image folder.")
    ],
    certs: CertsOption = None,
    plain: PlainOption = False,
    name: Annotated[str, typer.Option(help="With --plain: the name of this client, such as client-0003.")] = "",
    image_size: Annotated[
        int | None,
        typer.Option(
            help="With an image folder: pixels per side that its images are resized to, as the model expects."
        ),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(metavar="SECONDS", show_default="never", help="Give up after this long without a server."),
    ] = float("inf"),
    meter: Annotated[
        str | None,
        typer.Option(help="Energy meter: auto, pmic, rapl, ina219:I2C_BUS:ADDRESS:SHUNT, ina3221:..."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Take part in a run of `mocosfl-priv serve`. Devices without torch use `mocosfl-priv-client` instead."""
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
    clients: Annotated[
        int, typer.Option(min=1, help="Number of clients that run as processes; all others are simulated.")
    ] = 4,
    plain: PlainOption = False,
    deadline: DeadlineOption = 10.0,
    patience: PatienceOption = 120.0,
    codec: CodecOption = None,
    gradient_codec: GradientCodecOption = None,
    heartbeat: HeartbeatOption = 1.0,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Run server and clients as processes on this machine, over TLS, and print what a client costs."""
    import tempfile

    from mocosfl_priv.deployment.loopback import run_loopback

    experiment = device_experiment(config, set_, codec, gradient_codec)
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
    """Print what the devices of a run cost and how each number was found, and rewrite cost.csv."""
    from mocosfl_priv.results import read_record

    _report_cost(read_record(folder).info, folder)


def _require_address(listen: str) -> None:
    from mocosfl_priv.device.address import parse
    from mocosfl_priv.device.errors import DeviceError

    try:
        parse(listen, "--listen", listening=True)
    except DeviceError as error:
        raise ConfigurationError(str(error)) from error


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


def device_experiment(
    config: str, overrides: Sequence[str] | None, codec: str | None, gradient_codec: str | None
) -> Experiment:
    """Load an experiment, with the codecs given as options written into its configuration.

    Utility and attacks then use smashed data that went through the codec, as the devices send them.
    """
    codecs = {"training.codec": codec, "training.gradient_codec": gradient_codec}
    chosen = [f"{key}={name}" for key, name in codecs.items() if name is not None]
    return experiment_of(config, [*(overrides or []), *chosen], None, None)


def _run_devices(
    out: Path,
    experiment: Experiment,
    overwrite: bool,
    run: Callable[[Plan, Progress], RunRecord],
    resume_dir: Path | None = None,
) -> None:
    """Run a plan with devices, write results, report and cost table, and print both tables."""
    from mocosfl_priv.api import RunResult
    from mocosfl_priv.commands.progress_bars import TerminalProgress
    from mocosfl_priv.experiment.disk import result_bytes
    from mocosfl_priv.results import Destination
    from mocosfl_priv.runtime.imports import own_package

    own_package("reports")
    _log_to_terminal()
    console = Console(stderr=True)
    with Destination(out, overwrite) as destination:
        if resume_dir is not None:
            destination.require_apart(resume_dir, "--resume-dir")
        with console.status("reading data"):
            plan = experiment.plan()
        destination.require_room(result_bytes(plan))
        show_reading(console, plan.context.roles)
        with TerminalProgress(console) as progress:
            result = RunResult(run(plan, progress))
        page = result.report_to(destination)
    print_table(result)
    _report_cost(result.record.info, out)
    print_places(page)
    print(f"costs:  {out / 'cost.csv'}")
    result.require_success()


def _report_cost(info: Mapping[str, Any], folder: Path) -> None:
    from mocosfl_priv.deployment.cost import CLIENT_OF_THE_TABLE, cost_table, write_costs
    from mocosfl_priv.results import replace_files

    if "devices" not in info:
        raise ConfigurationError(
            f"{folder}: no device took part in this run; results.csv there holds the computed costs"
        )
    replace_files(folder, lambda staging: write_costs(info["devices"], staging / "cost.csv"))
    lines = cost_table(info["devices"])
    table = Table(title="cost of an average device, and cost as the paper counts it", title_justify="left")
    for heading in ("of", "quantity", "value", "unit", "method"):
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading != "method")
    for _, line in lines[lines["client"].isin(CLIENT_OF_THE_TABLE)].iterrows():
        value = "-" if line["value"] != line["value"] else f"{line['value']:,.6g}"
        table.add_row(line["client"], line["quantity"], value, line["unit"], line["method"])
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _log_to_terminal() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
