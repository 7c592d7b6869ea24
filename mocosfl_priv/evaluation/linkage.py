"""Linkage: which of many candidate images a message was made from.

An attacker who may query the client encodes images that it already has, such as a leaked photo library, and compares
their messages with a victim's. Nothing is reconstructed. The candidates are copies of the victims' images and images of
bystanders. Two questions are asked of the same scores, as in face recognition (Phillips, Grother and Micheals,
"Evaluation Methods in Face Recognition", Handbook of Face Recognition, Springer 2011,
https://link.springer.com/chapter/10.1007/978-0-85729-932-1_21):

- identification: is the victim's own candidate strictly the best one (rank-1)? Chance is 1 / candidates;
- verification: how many victims are accepted against their own candidate by a threshold that accepts at most the share
  `FALSE_POSITIVES` of all pairs of a victim and somebody else's candidate (TPR at 0.1 % FPR)? Chance is that share. A
  low rate of false positives is what makes such a decision worth anything to an attacker (Carlini et al., "Membership
  Inference Attacks From First Principles", IEEE S&P 2022, https://arxiv.org/abs/2112.03570).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mocosfl_priv.data.augmentation import FLIP_PROBABILITY, resized_crop, sample_crops
from mocosfl_priv.evaluation.recognition import own_is_best
from mocosfl_priv.evaluation.utility import to_unit_range

Copy = Literal["same", "jpeg", "view"]
COPIES: tuple[Copy, ...] = ("same", "jpeg", "view")
Score = Literal["cosine", "distance"]
SCORES: tuple[Score, ...] = ("cosine", "distance")  # the first one where nothing tells which is better
FALSE_POSITIVES = 1e-3
FEWEST_PAIRS = round(1 / FALSE_POSITIVES)  # pairs of a victim and another's candidate; fewer cannot show such a share
JPEG_QUALITY = 75
CONSTANT = 1e-6  # a deviation below this share of the largest one, or of the mean, is rounding


def jpeg_copies(images: Tensor) -> Tensor:
    """Store images as JPEG files of quality 75 and read them again, by Pillow.

    Args:
        images: float (n, c, h, w) in [0, 1], grey or colour.

    Returns:
        Float (n, c, h, w) in [0, 1].

    >>> jpeg_copies(torch.full((1, 3, 8, 8), 0.5)).shape
    torch.Size([1, 3, 8, 8])
    """
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    copies = [_through_jpeg(image) for image in pixels]
    return to_unit_range(torch.from_numpy(np.stack(copies))).to(images.device)


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    """One image, uint8 (h, w, c) to uint8 (c, h, w)."""
    file = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=JPEG_QUALITY)
    with Image.open(file) as read:
        stored = np.array(read)
    return stored[None] if stored.ndim == 2 else stored.transpose(2, 0, 1)


@dataclass(frozen=True)
class Views:
    """Random crops, resized, and mirrored with probability 0.5: the geometric part of the views of training.

    boxes: int64 (m, 4). mirrored: bool (m,). All are drawn at once, so that the batches in which they are used do not
    matter.
    """

    boxes: Tensor
    mirrored: Tensor

    @classmethod
    def draw(cls, count: int, height: int, width: int, rng: torch.Generator) -> Views:
        """For `count` images of `height` x `width` pixels; `rng` is on the CPU."""
        boxes = sample_crops(count, height, width, rng)
        return cls(boxes, torch.rand(count, generator=rng) < FLIP_PROBABILITY)

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """The views of images `start`, `start` + 1, ...: float (n, c, h, w) in [0, 1]."""
        part = slice(start, start + len(images))
        cropped = resized_crop(images, self.boxes[part].to(images.device))
        return torch.where(self.mirrored[part].to(images.device).view(-1, 1, 1, 1), cropped.flip(3), cropped)


@dataclass(frozen=True)
class Moments:
    """What messages are centred and scaled by, float64 (d,) each.

    mean: of every number of a message. scale: one over its deviation; 0 where it is constant up to rounding.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> Moments:
        """Of the messages in `batches`, float64 (n, d) each, which are looked at once; at least one message."""
        shift, total, squares, count = torch.empty(0), torch.empty(0), torch.empty(0), 0
        for batch in batches:
            if count == 0:  # sums of differences from one message are exactly 0 for a constant client
                shift = batch[0].clone()
                total, squares = torch.zeros_like(shift), torch.zeros_like(shift)
            moved = batch - shift
            total += moved.sum(0)
            squares += moved.square().sum(0)
            count += len(batch)
        mean = shift + total / count
        deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        varies = deviation > CONSTANT * torch.maximum(deviation.max(), mean.abs())
        return cls(mean, torch.where(varies, 1 / deviation, 0))

    def prepare(self, score: Score, messages: Tensor) -> Tensor:
        """Messages, float64 (n, d), as :func:`compare` takes them for `score`."""
        centred = messages - self.mean
        if score == "distance":
            return centred
        standardised = centred.mul_(self.scale)
        length = standardised.norm(dim=1, keepdim=True)
        return standardised.div_(torch.where(length > 0, length, 1))


def compare(score: Score, queries: Tensor, candidates: Tensor) -> Tensor:
    """How well messages fit, the higher the better.

    Args:
        score: `cosine` of standardised messages, or `distance` for the negative squared Euclidean distance.
        queries: float64 (n, d), from :meth:`Moments.prepare`.
        candidates: float64 (m, d), likewise.

    Returns:
        Float64 (n, m).
    """
    products = queries @ candidates.T
    if score == "cosine":
        return products
    lengths = queries.square().sum(1)[:, None] + candidates.square().sum(1)[None]
    return (2 * products - lengths).clamp(max=0)


def compare_in_chunks(
    score: Score, moments: Moments, queries: Tensor, batches: Iterable[Tensor], chunk: int
) -> Tensor:  # fmt: skip
    """The same as :func:`compare` of all messages at once, without preparing all of them at once.

    Args:
        score: see :func:`compare`.
        moments: what messages are centred and scaled by.
        queries: (n, d), of any floating type: as they arrived.
        batches: the candidates' messages, float64 (b, d) each; each batch is looked at once.
        chunk: how many queries are prepared at a time.

    Returns:
        Float64 (n, m).
    """
    parts = queries.split(chunk)
    kept = [moments.prepare(score, parts[0].double())] if len(parts) == 1 else None  # else anew for every batch
    columns = []
    for batch in batches:
        candidates = moments.prepare(score, batch)
        prepared = kept or (moments.prepare(score, part.double()) for part in parts)
        columns.append(torch.cat([compare(score, part, candidates) for part in prepared]))
    return torch.cat(columns, 1)


def accepted(scores: Tensor, rate: float = FALSE_POSITIVES) -> Tensor | None:
    """Which victims are accepted against their own candidate, by one threshold for all.

    Args:
        scores: float (n, m), m >= n; candidate i < n is the own one of victim i.
        rate: the largest share of the n (m - 1) other pairs that the threshold may accept.

    Returns:
        Bool (n,), whose mean is the TPR at that FPR; None where there are fewer than 1 / `rate` other pairs, which
        cannot show such a share.

    >>> accepted(torch.eye(40, 60)).float().mean()
    tensor(1.)
    """
    n, m = scores.shape
    others = n * (m - 1)
    if others < round(1 / rate):
        return None
    allowed = int(np.floor(rate * others + 1e-9))  # a product such as 0.001 * 3000 may lie just below a whole number
    impostors = scores.clone()
    impostors.fill_diagonal_(-torch.inf)
    # the first pair that must not be accepted; pairs with its very score are not either
    bar = impostors.flatten().topk(allowed + 1).values[-1]
    return scores.diagonal() > bar


@dataclass(frozen=True)
class Matches:
    """How the messages of n victims were matched with m candidates.

    first: bool (n,), whether the own candidate is strictly the best. verified: float (n,), whether it is accepted; NaN
    where there are too few pairs.
    """

    first: Tensor
    verified: Tensor

    @classmethod
    def of(cls, scores: Tensor) -> Matches:
        """From scores (n, m), in which candidate i < n is the own one of victim i."""
        known = accepted(scores)
        first = own_is_best(scores)
        return cls(first, torch.full((len(first),), torch.nan) if known is None else known.float())


def choose_score(rehearse: Callable[[Score], Iterable[Tensor]]) -> Score:
    """The score that matches most, by images of the attacker's own.

    Args:
        rehearse: returns, for a score, the scores (n, m) of the attacker's images against their copies, one tensor for
            every kind of copy.

    Returns:
        The score with the highest mean share of rank-1 matches; of equal ones the first of `SCORES`.
    """
    found = {
        score: float(torch.stack([own_is_best(s).double().mean() for s in rehearse(score)]).mean()) for score in SCORES
    }
    return max(SCORES, key=lambda score: found[score])
