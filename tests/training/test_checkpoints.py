"""A training that was interrupted goes on as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attacks.fsha import FshaAttack
from attacks.sdar import SdarAttack
from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.data.partitions import iid
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.observers import MaliciousServer, attach, live_server
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import AuxiliaryData, Capability, Loaded, StreamView
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training import checkpoints as checkpoints_module
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.hooks import NoHooks, ServerHooks
from mocosfl_priv.training.loop import TrainedModel, train_mocosfl
from mocosfl_priv.training.sampling import PooledClients, PoolShape

STEPS, EPOCHS = 16, 8
IMAGES = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Stopped(Exception):
    """What kills the training."""


class NoisyLearner(NoHooks):
    """Random messages, and a penalty that learns along: everything that a checkpoint must keep."""

    def __init__(self) -> None:
        self.scale = torch.ones(())

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        dropped = nn.functional.dropout(smashed, 0.1)  # torch's global generator, as a user's Dropout
        return dropped + 0.1 * torch.randn(smashed.shape, generator=rng)

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        self.scale = 0.9 * self.scale + 0.1 * smashed.detach().mean()
        return self.scale * smashed.square().mean()

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.scale = state["scale"]


def split_model() -> SplitModel:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet8", width=4, projector_hidden=8, projector_out=8)
    return build_split_model(config, 1, 16, [0.5] * 3, [0.25] * 3)


def train(
    folder: Path | None,
    compute: Compute,
    stop_at: int | None = None,
    identity: str = "x",
    server_hooks: Callable[[SplitModel], ServerHooks] | None = None,
    **settings: Any,
) -> TrainedModel:
    training = TrainingConfig(
        **({"clients": 3, "server_batch": 6, "queue_size": 16, "sync_period": 3, "epochs": EPOCHS, "monitor_every": 1}
           | settings)
    )  # fmt: skip
    shape = PoolShape.of(training)
    batches = PooledClients(IMAGES, iid(60, training.clients, generator(0, "p")), shape, generator(0, "b"))
    drawn, split = batches.next, split_model()
    count = {"steps": 0}

    def counted() -> Any:
        count["steps"] += 1
        if stop_at is not None and count["steps"] > stop_at:
            raise Stopped
        return drawn()

    batches.next = counted  # type: ignore[method-assign]
    return train_mocosfl(
        split, batches, training, steps=STEPS, compute=compute, seed=0, hooks=NoisyLearner(),
        server_hooks=server_hooks(split) if server_hooks else None,
        validate=lambda model: float(next(model.client.parameters()).detach().double().sum().sin()),
        leakage_points=lambda model, step, _: [
            {"step": step, "weight": float(next(model.trunk.parameters()).detach().sum())}
        ],
        leakage_every=3, checkpoints=Checkpoints(folder, identity) if folder else None,
    )  # fmt: skip


def weights(model: SplitModel) -> dict[str, Tensor]:
    whole = nn.ModuleDict({"client": model.client, "trunk": model.trunk, "projector": model.projector})
    return whole.state_dict()


def assert_same(one: TrainedModel, other: TrainedModel) -> None:
    """Exactly: losses, scores, traffic, choice of checkpoint, every weight."""
    assert one.history == other.history
    assert one.leakage_points == other.leakage_points
    assert one.traffic == other.traffic
    assert one.selected_step == other.selected_step
    assert one.replay_epochs == other.replay_epochs
    for name, value in weights(one.model).items():
        assert torch.equal(value, weights(other.model)[name]), name
    assert len(one.model.participants) == len(other.model.participants) == 2
    for copies in zip(one.model.participants, other.model.participants, strict=True):
        assert all(torch.equal(value, copies[1][name]) for name, value in copies[0].items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clients": 10, "pool": 3, "micro_batch": 2, "feature_memory": "per_client", "average_momentum_models": True},
        {"heterogeneity": {"clients": 0.4, "data": 0.6, "micro_batch": 3}, "micro_batch": 1, "divergence_aware": 0.5},
        {"replay": {"threshold": 100.0, "warmup_epochs": 1}},
        {"sync_period": 1, "average_momentum_models": True},
        {"paper_gradient": "one_sided", "client_schedule": "oscillating", "ema_update": "before_encoding"},
    ],
    ids=["plain", "sampled", "unequal", "replay", "equal clients", "paper"],
)
@pytest.mark.parametrize("stop_at", [3, 7])
def test_resumed_equals_uninterrupted(settings: dict[str, Any], stop_at: int, tmp_path: Path, compute: Compute) -> None:
    whole = train(None, compute, **settings)
    try:
        train(tmp_path, compute, stop_at=stop_at, **settings)
    except Stopped:
        assert list(tmp_path.glob("step_*"))
    assert_same(train(tmp_path, compute, **settings), whole)
    finished = train(tmp_path, compute, stop_at=0, **settings)  # not a single step more
    assert_same(finished, whole)


def test_who_attends_goes_on_too(tmp_path: Path, compute: Compute) -> None:
    """A hijacking attack and a passive one, with networks, optimisers and random draws of their own."""
    groups: list[MaliciousServer] = []

    def seated(split: SplitModel) -> MaliciousServer:
        stream = StreamView(
            smashed_shape=split.smashed_shape, image_shape=split.image_shape, compute=compute,
            visible=frozenset(Capability), server=live_server(split.trunk, split.projector, compute),
            auxiliary=AuxiliaryData(IMAGES.float() / 255, torch.ones(60, dtype=torch.bool)),
            build_client=lambda: split_model().client,
        )  # fmt: skip
        attacks = [
            FshaAttack("res_normN0C4", rows=8, patience=3, starts=1, iterations=4),
            SdarAttack("res_normN0C4", rows=8),
        ]
        attached = [attach(Loaded(type(a).__name__, a, "", ""), stream, 0, None) for a in attacks]
        groups.append(MaliciousServer([observer for observer in attached if observer is not None]))
        return groups[-1]

    whole = train(None, compute, server_hooks=seated)
    with pytest.raises(Stopped):
        train(tmp_path, compute, stop_at=7, server_hooks=seated)
    assert_same(train(tmp_path, compute, server_hooks=seated), whole)
    uninterrupted, resumed = groups[0].state(), groups[2].state()
    assert uninterrupted.keys() == resumed.keys() and int(resumed["0.messages"]) == STEPS
    for name, value in uninterrupted.items():
        assert name.endswith("seconds") or torch.equal(value, resumed[name]), name


def test_two_interruptions_and_an_unfinished_write(
    tmp_path: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(None, compute)
    with pytest.raises(Stopped):
        train(tmp_path, compute, stop_at=5)
    (tmp_path / ".partial-dead").mkdir()
    (tmp_path / ".partial-dead/state.safetensors").write_bytes(b"half")
    real = save_file

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints_module, "save_file", disk_full)
    with pytest.raises(RunFailedError, match=r"checkpoint .* cannot be written: No space left"):
        train(tmp_path, compute)
    monkeypatch.setattr(checkpoints_module, "save_file", real)
    assert_same(train(tmp_path, compute), whole)
    assert len(list(tmp_path.glob("step_*"))) == checkpoints_module.KEPT


def test_a_folder_that_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"--resume-dir: .* cannot be created: Not a directory"):
        Checkpoints(tmp_path / "file" / "below", "x").verify()
    Checkpoints(tmp_path / "new" / "folder", "x").verify()


def test_foreign_and_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path, compute: Compute) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, compute, stop_at=4)
    with pytest.raises(ConfigurationError, match="belongs to another configuration"):
        train(tmp_path, compute, identity="y")
    Checkpoints(tmp_path, "x").verify()
    newest = sorted(tmp_path.glob("step_*"))[-1]
    document = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(ConfigurationError, match="is of format 99"):
        train(tmp_path, compute)
    (newest / "state.json").write_text(json.dumps(document))
    (newest / "state.safetensors").write_bytes(b"\x80\x04junk")
    with pytest.raises(ConfigurationError, match="is damaged"):
        train(tmp_path, compute)
    with pytest.raises(ConfigurationError, match="is damaged"):
        Checkpoints(tmp_path, "x").verify()
