"""What the short cut of non-IID split training depends on, and how well clients are read from what they send.

    uv run python -m benchmarks.short_cut --data cifar10-full.tar.xz --keep runs/short_cut

Each variant changes one thing of a system that has the short cut: 100 clients with two classes and one image a step,
cut 1, momentum models that stay apart. All follow the schedule of 1,600 steps and end after 800. docs/LEARNING.md has
the result, and `--picture FILE.png` draws it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.learning_runs import BACKBONES, Curve, Job, run_all
from benchmarks.machine import processor, version

IMAGES, STEPS, STOP = 20_000, 1_600, 800
RATE = 0.06  # of the server, and of the clients where nothing else is said
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "apart": ("apart", 1, {}),
    "momentum averaged": ("noniid_100", 1, {}),
    "iid": ("iid_100", 1, {"average_momentum_models": False}),
    "frozen": ("apart", 1, {"client_learning_rate": 1e-9}),
    "negatives of the own client": ("apart", 1, {"feature_memory": "per_client"}),
    "sync every 5": ("apart", 1, {"sync_period": 5}),
    "sync every 200": ("apart", 1, {"sync_period": 200}),
    "client rate / 10": ("apart", 1, {"client_learning_rate": RATE / 10}),
    "client rate / 3": ("apart", 1, {"client_learning_rate": RATE / 3}),
    "ema .9": ("apart", 1, {"ema": 0.9}),
    "ema .999": ("apart", 1, {"ema": 0.999}),
    "one-sided gradient": ("apart", 1, {"paper_gradient": "one_sided"}),
    "5 classes each": ("apart", 1, {"classes_per_client": 5}),
    "20 clients, 5 images a step": ("apart", 1, {"clients": 20}),
    "5 clients, 20 images a step": ("apart", 1, {"clients": 5}),
    "cut 2": ("apart", 2, {}),
    "cut 3": ("apart", 3, {}),
    "cut 2, momentum averaged": ("noniid_100", 2, {}),
    "cut 3, momentum averaged": ("noniid_100", 3, {}),
    "sync every 200, momentum averaged": ("noniid_100", 1, {"sync_period": 200}),
}


def main() -> None:
    """Train every variant, print what each came to, and draw the curves where a file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a class-folder tree with train/ and test/, or a tar file of one")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--backbone", choices=list(BACKBONES), default="resnet8-half", help="half: a third of the work")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    parser.add_argument("--keep", type=Path, help="folder of finished trainings, which are not done again")
    parser.add_argument("--picture", type=Path, help="where to draw the curves, as PNG")
    options = parser.parse_args()
    started = time.monotonic()
    jobs = {name: _job(name, options) for name in options.variants}
    curves = run_all(list(jobs.values()), options.workers, options.keep)
    found = {name: curves[job] for name, job in jobs.items()}
    if options.picture is not None:
        draw(found, options.picture)
    result = {
        "variants": [{"variant": name, **summary(curve)} for name, curve in found.items()],
        "minutes": round((time.monotonic() - started) / 60, 1),
        "setting": {"backbone": options.backbone, "images": options.images, "schedule": STEPS, "steps": STOP,
                    "cpu": processor(), "torch": version("torch")},
    }  # fmt: skip
    print(json.dumps(result, indent=None if options.json else 2))


def _job(name: str, options: argparse.Namespace) -> Job:
    setting, cut, changes = VARIANTS[name]
    return Job(
        setting, cut, 0, STEPS, options.images, str(options.data), options.backbone, tuple(changes.items()), STOP, True
    )


def summary(curve: Curve) -> dict[str, Any]:
    """The last loss and kNN accuracy, the largest signature, what was read, and the curve."""
    last = curve.points[-1]
    return {
        "loss": round(last["loss"], 3), "knn": round(last["knn"], 4),
        "largest_signature": round(curve.signature, 3), **curve.read, "curve": curve.points,
    }  # fmt: skip


def draw(curves: dict[str, Curve], place: Path) -> None:
    """Loss, kNN and signature against steps, a line for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5))
    colours = plt.get_cmap("tab20")
    for number, (name, curve) in enumerate(curves.items()):
        for axis, kind in zip(axes, ("loss", "knn", "client_signature"), strict=True):
            points = [point for point in curve.points if kind in point]
            steps, values = [point["step"] for point in points], [point[kind] for point in points]
            axis.plot(steps, values, label=name, color=colours(number % 20), marker="o", markersize=3)
    for axis, title in zip(axes, ("training loss", "kNN accuracy", "client signature, nats"), strict=True):
        axis.set(title=title, xlabel="steps")
    axes[2].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(place, dpi=110)


if __name__ == "__main__":
    main()
