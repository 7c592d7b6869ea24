"""Reuse of run directories: one is not written again if its inputs and its files are unchanged."""

from __future__ import annotations

import hashlib
from functools import cache, partial
from pathlib import Path

import pandas as pd

from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.results import RunRecord, read_record
from mocosfl_priv.runtime.files import checksum
from mocosfl_priv.runtime.imports import own_package
from mocosfl_priv.sweep.addresses import code_version
from mocosfl_priv.sweep.stages import cells_of, judge_of, linkages_of, systems_of
from mocosfl_priv.sweep.store import Store, address

KIND, CELLS = "run", "cells.parquet"


def run_key(plan: Plan) -> str:
    """Return the address of the run directory of `plan`: a hash of its configuration, its artefacts and the code."""
    judge = judge_of(plan)
    return address(
        {
            "stage": "run",
            "code": [code_version(()), _reports_code()],
            "config": plan.config.model_dump(mode="json"),
            "systems": [stage.key for stage in systems_of(plan)],
            "linkages": [stage.key for stage in linkages_of(plan)],
            "cells": [stage.key for stage in cells_of(plan)],
            "judge": judge.key if judge else None,
        }
    )


def note_written(store: Store, key: str, record: RunRecord, folder: Path) -> None:
    """Note in `store` that `folder` holds the run directory with address `key`, written from `record`."""
    files = {path.relative_to(folder).as_posix(): checksum(path) for path in folder.rglob("*") if path.is_file()}
    store.discard(KIND, key)
    store.put(KIND, key, partial(_save_cells, record), {"files": files}, {"stage": "run", "folder": folder.name})


def as_written(store: Store, key: str, folder: Path) -> RunRecord | None:
    """Return the record in `folder` if it is the run directory with address `key` and all its files are unchanged.

    The record comes without images and models. Otherwise returns None.
    """
    found = store.get(KIND, key)
    if found is None or not all(
        (folder / name).is_file() and checksum(folder / name) == expected
        for name, expected in found.facts["files"].items()
    ):
        return None
    record = read_record(folder)
    # from Parquet, because a CSV loses the precision and the type of numbers
    record.cells, record.images = pd.read_parquet(found.folder / CELLS), {}
    return record


def _save_cells(record: RunRecord, folder: Path) -> None:
    record.cells.to_parquet(folder / CELLS, index=False)


@cache
def _reports_code() -> str:
    """SHA-256 of the package `reports` with its templates. It is not imported, since that takes seconds."""
    folders = [Path(place) for place in own_package("reports").submodule_search_locations or ()]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if path.suffix != ".pyc":
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
