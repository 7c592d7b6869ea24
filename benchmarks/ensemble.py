"""Whether the ensemble is as strong as the best of its members with the same budget, on clients drawn at random.

    uv run python -m benchmarks.ensemble --data DIR --json
    uv run python -m benchmarks.ensemble --data DIR --seconds 60 200 590 --draws 9 --keep runs/ensemble

`--data` is a class-folder tree of CIFAR-10 with ``train/`` and ``test/``. A client is drawn by its number: backbone,
cut layer, bottleneck, norm, and whether it was trained as TAResSFL trains its expert, with a weight `alpha` of its
penalty, for one pass over a thousand images. The draws 8, 11, 14, ... are held out: nothing in the ensemble was chosen
by them. Each attack runs alone, with one thread, for as many seconds; the exit status is 1 where the
ensemble's R is more than `MARGIN` below the best member's. The machine has to be otherwise idle, since time limits the
attacks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from benchmarks.machine import processor, version

if TYPE_CHECKING:
    from mocosfl_priv.models.split import SplitModel

MARGIN = 0.02  # of R
VICTIMS, KNOWN, TRAINED_ON = 64, 4_000, 1_000
MEMBERS: dict[str, dict[str, Any]] = {
    "decoder": {"name": "decoder", "steps": 10**6},
    "decoder-edsr": {"name": "decoder", "architecture": "edsr_N4C64", "steps": 10**6},
    "rmle": {"name": "rmle"},
}
HELD_OUT_EVERY, FIRST_HELD_OUT = 3, 8
T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """One client of the family. alpha: of TAResSFL's penalty; None for new weights."""

    number: int
    backbone: str
    cut: int
    bottleneck: str | None
    norm: str
    alpha: float | None

    @classmethod
    def of(cls, number: int) -> Draw:
        """The draw of this number."""
        rng = np.random.default_rng([2026, number])
        return cls(
            number=number,
            backbone=str(rng.choice(["resnet10", "resnet18"])),
            cut=int(rng.integers(1, 5)),
            bottleneck=None if rng.random() < 0.4 else str(rng.choice(["C4S2", "C8S1", "C16S2"])),
            norm=str(rng.choice(["group", "layer"])),
            alpha=None if rng.random() < 0.5 else float(rng.choice([0.5, 2.0])),
        )

    @property
    def held_out(self) -> bool:
        """Whether nothing in the ensemble was chosen by this client."""
        return self.number >= FIRST_HELD_OUT and (self.number - FIRST_HELD_OUT) % HELD_OUT_EVERY == 0


def main() -> None:
    """Attack, compare, print; exit with 1 where the ensemble is weaker than one of its members."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a class-folder tree with train/ and test/")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0])
    parser.add_argument("--draws", type=int, default=6, help="clients 0, 1, ...")
    parser.add_argument("--only", type=int, nargs="+", help="only these clients")
    parser.add_argument("--keep", type=Path, help="folder of finished attacks, which are not done again")
    options = parser.parse_args()
    result = measure(options.data, options.only or list(range(options.draws)), options.seconds, options.keep)
    print(json.dumps(result, indent=None if options.json else 2))
    sys.exit(0 if result["passed"] else 1)


def measure(data: Path, numbers: list[int], budgets: list[float], keep: Path | None) -> dict[str, Any]:
    """R of the ensemble and of its members, for every client and budget."""
    rows = []
    for number in numbers:
        draw = Draw.of(number)
        weights = _alone(_weights, draw, data)
        for seconds in budgets:
            found = {
                name: _kept(keep, draw, seconds, name, entry, data, weights)
                for name, entry in {"ensemble": {"name": "ensemble"}, **MEMBERS}.items()
            }
            best = max(MEMBERS, key=found.__getitem__)
            rows.append({
                **asdict(draw), "held_out": draw.held_out, "seconds": seconds, "leak_ratio": found, "best": best,
                "behind": round(found[best] - found["ensemble"], 4),
            })  # fmt: skip
    return {
        "passed": all(row["behind"] <= MARGIN for row in rows),
        "largest_gap": max(row["behind"] for row in rows),
        "largest_gap_held_out": max((row["behind"] for row in rows if row["held_out"]), default=None),
        "rows": rows,
        "setting": {
            "victims": VICTIMS,
            "auxiliary": KNOWN,
            "threads": 1,
            "cpu": processor(),
            "torch": version("torch"),
        },
    }


def _alone(task: Callable[..., T], *arguments: Any) -> T:
    """The result of `task` in a fresh process, which shares no settings, caches or memory with others."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def _kept(
    keep: Path | None, draw: Draw, seconds: float, name: str, entry: dict[str, Any], data: Path,
    weights: dict[str, np.ndarray],
) -> float:  # fmt: skip
    """R of one attack, from `keep` where it is there."""
    file = keep / f"{draw.number}_{seconds:g}_{name}.json" if keep is not None else None
    if file is not None and file.is_file():
        return float(json.loads(file.read_text(encoding="utf-8")))
    value, took = _alone(_attack, draw, seconds, entry, data, weights)
    print(f"client {draw.number}, {seconds:g} s, {name}: R {value:.3f} in {took:.0f} s", file=sys.stderr, flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")
    return value


def _images(draw: Draw, data: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attacker's images, the client's own, and the victims: float (n, 3, 32, 32) in [0, 1]."""
    from mocosfl_priv.data.datasets import load_split
    from mocosfl_priv.evaluation.utility import to_unit_range

    train, test = (to_unit_range(load_split(f"imagefolder:{data}", split).images) for split in ("train", "test"))
    rng = torch.Generator().manual_seed(draw.number)
    order = torch.randperm(len(train), generator=rng)
    victims = test[torch.randperm(len(test), generator=rng)[:VICTIMS]]
    return train[order[:KNOWN]], train[order[KNOWN : KNOWN + TRAINED_ON]], victims


def _attack(
    draw: Draw, seconds: float, entry: dict[str, Any], data: Path, weights: dict[str, np.ndarray]
) -> tuple[float, float]:
    """R of an attack, and the seconds that it took."""
    from mocosfl_priv.config import ComputeConfig, PluginSpec
    from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
    from mocosfl_priv.evaluation.image_metrics import mse
    from mocosfl_priv.plugins import ATTACKS, AttackerView, AuxiliaryData, Budget, Capability
    from mocosfl_priv.runtime.compute import Compute
    from mocosfl_priv.runtime.seeding import global_seed

    compute = Compute.resolve(ComputeConfig(device="cpu", threads=1))
    known, private, victims = _images(draw, data)
    client = _fresh(draw, private).client
    client.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    client.eval().requires_grad_(False)
    with torch.no_grad():
        smashed = client(victims)
    attack = ATTACKS.create(PluginSpec.model_validate(entry)).plugin
    visible = frozenset({Capability.CLIENT_WEIGHTS, Capability.QUERY, Capability.AUXILIARY_DATA})
    view = AttackerView(
        smashed=smashed, image_shape=(3, 32, 32), compute=compute, visible=visible, client=client,
        auxiliary=AuxiliaryData(known, torch.ones(len(known), dtype=torch.bool)),
    )  # fmt: skip
    started = time.monotonic()
    with global_seed(draw.number, "attack"):
        images = attack.reconstruct(view.restricted(attack.needs | attack.optional), Budget(seconds=seconds), 0)
    took = time.monotonic() - started
    return leak_ratio(mse(images, victims), blind_guess_floor(private, victims).mse), took


def _fresh(draw: Draw, images: torch.Tensor) -> SplitModel:
    from mocosfl_priv.config import ModelConfig
    from mocosfl_priv.models.split import build_split_model
    from mocosfl_priv.runtime.seeding import global_seed

    settings = {"backbone": draw.backbone, "norm": draw.norm}
    config = ModelConfig.model_validate(settings | ({"bottleneck": draw.bottleneck} if draw.bottleneck else {}))
    means, deviations = images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()
    with global_seed(draw.number, "client"):
        return build_split_model(config, draw.cut, 32, means, deviations)


def _weights(draw: Draw, data: Path) -> dict[str, np.ndarray]:
    """A draw's client: new weights, or trained against a decoder that learns along, as TAResSFL trains its expert."""
    from mocosfl_priv.evaluation.image_metrics import ssim
    from mocosfl_priv.inversion import build_decoder
    from mocosfl_priv.runtime.seeding import global_seed

    torch.set_num_threads(1)
    _, images, _ = _images(draw, data)
    model = _fresh(draw, images)
    if draw.alpha is not None:
        with global_seed(draw.number, "training"):
            decoder = build_decoder("res_normN1C16", model.smashed_shape, (3, 32, 32))
            defended = torch.optim.SGD([*model.client.parameters(), *model.trunk.parameters()], lr=0.01, momentum=0.9)
            learner = torch.optim.Adam(decoder.parameters(), lr=1e-3)
            for batch in images.split(32):
                smashed = model.client(batch)
                learner.zero_grad()
                (1 - ssim(decoder(smashed.detach()), batch).mean()).backward()
                learner.step()
                mirrored = model.trunk(model.client(batch.flip(3)))
                one, other = (nn.functional.normalize(found, dim=1) for found in (model.trunk(smashed), mirrored))
                contrast = nn.functional.cross_entropy(one @ other.T / 0.2, torch.arange(len(batch)))
                defended.zero_grad()
                (contrast + draw.alpha * ssim(decoder(smashed), batch).clamp(min=0).mean()).backward()
                defended.step()
    return {name: value.detach().numpy() for name, value in model.client.state_dict().items()}


if __name__ == "__main__":
    main()
