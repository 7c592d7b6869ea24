"""Semi-supervised evaluation: a small head on frozen features, trained with a fraction of the labels.

The protocol is that of MocoSFL's research code (Li et al., ICLR 2023): Linear-BatchNorm-ReLU-Linear with 512 hidden
units, Adam, 100 epochs, batches of 128. That code keeps the epoch with the best test accuracy; here the epoch is chosen
on a separate selection set.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mocosfl_priv.data.image_set import balanced_subset
from mocosfl_priv.runtime.seeding import generator, global_seed

HIDDEN = 512
EPOCHS = 100
BATCH = 128
LEARNING_RATE = 1e-3
MILESTONES = (60, 80)  # epochs after which the learning rate falls
DECAY = 0.1


@dataclass(frozen=True)
class SemiSupervisedResult:
    """The result of a semi-supervised head.

    correct: bool (m,), per test image. labels: the number of labels used. epoch: the chosen epoch, from 1; 0 if the
    labels were of one class only, so that nothing was trained.
    """

    correct: np.ndarray
    labels: int
    epoch: int


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose the labels that may be used: class-balanced indices, int64, ascending, at least one of every class.

    labels: int64 (n,). fraction: in (0, 1], of n, rounded. The choice depends on `seed` only, so that systems with the
    same seed can be compared in pairs. The choice for a smaller fraction is contained in that for a larger one.
    """
    labels = labels.cpu()
    count = max(len(labels.unique()), round(fraction * len(labels)))
    return balanced_subset(labels, count, generator(seed, "label subset"))


def semi_supervised(
    train: tuple[Tensor, Tensor],
    selection: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    fraction: float,
    seed: int,
) -> SemiSupervisedResult:
    """Train a head with `fraction` of the labels of `train`, choose the best epoch on `selection`, score it on `test`.

    train, selection, test: (features float (n, d), labels int64 (n,)), labels below `classes`. The head is trained on
        the features' device, which must be the same for all three. Among equally good epochs the earliest is chosen.
        Test data affects no choice, unless a caller passes it as `selection` too.
    """
    subset = label_subset(train[1], fraction, seed)
    inputs = train[0][subset.to(train[0].device)].float()
    targets = train[1].cpu()[subset]
    if len(targets.unique()) < 2:  # there is nothing to learn, and BatchNorm cannot train on a single image
        return SemiSupervisedResult((test[1].cpu() == targets[0]).numpy(), len(targets), 0)
    targets, wanted = targets.to(inputs.device), selection[1].to(inputs.device)
    with global_seed(seed, "semi-supervised head"):
        head = nn.Sequential(
            nn.Linear(inputs.shape[1], HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)
        )
    head = head.to(inputs.device)
    optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(MILESTONES), DECAY)
    rng = generator(seed, "semi-supervised batches")
    batches = -(-len(targets) // BATCH)
    best, best_correct, best_epoch = head, -1, 0
    for epoch in range(1, EPOCHS + 1):
        head.train()
        # batches of nearly equal size, since BatchNorm cannot train on a last batch of one image
        for batch in torch.randperm(len(targets), generator=rng).to(inputs.device).tensor_split(batches):
            optimizer.zero_grad()
            loss = cross_entropy(head(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
        schedule.step()
        correct = int((_predict(head, selection[0]) == wanted).sum())
        if correct > best_correct:
            best, best_correct, best_epoch = copy.deepcopy(head), correct, epoch
    return SemiSupervisedResult((_predict(best, test[0]).cpu() == test[1].cpu()).numpy(), len(targets), best_epoch)


@torch.no_grad()
def _predict(head: nn.Module, features: Tensor) -> Tensor:
    return head.eval()(features.float()).argmax(1)
