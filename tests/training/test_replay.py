from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.replay import Replay
from tests.training.test_mocosfl import model, train


def test_states_follow_the_loss(tmp_path: Path) -> None:
    """A big gain keeps everybody talking; small ones silence first the server, then the clients."""
    replay = Replay(threshold=0.1, warmup=2, folder=tmp_path)
    seen = []
    for epoch, loss in enumerate([5.0, 5.0, 4.95, 4.9, 4.9, 4.0, 4.5], start=1):
        seen.append(replay.status)
        replay.end_epoch(epoch, loss)
    assert seen == ["A", "A", "A", "B", "C", "C", "A"]
    assert replay.status == "B"  # a rise is no gain
    assert replay.epochs == {"A": 4, "B": 1, "C": 2}


def test_stored_messages_come_back(tmp_path: Path) -> None:
    replay = Replay(threshold=1.0, warmup=0, folder=tmp_path)
    replay.end_epoch(1, 1.0)
    replay.end_epoch(2, 1.0)
    assert replay.status == "B"
    sent = [[{"queries": torch.rand(2, 3), "client_ids": torch.arange(2)} for _ in range(2)] for _ in range(12)]
    for parts in sent:
        replay.store(parts)
    assert sorted(replay.order(torch.Generator())) == list(range(12))
    for step, parts in enumerate(sent):
        for stored, part in zip(replay.load(step, torch.device("cpu")), parts, strict=True):
            assert all(torch.equal(stored[name], part[name]) for name in part)


@pytest.mark.parametrize("symmetric", [True, False])
def test_silent_epochs_move_nothing_and_leave_clients_alone(compute: Compute, symmetric: bool) -> None:
    settings = {"symmetric": symmetric, "epochs": 4, "sync_period": 100}
    usual = train(model(), compute, steps=8, **settings)
    split = model()
    saving = train(split, compute, steps=8, replay={"threshold": 1e9, "warmup_epochs": 0}, **settings)
    # the first epoch's gain is unbounded; then one in which clients only send, then silence
    assert saving.replay_epochs == {"A": 2, "B": 1, "C": 1}
    assert saving.traffic.smashed_up == usual.traffic.smashed_up * 3 // 4
    assert saving.traffic.gradient_down == usual.traffic.gradient_down // 2
