"""Central MoCo v2 (He et al., 2020; Chen et al., 2020) as a textbook would write it: no clients, no cut, no engine.

It shares no code with the package: its own network, torchvision's augmentation on PIL images, one optimiser, a loop.
What it reaches is what split training has to reach on the same images in as many steps (`benchmarks.learning`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's


class StandardisedConv(nn.Conv2d):
    """A convolution whose filters have zero mean and unit deviation (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), None, self.stride, self.padding)


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
    return StandardisedConv(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 4, channels)


class Block(nn.Module):
    """A basic residual block (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(inputs, outputs, 3, stride), norm(outputs), nn.ReLU())
        self.second = nn.Sequential(conv(outputs, outputs, 3, 1), norm(outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet8(width: int = 16, stem_stride: int = 1) -> nn.Sequential:
    """Images (n, 3, 32, 32) in [0, 1] to features (n, 4 * width): stem, three blocks, average pool."""
    return nn.Sequential(
        transforms.Normalize(MEAN, DEVIATION),
        nn.Sequential(conv(3, width, 3, stem_stride), norm(width), nn.ReLU()),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Views:
    """MoCo v2's augmentation by torchvision and PIL, image by image."""

    def __init__(self, size: int) -> None:
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.08, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """A random view of every image: float (n, 3, size, size) in [0, 1]."""
        return torch.stack([self._transform(image) for image in images])


class CentralMoco:
    """MoCo v2 with a symmetric loss on images in one place, with the hyper-parameters that MocoSFL's paper gives.

    images: uint8 (n, 3, h, w). steps: the length of the cosine schedule. bfloat16: autocast on the CPU.
    """

    def __init__(self, images: Tensor, *, steps: int, seed: int, batch: int = 100, rate: float = 0.06,
                 momentum: float = 0.9, weight_decay: float = 5e-4, ema: float = 0.99, temperature: float = 0.1,
                 keys: int = 6000, dim: int = 1024, bfloat16: bool = False,
                 stem_stride: int = 1) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.backbone = resnet8(stem_stride=stem_stride)
        features = 64
        self.head = nn.Sequential(nn.Linear(features, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.online = nn.Sequential(self.backbone, self.head)
        self.slow = copy.deepcopy(self.online)
        self.queue = F.normalize(torch.randn(keys, dim), dim=1)
        self.optimiser = torch.optim.SGD(
            self.online.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay
        )
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.views = Views(images.shape[-1])
        self.steps, self.batch, self.rate, self.ema, self.temperature = steps, batch, rate, ema, temperature
        self.bfloat16 = bfloat16
        self.taken = 0
        self.order: list[int] = []

    def step(self) -> float:
        """One step; returns the loss, summed over both directions."""
        if len(self.order) < self.batch:
            self.order += torch.randperm(len(self.pictures)).tolist()
        drawn, self.order = self.order[: self.batch], self.order[self.batch :]
        pictures = [self.pictures[index] for index in drawn]
        first, second = self.views(pictures), self.views(pictures)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * (1 + math.cos(math.pi * self.taken / self.steps)) / 2
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            q1, q2 = self.online(first), self.online(second)
            with torch.no_grad():
                k1, k2 = self.slow(first), self.slow(second)
        q1, q2, k1, k2 = (F.normalize(x.float(), dim=1) for x in (q1, q2, k1, k2))
        loss = self._contrast(q1, k2) + self._contrast(q2, k1)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.online.parameters(), strict=True):
                slow.mul_(self.ema).add_(fast, alpha=1 - self.ema)
        self.queue = torch.cat([self.queue[2 * self.batch :], k2, k1])
        self.taken += 1
        return float(loss.detach())

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        right = (queries * keys).sum(1, keepdim=True)
        scores = torch.cat([right, queries @ self.queue.T], dim=1) / self.temperature
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Backbone features of uint8 images (n, 3, h, w)."""
        return torch.cat([self.backbone(part.float() / 255) for part in images.split(250)])


def knn_accuracy(encode: Callable[[Tensor], Tensor], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor],
                 neighbours: int = 200, temperature: float = 0.1) -> float:  # fmt: skip
    """The weighted kNN monitor (Wu et al., 2018), one query at a time; train, test: (uint8 images, labels)."""
    bank = F.normalize(encode(train[0]), dim=1)
    classes = int(train[1].max()) + 1
    right = 0
    for query, label in zip(F.normalize(encode(test[0]), dim=1), test[1], strict=True):
        similarity = bank @ query
        nearest = similarity.topk(min(neighbours, len(bank)))
        votes = torch.zeros(classes)
        for value, index in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
            votes[train[1][index]] += math.exp(value / temperature)
        right += int(votes.argmax() == label)
    return right / len(test[1])
