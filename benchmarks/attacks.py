"""How fast the decoder attack is here, against a loop with the structure of MocoSFL's research code.

    uv run python -m benchmarks.attacks --json

Both attack the same published client (cut 2, one percent target data, t = .6) with the same 450 images, in turns, seed
by seed, each in a process of its own, where the loop has the settings that Python and torch give it; scores are MSE and
SSIM on the 128 images that the logged attacks were scored on. Then the default decoder gets the same 450 images and
ever longer time limits, until it does as well as the loop did at its end, by both scores: the mean image alone has the
lower MSE.

    uv run python -m benchmarks.attacks --sizes 32 64 96 --attacks decoder rmle dip glass shadow ensemble

measures instead how cost grows with the size of images: processor seconds for so many steps, and the peak memory, of
attacks on a random convolution with a quarter of the side. It needs no files.

    uv run python -m benchmarks.attacks --linkage --sizes 32 64

measures what it takes to match 64 victims' messages with 2,000 candidates, on an untrained ResNet-18 cut after its
second unit, by one thread.

Otherwise the published client and a class-folder tree of CIFAR-10 are expected in MOCOSFL_SHARED (default ../shared).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attacks.decoder import DecoderAttack
from benchmarks import naive_attack
from benchmarks.machine import processor, version
from mocosfl_priv.config import ComputeConfig, ModelConfig, PluginSpec
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.evaluation.floor import blind_guess_floor
from mocosfl_priv.evaluation.image_metrics import mse, ssim
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.experiment.attack import Target
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.linkage import Library
from mocosfl_priv.experiment.linkage import measure as link_messages
from mocosfl_priv.experiment.model_builder import ModelBuilder
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.inversion import held_out_split
from mocosfl_priv.plugins import ATTACKS, DEFENSES, AttackerView, AuxiliaryData, Budget, Capability, ThreatModel
from mocosfl_priv.published.discovery import load_attack_images
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.results import ROLES
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.peak_memory import MEBIBYTE, peak_memory
from mocosfl_priv.runtime.seeding import derive_seed, global_seed

CHECKPOINT = "resnet18_cifar10_C4S2_cut2_alpha2.0_ssim0.6_target0.01_cifar100.tar"
KNOWN_IMAGES = 500  # nine tenths of them to train on
FIRST_LIMIT, LAST_LIMIT, GROWTH = 1.0, 120.0, 1.2  # seconds, and their factor
THREADS = 2
SIZED_STEPS = 20
LINKED, CANDIDATES = 64, 2000
T = TypeVar("T")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="measure how cost grows with these sides, in pixels")
    parser.add_argument("--attacks", nargs="+", default=["decoder", "rmle"], help="with --sizes")
    parser.add_argument("--images", type=int, default=160, help="of the attacker, with --sizes")
    parser.add_argument("--linkage", action="store_true", help="with --sizes: linkage instead of attacks")
    options = parser.parse_args()
    if options.linkage:
        rows = [_alone(_linkage_cost, size) for size in options.sizes or [32]]
        print(json.dumps(rows, indent=None if options.json else 2))
        return
    if options.sizes:
        rows = [_alone(_cost, name, size, options.images) for name in options.attacks for size in options.sizes]
        print(json.dumps(rows, indent=None if options.json else 2))
        return
    shared = Path(os.environ.get("MOCOSFL_SHARED", "../shared"))
    if not (shared / "published" / CHECKPOINT).is_file():
        sys.exit(f"benchmarks.attacks: {shared / 'published' / CHECKPOINT} is missing; set MOCOSFL_SHARED")
    print(json.dumps(measure(shared, options.seeds, options.device), indent=None if options.json else 2))


@dataclass(frozen=True)
class Run:
    """One timed run. seconds: as they really passed. mse, ssim: on the victims."""

    seconds: float
    mse: float
    ssim: float

    def is_as_good_as(self, mse: float, ssim: float) -> bool:
        """By both scores."""
        return self.mse <= mse and self.ssim >= ssim


def measure(shared: Path, seeds: int, device: str) -> dict[str, Any]:
    """Seconds, scores and their ratios."""
    runs: dict[str, list[Run]] = {"research_loop": [], "paper_preset": []}
    for seed in range(seeds):
        for contestant, found in ((_research_loop, runs["research_loop"]), (_paper_preset, runs["paper_preset"])):
            found.append(_alone(contestant, shared, device, seed))
            print(f"{contestant.__name__}, seed {seed}: {found[-1]}", file=sys.stderr, flush=True)
    seconds, errors, similarities = (
        {name: [getattr(run, number) for run in found] for name, found in runs.items()}
        for number in ("seconds", "mse", "ssim")
    )
    goal = statistics.mean(errors["research_loop"]), statistics.mean(similarities["research_loop"])
    reached = _alone(_default_decoder_to, shared, device, *goal)
    floor = _alone(_blind_guess, shared)
    loop = statistics.median(seconds["research_loop"])
    pairs = zip(seconds["research_loop"], seconds["paper_preset"], strict=True)
    return {
        "ratio_paper_preset": statistics.median(slow / fast for slow, fast in pairs),
        "ratio_time_to_score": loop / reached.seconds,
        "seconds": {**seconds, "default_decoder_to_that_score": reached.seconds},
        "mse": {**errors, "default_decoder_then": reached.mse, "floor": floor.mse},
        "ssim": {**similarities, "default_decoder_then": reached.ssim, "floor": floor.ssim},
        "setting": {
            "device": device if device == "cpu" else torch.cuda.get_device_name(),
            "precision": Compute.resolve(_compute(device)).describe()["precision"],
            "threads": THREADS,
            "cpu": processor(),
            "torch": version("torch"),
        },
    }


def _alone(task: Callable[..., T], *arguments: Any) -> T:
    """The result of `task` in a fresh process, which shares no settings, caches or memory with others."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


@dataclass(frozen=True)
class Scene:
    """The client, what the attacker knows, and the victims with their messages; on `device`."""

    client: nn.Module
    auxiliary: AuxiliaryData
    victims: Tensor
    smashed: Tensor

    @classmethod
    def load(cls, shared: Path, device: str) -> Scene:
        """From the files below `shared`."""
        client = load_published_client(shared / "published" / CHECKPOINT).eval().requires_grad_(False).to(device)
        victims = load_attack_images(shared / "published")
        assert victims is not None
        images = to_unit_range(load_split("cifar10", "train", 32, shared / "data" / "cifar10").images)
        known = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:KNOWN_IMAGES]]
        auxiliary = AuxiliaryData(known.to(device), torch.ones(len(known), dtype=torch.bool, device=device))
        with torch.no_grad():
            return cls(client, auxiliary, victims, client(victims.to(device)))

    def view(self, compute: Compute) -> AttackerView:
        """What the decoder attack is granted."""
        return AttackerView(
            smashed=self.smashed,
            image_shape=(3, 32, 32),
            compute=compute,
            visible=frozenset({Capability.CLIENT_WEIGHTS, Capability.QUERY, Capability.AUXILIARY_DATA}),
            client=self.client,
            auxiliary=self.auxiliary,
        )

    def timed(self, run: Callable[[], Tensor]) -> Run:
        """How long `run` takes until its images are on the CPU, and how good they are."""
        started = time.perf_counter()
        images = run().cpu()
        seconds = time.perf_counter() - started
        return Run(seconds, *(float(metric(images, self.victims).mean()) for metric in (mse, ssim)))


def _cost(name: str, size: int, images: int) -> dict[str, Any]:
    """What `SIZED_STEPS` steps of an attack on eight victims of this size take, with random images and client."""
    rng = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=rng)

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 7, 4, 3), nn.ReLU())

    with global_seed(0):
        client = build().eval().requires_grad_(False)
        attack = ATTACKS.create(PluginSpec(name=name)).plugin
        features = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        server = nn.Sequential(OrderedDict(trunk=features, projector=nn.Linear(64, 8))).requires_grad_(False)
    compute = Compute.resolve(ComputeConfig.model_validate({"device": "cpu", "threads": 1, "precision": "float32"}))
    victims = torch.rand((8, 3, size, size), generator=rng)
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # what torch imports for its first optimiser is not the attack's
    with global_seed(0), peak_memory() as memory:
        started = time.process_time()
        view = AttackerView(
            smashed=client(victims),
            image_shape=(3, size, size),
            compute=compute,
            visible=frozenset(Capability),
            client=client,
            auxiliary=AuxiliaryData(stored, torch.ones(images, dtype=torch.bool)).copy(),
            build_client=build,
            server=server,
        )
        attack.reconstruct(view, Budget(steps=SIZED_STEPS), 0)
        seconds = time.process_time() - started
    added = memory.resident_added * MEBIBYTE
    return {
        "attack": name,
        "size": size,
        "seconds": round(seconds, 2),
        "megabytes": round(memory.resident_added),
        "times_images_as_bytes": round(added / stored.numel(), 1),
    }


def _linkage_cost(size: int) -> dict[str, Any]:
    """What linkage of `LINKED` victims among `CANDIDATES` images of this size takes; images are random."""
    shape = (3, size, size)
    compute = Compute.resolve(ComputeConfig.model_validate({"device": "cpu", "threads": 1, "precision": "float32"}))
    rng = torch.Generator().manual_seed(0)
    stored = [torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=rng) for n in (LINKED, CANDIDATES, 600)]
    victims, bystanders, known = (
        ImageSet.ungrouped("random", images, torch.zeros(len(images), dtype=torch.long), ("all",)) for images in stored
    )
    auxiliary = AuxiliaryData(known.images, torch.ones(len(known), dtype=torch.bool))
    given = AttackConditions(ThreatModel.of(["query", "auxiliary_data"]), auxiliary, compute)
    builder = ModelBuilder(size, (0.5,) * 3, (0.25,) * 3)
    client = builder.build_client(ModelConfig(), 2, 0).eval()
    target = Target("untrained", client, shape, DEFENSES.create(PluginSpec(name="none")).plugin, None, seed=0)
    library = Library.draw(victims, [bystanders], [], CANDIDATES, seed=0)
    images = VictimSet.of("test", to_unit_range(victims.images), ROLES, to_unit_range(known.images))
    with peak_memory() as memory:
        started = time.process_time()
        (found,) = link_messages(given, library, target, [images])
        seconds = time.process_time() - started
    return {
        "victims": LINKED,
        "candidates": found.candidates,
        "size": size,
        "seconds": round(seconds, 1),
        "megabytes": round(memory.resident_added),
        "queries": found.queries,
        "cpu": processor(),
    }


def _compute(device: str) -> ComputeConfig:
    return ComputeConfig.model_validate({"device": device, "threads": THREADS})


def _research_loop(shared: Path, device: str, seed: int) -> Run:
    torch.set_num_threads(THREADS)
    scene = Scene.load(shared, device)
    train, validation = _split(scene.auxiliary, seed)

    def attack() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return naive_attack.attack(scene.client, train, validation, scene.smashed, Path(folder), seed)

    return scene.timed(attack)


def _paper_preset(shared: Path, device: str, seed: int) -> Run:
    compute = Compute.resolve(_compute(device))
    return _run(DecoderAttack(preset="paper"), Scene.load(shared, device), compute, None, seed)


def _default_decoder_to(shared: Path, device: str, error: float, similarity: float) -> Run:
    """The shortest run of the default decoder that is as good as these scores."""
    compute = Compute.resolve(_compute(device))
    scene = Scene.load(shared, device)
    attack = DecoderAttack(target_images=KNOWN_IMAGES, source_images=0, steps=10**6)
    limit = FIRST_LIMIT
    while limit < LAST_LIMIT:
        run = _run(attack, scene, compute, limit, 0)
        print(f"default decoder, limit {limit:.3g} s: {run}", file=sys.stderr, flush=True)
        if run.is_as_good_as(error, similarity):
            return run
        limit *= GROWTH
    raise RuntimeError(f"the default decoder does not reach {error:.4f}, SSIM {similarity:.3f} in {LAST_LIMIT} seconds")


def _run(attack: DecoderAttack, scene: Scene, compute: Compute, limit: float | None, seed: int) -> Run:
    with global_seed(seed):
        return scene.timed(lambda: attack.reconstruct(scene.view(compute), Budget(seconds=limit), seed))


def _blind_guess(shared: Path) -> Run:
    scene = Scene.load(shared, "cpu")
    floor = blind_guess_floor(scene.auxiliary.images, scene.victims)
    return scene.timed(lambda: floor.image.expand_as(scene.victims))


def _split(auxiliary: AuxiliaryData, seed: int) -> tuple[Tensor, Tensor]:
    """The images that the attack with this seed trains on and chooses by."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "decoder"))
    attack = DecoderAttack(preset="paper")
    train, validation = held_out_split(attack.knowledge(auxiliary, rng), attack.validation_share, rng)
    return train.images, validation.images


if __name__ == "__main__":
    main()
