"""How long a report takes over a large grid, from a record that was never run.

uv run python -m benchmarks.report [CELLS [VARIANTS]]

With VARIANTS it is the one report of a sweep that has so many, and as many cells in all.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.config import ExperimentConfig, parse_config
from mocosfl_priv.results import (
    COLUMNS,
    COSTS,
    LEAKAGE_COLUMNS,
    RECOGNITION_LEVELS,
    SCHEMA_VERSION,
    UNDEFENDED,
    RunRecord,
    StoredRun,
    image_key,
    victims_key,
)
from reports import write_reports
from reports.analysis.comparison import BOTTLENECK, TARESSFL
from reports.analysis.summary import ENSEMBLE

CELLS = 500
FLOOR = 0.065
ATTACK_ORIGINS = {"ensemble": ENSEMBLE}
ORIGINS = {"none": UNDEFENDED, "bottleneck": BOTTLENECK, "taressfl": TARESSFL}
STRENGTH = {"floor": 0.0, "rmle": 0.6, "decoder": 0.85, "ensemble": 0.92}  # share of what leaks that an attack finds


@dataclass(frozen=True)
class Grid:
    """The extent of a made-up sweep. Defenses protect the more, the later they stand, and cost accuracy."""

    defenses: tuple[str, ...] = ("none", "bottleneck", "gaussian", "nopeek", "taressfl", "ressfl", "dropout")
    cut_layers: tuple[int, ...] = (1, 2)
    target_fractions: tuple[float, ...] = (0.0, 0.005, 0.01)
    attacks: tuple[str, ...] = tuple(STRENGTH)
    seeds: tuple[int, ...] = (0, 1, 2)
    victims: int = 128
    probes: int = 1000
    pixels: int = 32

    @property
    def systems(self) -> list[dict[str, Any]]:
        """The keys of every trained system; what sees no target data stands at fraction 0 only."""
        return [
            {"defense": defense, "cut_layer": cut, "target_fraction": fraction, "seed": seed}
            for defense in self.defenses
            for cut in self.cut_layers
            for fraction in (self.target_fractions if defense.endswith("ressfl") else (0.0,))
            for seed in self.seeds
        ]


def synthetic_record(grid: Grid, seed: int = 0) -> RunRecord:
    """A record with everything that a page shows, of runs that never ran."""
    rng = np.random.default_rng(seed)
    shape = (grid.victims, 3, grid.pixels, grid.pixels)
    smooth = np.repeat(np.repeat(rng.uniform(0, 1, (grid.victims, 3, 4, 4)), grid.pixels // 4, 2), grid.pixels // 4, 3)
    images = {victims_key("test"): (255 * smooth).astype(np.uint8)}
    floors = FLOOR * rng.lognormal(-0.1, 0.45, grid.victims)
    difficulty = rng.normal(0, 0.25, grid.victims)
    cells, per_image, probes, training, leakage = [], [], [], [], []
    for keys in grid.systems:
        rank = grid.defenses.index(keys["defense"]) / max(1, len(grid.defenses) - 1)
        leak = 0.9 * (1 - 0.8 * rank) / (1 + 0.15 * (keys["cut_layer"] - 1)) + 2 * keys["target_fraction"]
        leak += rng.normal(0, 0.02)
        accuracy = 0.75 - 0.12 * rank + rng.normal(0, 0.01)
        probes.append(_probe(keys, accuracy, grid.probes, rng))
        for epoch in range(0, 11, 2):
            loss, kept = 6 - 0.2 * epoch, 0.3 + 0.04 * epoch * (1 - rank)
            training.append({**keys, "step": 40 * epoch, "epoch": epoch, "loss": loss, "validation_knn": kept})
            leakage.append(
                {
                    **keys,
                    "attack": "decoder",
                    "victims": "test",
                    "epoch": epoch,
                    "leak_ratio": leak * (0.5 + epoch / 20),
                }
            )
        for attack in grid.attacks:
            cell = {**keys, "attack": attack, "victims": "test"}
            found = leak * STRENGTH[attack]
            errors = floors * np.clip(1 - found * np.exp(difficulty + rng.normal(0, 0.1, grid.victims)), 0.01, 1.2)
            ssim = np.clip(1 - errors / floors + rng.normal(0, 0.05, grid.victims), 0, 1) ** 0.8
            table = pd.DataFrame({**cell, "image": np.arange(grid.victims), "group": np.arange(grid.victims)})
            per_image.append(
                table.assign(mse=errors, psnr=-10 * np.log10(errors), ssim=ssim, ssim_zeropad=ssim, lpips=np.nan,
                             recognised=ssim > 0.6, reidentified=ssim > 0.8, mse_floor=floors, mse_bound=np.nan)
            )  # fmt: skip
            noise = (errors / floors)[:, None, None, None] * rng.normal(0, 0.3, shape)
            images[image_key(cell)] = (255 * np.clip(smooth + noise, 0, 1)).astype(np.uint8)
            cells.append(_cell(cell, errors, floors, accuracy, rank))
    return RunRecord(
        cells=pd.DataFrame(cells, columns=COLUMNS),
        per_image=pd.concat(per_image, ignore_index=True),
        probe=pd.concat(probes, ignore_index=True),
        training=pd.DataFrame(training),
        leakage=pd.DataFrame(leakage, columns=LEAKAGE_COLUMNS),
        images=images,
        info=_info(grid),
        config_yaml=_config(grid).to_yaml(),
    )


def _probe(keys: dict[str, Any], accuracy: float, count: int, rng: np.random.Generator) -> pd.DataFrame:
    draws = rng.uniform(size=count)
    return pd.DataFrame(
        {**keys, "image": np.arange(count), "group": np.arange(count), "knn": draws < accuracy - 0.04,
         "linear": draws < accuracy, "knn_raw_pixels": draws < 0.3, "linear_untrained": draws < 0.4}
    )  # fmt: skip


def _cell(cell: dict[str, Any], errors: np.ndarray, floors: np.ndarray, accuracy: float, rank: float) -> dict[str, Any]:
    costs = dict.fromkeys(COSTS, 1e6 * (1 + rank)) | dict.fromkeys(RECOGNITION_LEVELS, 0.1)
    measured = {
        "mse": errors.mean(),
        "mse_floor": floors.mean(),
        "leak_ratio": 1 - errors.mean() / floors.mean(),
        "linear_accuracy": accuracy,
        "attack_seconds": 10.0,
        "attack_steps": 100,
        "attack_queries": 0,
        "attack_out_of_time": False,
    }
    return {**cell, **costs, **measured, "failure": "", "flags": "", "guarantee": ""}


def _config(grid: Grid) -> ExperimentConfig:
    return parse_config(
        {
            "name": "synthetic",
            "description": "A grid that was never run, to see how long its report takes.",
            "seeds": list(grid.seeds),
            "cut_layers": list(grid.cut_layers),
            "target_fractions": list(grid.target_fractions),
            "defenses": list(grid.defenses),
            "attacks": list(grid.attacks),
            "evaluation": {"label_fractions": []},
        }
    )


def _info(grid: Grid) -> dict[str, Any]:
    config = _config(grid)
    role = {"images": 1000, "source": "nowhere", "index_sha256": "1" * 64, "content_sha256": "2" * 64}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "created": "2025-01-02T03:04:05+00:00",
        "seconds": 12.0,
        "compute": {"device": "cpu", "precision": "float32", "threads": 2},
        "config": config.model_dump(mode="json"),
        "config_sha256": config.digest,
        "seeds": list(grid.seeds),
        "plugins": {
            "attacks": [
                {"label": attack, "origin": ATTACK_ORIGINS.get(attack, f"{attack}:Mine"), "blind": attack == "floor"}
                for attack in grid.attacks
            ],
            "defenses": [{"label": label, "origin": ORIGINS.get(label, f"{label}:Mine")} for label in grid.defenses],
        },
        "systems": [
            {**keys, "steps": 400, "selected_step": 400, "frozen_client": False, "guarantee": None,
             "smashed_shape": [64, 32, 32], "semi_supervised": {}}
            for keys in grid.systems
        ],
        "hijacked": [],
        "flags": [{"name": "not-adaptive", "sentence": "This is no run."}],
        "floor": {"kind": "mean image", "mse": FLOOR},
        "lpips": "LPIPS not measured: nothing was run",
        "recognition": {"recognition_chance": 0.1, "recognition_ceiling": 0.9, "reidentification_chance": 0.001,
                        "reidentification_ceiling": 0.95, "note": "an independent classifier"},
        "threat_model": {"grants": list(config.threat.grants), "adaptive": True},
        "roles": {"client_private": role, "victims": role, "probe_train": role},
        "duplicates_dropped": 0,
        "versions": {"torch": "2.6"},
        "platform": "Linux x86_64",
        "command": "mocosfl-priv run synthetic",
    }  # fmt: skip


def grid_of(cells: int, least: int = 3) -> Grid:
    """One that has at least `cells` rows of results, by as many seeds as it takes, `least` or more."""
    of_one_seed = len(Grid(seeds=(0,)).systems) * len(STRENGTH)
    return Grid(seeds=tuple(range(max(least, -(-cells // of_one_seed)))))


def runs_of(cells: int, variants: int) -> list[StoredRun]:
    """A run of so many cells, or a sweep of so many variants with a share of them each."""
    if variants == 0:
        return [StoredRun({}, synthetic_record(grid_of(cells)))]
    grid = grid_of(cells // variants, least=1)
    return [StoredRun({"variant": str(i)}, synthetic_record(grid, seed=i)) for i in range(variants)]


def main() -> None:
    """Print how long the report of a record takes."""
    cells, variants = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, CELLS), (2, 0)))
    runs = runs_of(cells, variants)
    with tempfile.TemporaryDirectory() as folder:
        started, worked = time.perf_counter(), time.process_time()
        page = write_reports(runs, Path(folder))
        seconds, processor = time.perf_counter() - started, time.process_time() - worked
        size = page.stat().st_size / 2**20
    print(
        f"{sum(len(run.record.cells) for run in runs)} cells, {sum(len(run.record.per_image) for run in runs)} images, "
        f"{variants or 'no'} variants: {seconds:.1f} s ({processor:.1f} s of processor), "
        f"a page of {size:.1f} MB"
    )


if __name__ == "__main__":
    main()
