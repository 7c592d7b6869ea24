"""Recognition: whether a reconstruction shows what the victim is, and which image it is.

A small classifier, which is independent of the attacked system, judges reconstructions. It is trained on the labelled
training split, never on victims or probe test images. A reconstruction is

- recognised if the classifier predicts the victim's class from it (top-1);
- reidentified if, among at least `CANDIDATES` images, the victim itself is strictly the nearest to it, by cosine
  similarity of the classifier's penultimate features (rank-1).

Both shares are reported with a chance level, the share for images without information, and a ceiling, the share for the
victims' own images. Candidates cut from the same photograph may overlap, which makes re-identification harder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.results import RECOGNITION_LEVELS
from mocosfl_priv.runtime.seeding import generator, global_seed

CANDIDATES = 1000
WIDTH = 16
LARGEST_SIDE = 64  # pixels; larger images are reduced to this size to limit the cost
BATCH = 64
BATCH_FOR_INFERENCE = 256
PEAK_LEARNING_RATE = 0.2
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 5e-4, 0.1
SHIFT_SHARE = 8  # images are shifted by up to an eighth of their side
STRONGEST_NOISE = 0.1  # largest standard deviation of the noise on training images
MILD_NOISE = 0.02  # standard deviation of the noise on the victims for the ceiling of re-identification


class Classifier(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, three max-pools, global average pool, a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH)
        layers: list[nn.Module] = [nn.BatchNorm2d(3, affine=False)]  # normalises images in [0, 1]
        for stage, (before, channels) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
            layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=False))
            if stage < len(widths) - 1:
                layers.append(nn.MaxPool2d(2))  # before the norm, which then has only a quarter of the values
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (n, classes) of images float (n, 3, h, w) in [0, 1]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return penultimate features (n, d) of images float (n, 3, h, w) in [0, 1]."""
        if max(images.shape[-2:]) > LARGEST_SIDE:
            images = F.interpolate(images, size=(LARGEST_SIDE, LARGEST_SIDE), mode="area")
        return self.body(images.contiguous(memory_format=torch.channels_last))


def train_classifier(
    images: Tensor, labels: Tensor, classes: int, *, epochs: int, device: torch.device, seed: int
) -> Classifier:
    """Train a classifier on uint8 images (n, 3, h, w), n >= 2, with labels int64 (n,), by one-cycle SGD.

    Training images are mirrored and shifted, and some are blurred or noisy, so that the blur and noise of
    reconstructions alone do not prevent recognition. On a CPU, equal seeds give equal classifiers.
    """
    rng = generator(seed, "recognition batches")
    with global_seed(seed, "recognition classifier"):
        network = Classifier(classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = min(BATCH, len(images))
    steps = len(images) // batch
    optimiser = torch.optim.SGD(
        network.parameters(), lr=PEAK_LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, total_steps=epochs * steps + 1)
    images, labels = images.to(device), labels.to(device)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=rng)
        for chosen in order[: steps * batch].view(steps, batch).to(device):  # without the last, small batch
            shown = _degrade(_flip_and_shift(to_unit_range(images[chosen]), rng), rng)
            loss = F.cross_entropy(network(shown), labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _flip_and_shift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image with probability 0.5 and shift it; edges are reflected."""
    n, _, height, width = images.shape
    reach = min(height, width) // SHIFT_SHARE
    flips = (torch.rand(n, generator=rng) < 0.5).to(images.device)
    images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * reach + 1, (n, 2), generator=rng).tolist()
    moved = [image[:, top : top + height, left : left + width]
             for image, (top, left) in zip(padded, offsets, strict=True)]  # fmt: skip
    return torch.stack(moved)


def _degrade(images: Tensor, rng: torch.Generator) -> Tensor:
    """Halve each image's resolution with probability 0.5, and add noise of random strength, up to `STRONGEST_NOISE`."""
    n = len(images)
    coarse = F.interpolate(F.avg_pool2d(images, 2), size=images.shape[-2:], mode="bilinear")
    blurred = (torch.rand(n, 1, 1, 1, generator=rng) < 0.5).to(images.device)
    deviation = STRONGEST_NOISE * torch.rand(n, 1, 1, 1, generator=rng)
    noise = deviation * torch.randn(images.shape, generator=rng)
    return (torch.where(blurred, coarse, images) + noise.to(images.device)).clamp(0, 1)


@dataclass(frozen=True)
class RecognitionJudge:
    """The classifier, the victims' labels and the candidates' features; made by :func:`build_judge`.

    labels: int64 (n,), of the victims.
    candidates: features float (m, d), of unit length; the first n are those of the victims. None if there are fewer
        than `CANDIDATES`; re-identification is then NaN.
    recognition_chance: share of the most frequent class among the victims, which is the best guess without the images.
    recognition_ceiling: top-1 accuracy on the victims' own images.
    reidentification_chance: 1 / m.
    reidentification_ceiling: rank-1 accuracy on the victims' own images with noise of standard deviation `MILD_NOISE`;
        without noise it would be 1 by definition.
    note: a line about these levels, for the result.
    """

    classifier: Classifier
    labels: Tensor
    candidates: Tensor | None
    recognition_chance: float
    recognition_ceiling: float
    reidentification_chance: float
    reidentification_ceiling: float
    note: str

    def __call__(self, reconstruction: Tensor) -> dict[str, Tensor]:
        """Judge reconstructions, float (n, 3, h, w) in [0, 1], in the order of the victims.

        Returns `recognised` and `reidentified`, float (n,) of zeros and ones, or NaN where not measured.
        """
        scores, features = _look(self.classifier, reconstruction)
        recognised = (scores.argmax(1) == self.labels).float()
        if self.candidates is None:
            return {"recognised": recognised, "reidentified": torch.full_like(recognised, float("nan"))}
        return {"recognised": recognised, "reidentified": nearest_is_own(features, self.candidates).float()}

    @property
    def levels(self) -> dict[str, float]:
        """The chance levels and ceilings, by column name."""
        return {name: getattr(self, name) for name in RECOGNITION_LEVELS}


def nearest_is_own(queries: Tensor, candidates: Tensor) -> Tensor:
    """Whether query i of (n, d) is strictly more similar to candidate i than to all other candidates (m, d): bool (n,).

    A tie counts as a failure, since images without any structure all have the same features.
    """
    return own_is_best(queries @ candidates.T)


def own_is_best(similarity: Tensor) -> Tensor:
    """Whether entry (i, i) of (n, m) is strictly the largest of row i: bool (n,). A tie counts as a failure."""
    own = similarity.diagonal()
    others = similarity.clone()
    others.fill_diagonal_(-torch.inf)
    return own > others.amax(1)


def build_judge(
    training: Sequence[ImageSet],
    victims: ImageSet,
    bystanders: Sequence[ImageSet],
    *,
    epochs: int,
    device: torch.device,
    seed: int,
) -> RecognitionJudge:
    """Train the classifier on `training` and prepare the judgement of reconstructions of `victims`.

    bystanders: target images that are not attacked, in order of preference (probe test first). As many are drawn as are
        needed for `CANDIDATES` candidates, victims included.
    """
    classifier = train_classifier(
        torch.cat([images.images for images in training]),
        torch.cat([images.labels for images in training]),
        len(victims.class_names),
        epochs=epochs,
        device=device,
        seed=seed,
    )
    rng = generator(seed, "recognition candidates")
    drawn: list[Tensor] = [victims.images]
    for images in bystanders:  # drawn at random, since images may be ordered by class
        missing = max(0, CANDIDATES - sum(map(len, drawn)))
        drawn.append(images.images[torch.randperm(len(images), generator=rng)[:missing]])
    candidates = torch.cat(drawn)
    originals = to_unit_range(victims.images)
    scores, _ = _look(classifier, originals)
    chance = float(torch.bincount(victims.labels).max()) / len(victims)
    ceiling = float((scores.argmax(1) == victims.labels).float().mean())
    trained_on = sum(map(len, training))
    note = (f"Recognition by a classifier trained on {trained_on} images: "
            f"{100 * ceiling:.1f} % of the victims' own images, chance {100 * chance:.1f} %")  # fmt: skip
    if len(candidates) < CANDIDATES:
        absent = float("nan")
        note += f". Re-identification not measured: {len(candidates)} candidates, at least {CANDIDATES} are needed"
        return RecognitionJudge(classifier, victims.labels, None, chance, ceiling, absent, absent, note)
    _, known = _look(classifier, to_unit_range(candidates))
    _, noisy = _look(classifier, (originals + MILD_NOISE * torch.randn(originals.shape, generator=rng)).clamp(0, 1))
    found = float(nearest_is_own(noisy, known).float().mean())
    note += (f"; re-identification among {len(candidates)} candidates: "
             f"{100 * found:.1f} % of the victims' own images with slight noise")  # fmt: skip
    return RecognitionJudge(
        classifier, victims.labels, known, chance, ceiling, 1 / len(candidates), found, note
    )  # fmt: skip


@torch.no_grad()
def _look(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute scores (n, classes) and features of unit length (n, d) of images in [0, 1]; both on the CPU."""
    device = classifier.head.weight.device
    features = torch.cat([classifier.features(batch.to(device)) for batch in images.split(BATCH_FOR_INFERENCE)])
    return classifier.head(features).cpu(), F.normalize(features, dim=1).cpu()
