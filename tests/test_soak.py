"""A soak: drawn inputs of all kinds that people have, through the commands: right, or one line and exit code 2.

Thirty by default; as many as `MOCOSFL_SOAK` says, or a thousand with `uv run pytest -m slow -n 0 tests/test_soak.py`.
Input number N is the same in every run: `MOCOSFL_SOAK_FIRST=N MOCOSFL_SOAK=1` repeats it.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("grpc")
pytest.importorskip("onnxruntime")

from mocosfl_priv.cli import main
from mocosfl_priv.deployment.certificates import make_certificates
from mocosfl_priv.deployment.deployment import device_name
from mocosfl_priv.deployment.loopback import free_port
from mocosfl_priv.device.client import main as device_main
from tests.awkward_inputs import APPLE_DOUBLE, case, grey, picture
from tests.published.test_loader import fake_state

FIRST = int(os.environ.get("MOCOSFL_SOAK_FIRST", "0"))
SHORT = int(os.environ.get("MOCOSFL_SOAK", "30"))
LONG = 1000
TRAIN, TEST, SIZE = 14, 8, 16
SERVED_SIZE = 32  # pixels a side of the data set that the server of a served input has
WAIT_SECONDS = 300.0  # for a server on a busy machine
INTERRUPTED = 130


@dataclass
class Drawn:
    """One input. wrong: why it must be refused; empty where it must go well. story: what was drawn, for a failure."""

    draw: random.Random
    folder: Path
    wrong: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def choose(self, what: str, right: list[Any], wrong: list[Any], share: float = 0.2) -> Any:
        """One of `right`, or now and then one of `wrong`."""
        chosen = self.draw.choice(wrong if self.draw.random() < share else right)
        self.story.append(f"{what}={chosen!r}")
        if chosen in wrong:
            self.wrong.append(f"{what}={chosen!r}")
        return chosen


def scaled(factor: float, dtype: type) -> Callable[[np.ndarray], Image.Image]:
    return lambda pixels: Image.fromarray((grey(pixels) * factor).astype(dtype))


def clear(pixels: np.ndarray) -> np.ndarray:
    """An alpha channel that hides half of a picture."""
    return np.where(pixels[..., 0] > np.median(pixels[..., 0]), 255, 0).astype(np.uint8)


PICTURES: dict[str, tuple[str, Callable[[np.ndarray], Image.Image]]] = {
    "RGB": (".png", Image.fromarray),
    "JPEG": (".jpg", Image.fromarray),
    "jfif": (".jfif", Image.fromarray),
    "no ending": ("", Image.fromarray),
    "grey": (".bmp", lambda pixels: Image.fromarray(pixels[..., 0])),
    "palette": (".gif", lambda pixels: Image.fromarray(pixels).convert("P")),
    "one bit": (".tif", lambda pixels: Image.fromarray(pixels[..., 0] > np.median(pixels[..., 0]))),
    "alpha": (".webp", lambda pixels: Image.fromarray(np.dstack([pixels, clear(pixels)]))),
    "CMYK": (".jpg", lambda pixels: Image.fromarray(pixels).convert("CMYK")),
    "16 bits": (".png", scaled(65535, np.uint16)),
    "16 bits TIFF": (".TIFF", scaled(65535, np.uint16)),
    "float": (".tif", scaled(1, np.float32)),
    "12 bits in 16": (".png", scaled(4095, np.uint16)),
    "float beyond": (".tif", scaled(900, np.float32)),
    "32 bits": (".tif", scaled(100_000, np.int32)),
}
ODD = ["12 bits in 16", "float beyond", "32 bits"]
LAYOUTS: dict[str, list[tuple[str, str]]] = {  # (place of the training images, place of the test images)
    "train/test": [("train/{}", "test/{}")],
    "Training/Testing": [("Training/{}", "Testing/{}")],
    "Train/val": [("Train/{}", "val/{}")],
    "too high": [("archive/data set/train/{}", "archive/data set/test/{}")],
    "patients": [("train/{}/p 1", "test/{}/p 2")],
    "classes": [("{}", "{}")],
    "flat splits": [("train", "test")],
    "no test": [("train/{}", "train/{}")],
    "splits in classes": [("{}/train", "{}/test")],
    "classes too high": [("archive/{}", "archive/{}")],
    "two training folders": [("train/{}", "test/{}"), ("Training/{}", "test/{}")],
}
AMBIGUOUS = ["no test", "splits in classes", "classes too high", "two training folders"]
FORMATS = {".jfif": "JPEG", "": "PNG"}


def make_tree(drawn: Drawn, *, device: bool = False) -> Path:
    """A tree of pictures. device: for a device, which reads every picture of a folder, whatever its folders mean."""
    root = drawn.folder / drawn.draw.choice(["data", "meine Bilder", "データ"])
    ambiguous = [] if device else AMBIGUOUS
    share = 0.0 if device else 0.15
    layout = drawn.choose("layout", [name for name in LAYOUTS if name not in ambiguous], ambiguous, share)
    mode = drawn.choose("mode", [name for name in PICTURES if name not in ODD], ODD, 0.15)
    suffix, make = PICTURES[mode]
    names = drawn.draw.choice([["cat", "dog"], ["Ümlaut", "o'neil & co"], ["0", "1", "2"], ["with space", "日本"]])
    for train, test in LAYOUTS[layout]:
        for kind, name in enumerate(names):
            many = 3 if layout == "classes" else 1  # a part of which will be test images
            for place, count, offset in ((train, many * TRAIN, 0), (test, many * TEST, 500)):
                folder = root / place.format(name)
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    image = make(picture(kind, number + offset, (SIZE + number % 3, SIZE)))
                    image.save(folder / f"{kind}-{number + offset}{suffix}", FORMATS.get(suffix))
    first = sorted(path for path in root.rglob("*") if path.is_file())[0]
    for _ in range(drawn.draw.randrange(3)):
        add_litter(drawn.draw, first)
    damage = drawn.choose("damage", [None], ["truncated", "empty", "text"], 0.12)
    if damage:
        victim = first if suffix else first.rename(first.with_suffix(".png"))
        content = victim.read_bytes()
        victim.write_bytes({"truncated": content[: len(content) // 3], "empty": b"", "text": b"no picture"}[damage])
    return root


def add_litter(draw: random.Random, beside: Path) -> None:
    folder = beside.parent
    kind = draw.choice(["._", ".DS_Store", "Thumbs.db", "__MACOSX", ".ipynb_checkpoints", "notes.txt", "link", "pipe"])
    with contextlib.suppress(FileExistsError):
        if kind == "._":
            (folder / f"._{beside.name or 'x'}.png").write_bytes(APPLE_DOUBLE)
        elif kind in ("__MACOSX", ".ipynb_checkpoints"):
            (folder / kind).mkdir()
            Image.fromarray(picture(3, 1)).save(folder / kind / "copy.png")
        elif kind == "link":
            (folder / "gone.png").symlink_to(folder / "nowhere")
        elif kind == "pipe":
            os.mkfifo(folder / "pipe.png")
        else:
            (folder / kind).write_bytes(b"text")


def make_config(drawn: Drawn, root: Path, **more: Any) -> Path:
    document = case(f"imagefolder:{root}")
    document["data"] |= {"victims": 4, "auxiliary_target_fraction": 0.1, "validation_fraction": 0.1}  # type: ignore[operator]
    document["training"] |= {"clients": 2, "server_batch": 8}  # type: ignore[operator]
    document |= more
    text = yaml.safe_dump(document, allow_unicode=True)
    scalar = drawn.choose("scalar", [None], [f"queue_size: {bad}" for bad in ("010", "1:10", "yes", ".nan")], 0.1)
    if scalar:
        text = text.replace("queue_size: 64", scalar)
    path = drawn.folder / drawn.draw.choice(["c.yaml", "my config.yaml", "é.yaml"])
    path.write_text(text, encoding="utf-8")
    return path


def out_of(drawn: Drawn) -> Path:
    name = drawn.choose("out", ["out", "aus gabe", "ä"], ["x" * 300, "taken", "file", "file/below"], 0.1)
    (drawn.folder / "taken").mkdir()
    (drawn.folder / "taken" / "mine.txt").write_text("mine")
    (drawn.folder / "file").write_text("mine")
    return drawn.folder / str(name)


def validates(drawn: Drawn) -> Callable[[], int]:
    config = make_config(drawn, make_tree(drawn))
    return lambda: command("validate", str(config))


def runs(drawn: Drawn) -> Callable[[], int]:
    root = make_tree(drawn)
    config, out = make_config(drawn, root), out_of(drawn)

    def go() -> int:
        code = command("run", str(config), "--out", str(out))
        if code == 0:
            table = pd.read_csv(out / "results.csv")
            flat = "layout='flat splits'" in drawn.story
            assert len(table) == 1 and table["mse"].notna().all() and bool(table["knn_accuracy"].isna().all()) == flat
            assert (out / "report.html").is_file()
        return code

    return go


def audits(drawn: Drawn) -> Callable[[], int]:
    torch.manual_seed(0)
    clients = drawn.folder / "clients"
    clients.mkdir()
    state: Any = fake_state(drawn.draw.choice([1, 2]))
    prefix = drawn.choose("prefix", ["", "module.", "_orig_mod.module."], ["trunk."], 0.15)
    wrapper = drawn.choose("wrapper", [None, "state_dict", "model"], ["thing"], 0.15)
    weights = drawn.choose("weights", ["float32", "float16"], ["nan", "short"], 0.2)
    state = {prefix + name: value.half() if weights == "float16" else value for name, value in state.items()}
    if weights in ("nan", "short"):
        name = next(iter(state))
        state[name] = state[name] * float("nan") if weights == "nan" else state[name][:-1]
    torch.save({wrapper: state} if wrapper else state, clients / drawn.draw.choice(["client.tar", "my client.pth"]))
    (clients / "._client.tar").write_bytes(APPLE_DOUBLE)
    config = make_config(drawn, make_tree(drawn), audit_models=str(clients))
    if drawn.draw.random() < 0.9:
        return lambda: command("validate", str(config))
    return lambda: command("run", str(config), "--out", str(drawn.folder / "out"))


def attends(drawn: Drawn) -> Callable[[], int]:
    """A client that finds no server: with right words it says so, and with wrong ones it says that at once."""
    root = make_tree(drawn)
    host = drawn.draw.choice(
        ["127.0.0.1", "localhost", "[::1]", "pc.local", "https://127.0.0.1", "bü.local", "10.0.0.1"]
    )
    port = drawn.draw.choice([":1", ":65535", "", ":99999", ":x"])
    size = drawn.draw.choice([[], ["--image-size", "16"], ["--image-size", "0"]])
    drawn.story.append(f"server={host + port} {size}")
    drawn.wrong.append("there is no server")
    words = [
        "--server",
        host + port,
        "--data",
        str(root),
        "--plain",
        "--name",
        "client-0000",
        "--patience",
        "0.05",
        *size,
    ]
    return lambda: device_main(words) if drawn.draw.random() < 0.5 else command("client", *words)


class Server:
    """`mocosfl-priv serve` as a process of its own, with one device and one simulated client, for a few steps."""

    def __init__(self, config: Path, out: Path, certs: Path | None, port: int) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by `end`
        secrecy = ["--plain"] if certs is None else ["--certs", str(certs)]
        words = ["serve", str(config), "--out", str(out), "--listen", f"127.0.0.1:{port}", "--device", "0", *secrecy]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mocosfl_priv.cli", *words], stdout=self._log, stderr=self._log,
            stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    @property
    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def await_listening(self) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while "listening on" not in self.said:
            assert self._process.poll() is None and time.monotonic() < until, self.said
            time.sleep(0.1)

    def end(self, *, kill: bool) -> tuple[int, str]:
        """Its exit code and what it said; with kill it is ended, by its id."""
        try:
            if kill:
                os.kill(self._process.pid, signal.SIGTERM)
            return self._process.wait(WAIT_SECONDS), self.said
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._log.close()


def takes_part(drawn: Drawn) -> Callable[[], int]:
    """A client that finds its server: both end with 0; or the client is refused, and the server ended by its id."""
    root = make_tree(drawn, device=True)
    document = case("photos")
    document["data"] |= {"train_limit": 120, "test_limit": 40, "victims": 4}  # type: ignore[operator]
    document["training"] |= {"clients": 2, "server_batch": 8}  # type: ignore[operator]
    config = drawn.folder / "served.yaml"
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    secret = drawn.choose("secrecy", ["plain", "TLS"], ["TLS of another authority"], 0.15)
    certs = None
    if secret != "plain":
        for name in ("certs", "others"):
            make_certificates(drawn.folder / name, 1, [])
        certs = drawn.folder / "certs"
    size = drawn.choose("image size", [SERVED_SIZE], [SIZE, 0], 0.2)
    name = drawn.choose("name", [device_name(0)], [device_name(1), "nobody", ""], 0.2) if certs is None else ""
    mine = drawn.folder / ("others" if secret == "TLS of another authority" else "certs") / device_name(0)
    identity = ["--plain", "--name", str(name)] if certs is None else ["--certs", str(mine)]
    host, out, port = drawn.draw.choice(["127.0.0.1", "localhost"]), drawn.folder / "out", free_port()
    patience = "2" if secret == "TLS of another authority" else str(WAIT_SECONDS)
    words = ["--server", f"{host}:{port}", "--data", str(root), "--image-size", str(size), "--patience", patience]
    drawn.story.append(f"host={host}")

    def go() -> int:
        server = Server(config, out, certs, port)
        code = 1
        try:
            server.await_listening()
            shell = drawn.draw.random() < 0.5
            code = command("client", *words, *identity) if shell else device_main([*words, *identity])
        finally:
            ended, said = server.end(kill=code != 0)
        assert "Traceback" not in said, said
        if code != 0:
            assert ended == INTERRUPTED and "interrupted; no result was written" in said, said
        else:
            assert ended == 0 and (out / "report.html").is_file(), said
            costs = pd.read_csv(out / "cost.csv")
            assert costs.loc[costs["client"] == device_name(0), "value"].notna().any(), said
        return code

    return go


def command(*words: str) -> int:
    try:
        main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


KINDS: list[tuple[int, Callable[[Drawn], Callable[[], int]]]] = [
    (60, validates),
    (5, runs),
    (15, audits),
    (18, attends),
    (2, takes_part),
]


def soak(number: int, folder: Path) -> None:
    draw = random.Random(number)
    folder.mkdir()
    drawn = Drawn(draw, folder)
    make = draw.choices([kind for _, kind in KINDS], [weight for weight, _ in KINDS])[0]
    go = make(drawn)
    before = sorted(str(path) for path in folder.rglob("*"))
    said, wrote = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(wrote):
        code = go()
    printed = wrote.getvalue() + said.getvalue()
    story = f"input {number}, {make.__name__}: {drawn.story}, wrong {drawn.wrong}\n{printed}"
    assert "Traceback" not in printed, story
    after = sorted(str(path) for path in folder.rglob("*"))
    assert not [path for path in after if ".partial-" in path or path.endswith(".lock")], story
    if drawn.wrong:
        ours = ("mocosfl-priv:", "mocosfl-priv-client:")
        lines = [line for line in said.getvalue().splitlines() if line.startswith(ours)]
        assert code == 2 and len(lines) == 1, story
        assert after == before, story
    else:
        assert code == 0, story
        if make is validates:
            assert "valid: 1 systems" in wrote.getvalue() and "/train: " in wrote.getvalue(), story


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def failures(numbers: range, folder: Path) -> list[str]:
    found = []
    for number in numbers:
        try:
            soak(number, folder / str(number))
        except Exception as error:  # go on: one soak is to find all that there is
            found.append(f"{type(error).__name__}: {error}")
        shutil.rmtree(folder / str(number), ignore_errors=True)
    return found


def test_a_short_soak(tmp_path: Path, handlers: None) -> None:
    assert failures(range(FIRST, FIRST + SHORT), tmp_path) == []


@pytest.mark.slow
def test_a_thousand_inputs(tmp_path: Path, handlers: None) -> None:
    assert failures(range(LONG), tmp_path) == []
