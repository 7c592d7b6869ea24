"""Assemble the record of a run from the artefacts in a store, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping

from mocosfl_priv.experiment.attack import Attempt
from mocosfl_priv.experiment.linkage import Linkage
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.record import assemble
from mocosfl_priv.experiment.rows import CellResult, ScoredAttack, SystemResult
from mocosfl_priv.results import ATTACK_COSTS, RunRecord
from mocosfl_priv.sweep.artefacts import StoredModels, load_result
from mocosfl_priv.sweep.stages import Place, ScoreStage, cells_of, judge_of, linkages_of, systems_of
from mocosfl_priv.sweep.store import Store

DAMAGED = "its stored result was damaged; --resume computes it again"


def stored_record(plan: Plan, store: Store, failures: Mapping[str, str]) -> RunRecord:
    """Assemble the record of `plan` from the store.

    The recorded seconds are those of a run that computes all its parts itself.

    Args:
        plan: The experiment.
        store: Where its artefacts are.
        failures: Causes of failed tasks by artefact key. Cells without an artefact get a row with the cause.

    """
    judge = judge_of(plan)
    found = store.get(judge.kind, judge.key) if judge else None
    # if the store has no judge, None keeps the context from training one here
    plan.context.scoring.use(judge.load(found) if judge and found else None)
    artefacts = {stage.place: (stage, store.get(stage.kind, stage.key)) for stage in systems_of(plan)}
    results = {
        place: load_result(stage.system, stage.training, artefact)
        for place, (stage, artefact) in artefacts.items()
        if artefact is not None
    }
    models = {result.file_stem + ".safetensors": artefacts[place][1] for place, result in results.items()}
    linkages = _linkages(plan, store, failures)
    cells = [_cell(stage, results, linkages, store, failures) for stage in cells_of(plan)]
    linked = [(results[place].keys, found) for place, found in linkages.items()
              if place in results and not results[place].hijacker]  # fmt: skip
    seconds = sum(result.cost["training_seconds"] for result in results.values())
    seconds += sum(cell.row["attack_seconds"] for cell in cells if not cell.row["failure"])
    kept = StoredModels({name: found for name, found in models.items() if found is not None})
    return assemble(plan, list(results.values()), kept, cells, linked, seconds)


def _linkages(plan: Plan, store: Store, failures: Mapping[str, str]) -> dict[Place, Linkage]:
    """What linkage found for every training of every system, or why it is not measured."""
    context = plan.context
    refusal = context.library.refusal(context.conditions, len(context.victims.images))
    found = {stage.place: Linkage.absent(context.victims, refusal) for stage in systems_of(plan)}
    for stage in linkages_of(plan):
        artefact = store.get(stage.kind, stage.key)
        cause = failures.get(stage.key, DAMAGED)
        found[stage.place] = stage.load(artefact) if artefact else Linkage.absent(context.victims, cause)
    return found


def _cell(
    stage: ScoreStage,
    systems: Mapping[Place, SystemResult],
    linkages: Mapping[Place, Linkage],
    store: Store,
    failures: Mapping[str, str],
) -> CellResult:
    """The result row of `stage`: from the store, or a row that states why there is no result."""
    context, keys = stage.plan.context, {**stage.system.keys, "attack": stage.attack.label}
    attacked, system = stage.attacked, systems.get((*stage.place[:2], 0))
    attempt = store.get(attacked.kind, attacked.key) if system else None
    if system is None or attempt is None:
        return CellResult.of(ScoredAttack(context.victims, _absent(stage, failures), {}), keys, {})
    attempted = attacked.load(attempt)
    score = store.get(stage.kind, stage.key) if not attempted.failure else None
    if score is None and not attempted.failure:
        attempted = _absent(stage, failures)
    values = stage.load(score) if score else {}
    columns = system.columns(context.probes, context.scoring) | linkages[*stage.place[:2], 0].columns
    return CellResult.of(ScoredAttack(context.victims, attempted, values), keys, columns)


def _absent(stage: ScoreStage, failures: Mapping[str, str]) -> Attempt:
    """An empty attempt with the cause of its absence."""
    cause = failures.get(stage.key, DAMAGED)
    return Attempt(None, dict.fromkeys(ATTACK_COSTS, float("nan")) | {"attack_out_of_time": False}, cause)
