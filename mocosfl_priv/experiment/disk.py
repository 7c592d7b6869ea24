"""How much of the disk a run will take, known before it runs: pictures, and the weights of what it trains."""

from __future__ import annotations

from collections.abc import Iterator

from mocosfl_priv.experiment.audit import AuditPlan
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.system import System
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.training.checkpoints import KEPT

NUMBER = 4  # bytes of a weight
COPIES = 3  # of a network that learns, in a checkpoint: itself, its momentum model, its optimiser
WIDE = 512  # numbers in a feature where the projector's own width is not configured


def result_bytes(plan: Plan | AuditPlan) -> int:
    """Bytes of what is large in a run directory: pictures, and the weights of every trained system."""
    if isinstance(plan, AuditPlan):
        return plan.picture_bytes
    weights = sum(client + server for _, client, server in _sizes(plan))
    return plan.picture_bytes + NUMBER * len(plan.trainings) * weights


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of the checkpoints of all trainings of `plan`, and of one that is being written."""
    training = plan.config.training
    memory = training.queue_size * (plan.config.model.projector_out or WIDE)
    states = []
    for system, client, server in _sizes(plan):
        copies = 1 if system.defense.plugin.freezes_clients else COPIES * training.clients
        states.append(copies * client + COPIES * server + client + server + memory)
    return NUMBER * (KEPT * len(plan.trainings) * sum(states) + max(states, default=0))


def _sizes(plan: Plan) -> Iterator[tuple[System, int, int]]:
    """Each system with the numbers in its client, and in trunk and projector together."""
    known: dict[object, tuple[int, int]] = {}
    for system in plan.systems:
        model = system.defense.plugin.architecture(plan.config.model)
        key = (model, system.cut_layer)
        if key not in known:
            known[key] = _numbers(plan.context.models.build(model, system.cut_layer, system.seed))
        yield (system, *known[key])


def _numbers(model: SplitModel) -> tuple[int, int]:
    counts = {"client": 0, "trunk": 0, "projector": 0}
    for name, value in model.named_state().items():
        counts[name.split(".", 1)[0]] += value.numel()
    return counts["client"], counts["trunk"] + counts["projector"]
