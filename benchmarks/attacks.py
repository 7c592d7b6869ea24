"""How fast the decoder attack is here, against a loop with the structure of MocoSFL's research code.

    uv run python -m benchmarks.attacks --json

Both attack the same published client (cut 2, one percent target data, t = .6) with the same 450 images, in turns, seed
by seed; scores are MSE on the 128 images that the logged attacks were scored on. Then the default decoder gets the same
450 images and ever longer time limits, until it does as well as the loop did at its end. The published client and a
class-folder tree of CIFAR-10 are expected below the folder MOCOSFL_SHARED (default ../shared).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.decoder import DecoderAttack
from benchmarks import naive_attack
from mocosfl_priv.compute import Compute
from mocosfl_priv.config import ComputeConfig
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.evaluation.floor import blind_guess_floor
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.inversion import held_out_split
from mocosfl_priv.models.published import load_published_client
from mocosfl_priv.models.published_release import load_attack_images
from mocosfl_priv.seeding import derive_seed
from mocosfl_priv.threat import AttackerView, AuxiliaryData, Budget, Capability

CHECKPOINT = "resnet18_cifar10_C4S2_cut2_alpha2.0_ssim0.6_target0.01_cifar100.tar"
KNOWN_IMAGES = 500  # nine tenths of them to train on
FIRST_LIMIT, GROWTH = 1.0, 1.5  # seconds
THREADS = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    shared = Path(os.environ.get("MOCOSFL_SHARED", "../shared"))
    if not (shared / "published" / CHECKPOINT).is_file():
        sys.exit(f"benchmarks.attacks: {shared / 'published' / CHECKPOINT} is missing; set MOCOSFL_SHARED")
    print(json.dumps(measure(shared, options.seeds), indent=None if options.json else 2))


def measure(shared: Path, seeds: int) -> dict[str, Any]:
    """Seconds, scores and their ratios."""
    compute = Compute.resolve(ComputeConfig(device="cpu", threads=THREADS))
    client = load_published_client(shared / "published" / CHECKPOINT).eval().requires_grad_(False)
    victims = load_attack_images(shared / "published")
    assert victims is not None
    images = to_unit_range(load_split("cifar10", "train", 32, shared / "data" / "cifar10").images)
    known = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:KNOWN_IMAGES]]
    auxiliary = AuxiliaryData(known, torch.ones(len(known), dtype=torch.bool))
    with torch.no_grad():
        smashed = client(victims)

    def view() -> AttackerView:
        return AttackerView(
            smashed=smashed,
            image_shape=(3, 32, 32),
            compute=compute,
            visible=frozenset({Capability.CLIENT_WEIGHTS, Capability.QUERY, Capability.AUXILIARY_DATA}),
            client=client,
            auxiliary=auxiliary,
        )

    def paper(seed: int, budget: Budget | None = None) -> Tensor:
        return DecoderAttack(preset="paper").reconstruct(view(), budget or Budget(), seed)

    def naive(seed: int) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            train, validation = _split(auxiliary, seed)
            return naive_attack.attack(client, train, validation, smashed, Path(folder), seed)

    runs: dict[str, list[tuple[float, float]]] = {"research_loop": [], "paper_preset": []}
    paper(0, Budget(steps=3))  # warm up
    for seed in range(seeds):
        runs["research_loop"].append(_timed(partial(naive, seed), victims))
        runs["paper_preset"].append(_timed(partial(paper, seed), victims))
    seconds = {name: statistics.median(s for s, _ in found) for name, found in runs.items()}
    scores = {name: [score for _, score in found] for name, found in runs.items()}
    goal = statistics.mean(scores["research_loop"])
    reached = _time_to(goal, view, victims)
    return {
        "ratio_paper_preset": seconds["research_loop"] / seconds["paper_preset"],
        "ratio_time_to_score": seconds["research_loop"] / reached[0],
        "seconds": {**seconds, "default_decoder_to_that_score": reached[0]},
        "mse": {**scores, "default_decoder_then": reached[1]},
        "mse_floor": float(blind_guess_floor(images, victims).mse.mean()),
        "seeds": seeds,
        "compute": compute.describe(),
        "torch": torch.__version__,
    }


def _split(auxiliary: AuxiliaryData, seed: int) -> tuple[Tensor, Tensor]:
    """The images that the attack with this seed trains on and chooses by."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "decoder"))
    attack = DecoderAttack(preset="paper")
    train, validation = held_out_split(attack.knowledge(auxiliary, rng), attack.validation_share, rng)
    return train.images, validation.images


def _timed(run: Callable[[], Tensor], victims: Tensor) -> tuple[float, float]:
    started = time.perf_counter()
    images = run()
    return time.perf_counter() - started, float(mse(images, victims).mean())


def _time_to(goal: float, view: Callable[[], AttackerView], victims: Tensor) -> tuple[float, float]:
    """Seconds, as they really passed, of the shortest run of the default decoder that reaches `goal`; and its MSE."""
    limit = FIRST_LIMIT
    while True:
        attack = DecoderAttack(target_images=KNOWN_IMAGES, source_images=0, steps=10**6)
        passed, score = _timed(partial(attack.reconstruct, view(), Budget(seconds=limit), 0), victims)
        if score <= goal:
            return passed, score
        limit *= GROWTH


if __name__ == "__main__":
    main()
