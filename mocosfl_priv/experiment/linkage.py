"""Linkage of one client: messages of victims are matched with images that an attacker already has.

It is no :class:`Attack`, since it returns no image. It runs once per system, under the threat model of the attacks: it
needs QUERY, and makes use of AUXILIARY_DATA. See :mod:`mocosfl_priv.evaluation.linkage` for what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.errors import RunFailedError, ThreatModelError
from mocosfl_priv.evaluation.linkage import (
    COPIES,
    SCORES,
    Copy,
    Matches,
    Moments,
    Score,
    Views,
    choose_score,
    compare_in_chunks,
    jpeg_copies,
)
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.experiment.attack import Target, make_view
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.plugins import AttackerView, Capability, with_implied
from mocosfl_priv.results import LINKAGE, LINKAGE_COLUMNS, LINKAGE_RATES, SYSTEM_KEYS
from mocosfl_priv.runtime.imports import cause
from mocosfl_priv.runtime.progress import Segment
from mocosfl_priv.runtime.seeding import generator, global_seed

NAME = "linkage"  # names its streams of random numbers, as an attack's label does
USES = with_implied({Capability.QUERY, Capability.AUXILIARY_DATA})
FEWEST_CANDIDATES = 1000  # unless the configuration asks for fewer
MOST_BATCH = 256  # images that are encoded at once
# messages that are held at once, besides the victims' as they arrived: of a batch of candidates, and of victims
BATCH_BYTES, CHUNK_BYTES = 64 * 2**20, 256 * 2**20
FOR_MOMENTS, REHEARSED, STAND_INS = 512, 256, 64  # auxiliary images: for moments, as candidates, as victims
SECONDS = 10.0  # a first guess, soon replaced


@dataclass(frozen=True)
class Library:
    """Images of bystanders, among which those of the victims are hidden.

    bystanders: uint8 (k, c, h, w), in the order in which they are used. unseen: how many come first on which no system
    trained. wanted: candidates in all, victims included; 0 for no linkage. seed: of the random views.
    """

    bystanders: Tensor
    unseen: int
    wanted: int
    seed: int

    @classmethod
    def draw(
        cls, victims: ImageSet, unseen: Sequence[ImageSet], seen: Sequence[ImageSet], wanted: int, seed: int
    ) -> Library:
        """Draw bystanders at random, since images may be ordered by class.

        unseen: images on which no system trained, in order of preference. seen: images that some system trained on;
        only as many are drawn as the fewest candidates need. No image is drawn twice, and none that is a victim's.
        """
        rng = generator(seed, "linkage candidates")
        taken = set(victims.digests().tolist()) if wanted else set()
        drawn = _draw(unseen, wanted, taken, rng)
        least = min(FEWEST_CANDIDATES, wanted)
        more = _draw(seen, least - len(victims) - len(drawn), taken, rng)
        bystanders = torch.stack([*drawn, *more]) if drawn or more else victims.images[:0]
        return cls(bystanders, len(drawn), wanted, seed)

    def count(self, victims: int) -> int:
        """Candidates for so many victims."""
        return victims + max(0, min(self.wanted - victims, len(self.bystanders)))

    def trained_on(self, victims: int) -> int:
        """Of these candidates, images that a system trained on."""
        return max(0, self.count(victims) - victims - self.unseen)

    def refusal(self, conditions: AttackConditions, victims: int) -> str:
        """Why linkage of so many victims cannot be measured; empty if it can."""
        if not self.wanted:
            return "evaluation.linkage_candidates is 0"
        if Capability.QUERY not in conditions.threat.grants:
            return "the threat model does not grant query"
        least = min(FEWEST_CANDIDATES, self.wanted)
        if self.count(victims) < least:
            return (
                f"{self.count(victims)} candidates, at least {least} are needed; evaluation.linkage_candidates asks "
                "for fewer"
            )
        return ""


def _draw(sets: Sequence[ImageSet], count: int, taken: set[bytes], rng: torch.Generator) -> list[Tensor]:
    """At most `count` images, all of the first set before any of the next one; none whose digest is in `taken`."""
    drawn: list[Tensor] = []
    for images in sets:
        order = torch.randperm(len(images), generator=rng).tolist()
        if len(drawn) >= count:
            break
        digests = images.digests().tolist()
        for index in order:
            if len(drawn) < count and digests[index] not in taken:
                taken.add(digests[index])
                drawn.append(images.images[index])
    return drawn


@dataclass(frozen=True)
class Linkage:
    """What linkage found for one set of victims.

    victims: the name of the set. values: float (n,) of zeros and ones, or NaN, by the names in `LINKAGE_RATES`; empty
    if nothing was measured, and `refusal` says why. candidates: how many there were. trained_on: of these, images that
    a system trained on. score: how messages were compared. queries: images that the attacker encoded.
    """

    victims: str
    values: Mapping[str, np.ndarray]
    groups: np.ndarray
    candidates: int = 0
    trained_on: int = 0
    score: str = ""
    queries: int = 0
    refusal: str = ""

    @classmethod
    def absent(cls, victims: VictimSet, refusal: str) -> Linkage:
        """That nothing was measured."""
        return cls(victims.name, {}, victims.groups.numpy(), refusal=refusal)

    @property
    def columns(self) -> dict[str, Any]:
        """What every row of the system says: `LINKAGE`; NaN where it was not measured."""
        missing = np.array([np.nan])
        found = {
            **{name: float(self.values.get(name, missing).mean()) for name in LINKAGE_RATES},
            "linkage_chance": 1 / self.candidates if self.candidates else np.nan,
            "linkage_candidates": self.candidates or np.nan,
            "linkage_score": self.score,
        }
        assert found.keys() == set(LINKAGE)
        return found

    def per_image(self, keys: Mapping[str, Any]) -> pd.DataFrame:
        """One line per victim; none if nothing was measured."""
        count = len(self.groups) if self.values else 0
        return pd.DataFrame(
            {
                **{key: [keys[key]] * count for key in SYSTEM_KEYS},
                "victims": self.victims,
                "image": np.arange(count),
                "group": self.groups[:count],
                **{name: self.values.get(name, np.empty(0)) for name in LINKAGE_RATES},
                "candidates": self.candidates,
                "score": self.score,
            },
            index=range(count),
        )

    @property
    def note(self) -> str:
        """A line about it, for the result."""
        if not self.values:
            return f"Linkage not measured: {self.refusal}"
        seen = f", {self.trained_on} of which a system trained on" if self.trained_on else ""
        return f"Linkage of {len(self.groups)} messages among {self.candidates} candidates{seen}"


Linked = tuple[Mapping[str, Any], Linkage]  # the keys of a system, and what was found for one set of victims


def linkage_info(linked: Sequence[Linked]) -> dict[str, Any]:
    """What run.json says of linkage: notes, without repetitions, and what each system was matched by."""
    return {
        "notes": list(dict.fromkeys(found.note for _, found in linked)),
        "systems": [
            {
                **{key: None if pd.isna(value) else value for key, value in keys.items()},  # JSON has no NaN
                "victims": found.victims,
                "candidates": found.candidates,
                "trained_on": found.trained_on,
                "score": found.score,
                "queries": found.queries,
                "refusal": found.refusal,
            }
            for keys, found in linked
        ],
    }


def linkage_table(linked: Sequence[Linked]) -> pd.DataFrame:
    """The lines of all victims of all systems, `LINKAGE_COLUMNS`."""
    parts = [found.per_image(keys) for keys, found in linked if found.values]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=LINKAGE_COLUMNS)


def linkage_segments(
    title: str, conditions: AttackConditions, library: Library, victim_sets: Sequence[VictimSet]
) -> list[Segment]:
    """What linkage of the system `title` is called in progress displays; none where it is not measured."""
    measured = any(not library.refusal(conditions, len(victims.images)) for victims in victim_sets)
    return [Segment(f"link messages of {title}", NAME, SECONDS)] if measured else []


def link(
    conditions: AttackConditions, library: Library, target: Target, victim_sets: Sequence[VictimSet]
) -> list[Linkage]:
    """Match the messages of all victims with candidates, and return what was found for each set.

    The messages are those that attacks get. The attacker chooses the score and what messages are centred and scaled by
    on its auxiliary images; without enough of them, moments are those of the candidates, and the score is the first of
    `SCORES`. Where it fails, results say why. Raises ThreatModelError when it reaches for more than was granted.
    """
    try:
        return measure(conditions, library, target, victim_sets)
    except ThreatModelError:
        raise
    except Exception as error:  # a user's client or defense can fail in any way
        return [Linkage.absent(victims, f"it failed: {cause(error)}") for victims in victim_sets]


def measure(
    conditions: AttackConditions, library: Library, target: Target, victim_sets: Sequence[VictimSet]
) -> list[Linkage]:
    """As :func:`link`, but an error ends it."""
    refusals = [library.refusal(conditions, len(victims.images)) for victims in victim_sets]
    if all(refusals):
        return [Linkage.absent(victims, why) for victims, why in zip(victim_sets, refusals, strict=True)]
    victims = torch.cat([each.images for each in victim_sets])
    found = []
    with torch.no_grad(), global_seed(target.seed, NAME):  # a client may add noise of its own
        view = make_view(conditions, target, NAME, USES & conditions.threat.grants, victims)
        if not bool(torch.isfinite(view.smashed).all()):
            raise RunFailedError("messages are not finite")
        matcher = _Matcher(view, conditions.count_messages(target.defense))
        moments, score = _prepared(matcher, generator(target.seed, "linkage rehearsal"))
        received = view.smashed.flatten(1).split([len(each.images) for each in victim_sets])
        before = 0
        for each, messages, refusal in zip(victim_sets, received, refusals, strict=True):
            if refusal:
                found.append(Linkage.absent(each, refusal))
                continue
            candidates = _Candidates(each.images, library.bystanders[: library.count(len(each.images)) - len(messages)])
            rng = generator(library.seed, "linkage views", each.name)
            values = {}
            for copy, scores in matcher.scores(messages, candidates, moments, score, rng):
                matches = Matches.of(scores)
                values[f"linkage_{copy}"] = matches.first.numpy().astype(float)
                values[f"linkage_{copy}_tpr"] = matches.verified.numpy().astype(float)
            found.append(
                Linkage(
                    each.name, {name: values[name] for name in LINKAGE_RATES}, each.groups.numpy(),
                    len(candidates), library.trained_on(len(each.images)), score, view.queries - before,
                )
            )  # fmt: skip
            before = view.queries
    return found


@dataclass(frozen=True)
class _Candidates:
    """Images of victims, float in [0, 1], and of bystanders, uint8, as one sequence."""

    victims: Tensor
    bystanders: Tensor

    def __len__(self) -> int:
        return len(self.victims) + len(self.bystanders)

    def copies(self, copy: Copy, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
        """All of them, as `copy` says, float (b, c, h, w) in [0, 1]; what is drawn does not depend on `batch`."""
        height, width = self.victims.shape[-2:]
        views = Views.draw(len(self), height, width, rng) if copy == "view" else None
        start = 0
        for part in (*self.victims.split(batch), *self.bystanders.split(batch)):
            images = to_unit_range(part) if part.dtype == torch.uint8 else part
            yield jpeg_copies(images) if copy == "jpeg" else images if views is None else views(images, start)
            start += len(part)


class _Matcher:
    """Encodes images as the attacker does, in batches of bounded size. messages: that each mean message is made of."""

    def __init__(self, view: AttackerView, messages: int) -> None:
        self._view = view
        width = view.smashed[0].numel()
        bytes_per_image = width * (8 + 4 * messages)  # float64, and the float32 messages of which it is the mean
        self.batch = min(MOST_BATCH, max(1, BATCH_BYTES // bytes_per_image))
        self._chunk = max(1, CHUNK_BYTES // (8 * width))

    @property
    def auxiliary(self) -> Tensor:
        """The attacker's images nearest to the target distribution, float (n, c, h, w); none where not granted."""
        if not self._view.has(Capability.AUXILIARY_DATA):
            return torch.empty(0)
        return self._view.auxiliary.nearest_images

    def encode(self, images: Tensor) -> Tensor:
        """Messages of images float (n, c, h, w), n <= `batch`: float64 (n, d) on the CPU, which all devices have."""
        sent = self._view.query(images.to(self._view.compute.device))
        return sent.flatten(1).cpu().double()

    def encode_all(self, batches: Iterator[Tensor] | Sequence[Tensor]) -> Iterator[Tensor]:
        """Messages of one batch after the other."""
        return (self.encode(batch) for batch in batches)

    def scores(
        self, messages: Tensor, candidates: _Candidates, moments: Moments | None, score: Score, rng: torch.Generator
    ) -> Iterator[tuple[Copy, Tensor]]:
        """The scores float64 (n, m) of messages (n, d) against every kind of copy.

        moments: None for those of the candidates.
        """
        for copy in COPIES:
            state = rng.get_state()
            known = moments
            if known is None:
                known = Moments.of(self.encode_all(candidates.copies(copy, self.batch, rng)))
                rng.set_state(state)  # the same views again
            batches = self.encode_all(candidates.copies(copy, self.batch, rng))
            yield copy, compare_in_chunks(score, known, messages.cpu(), batches, self._chunk)


def _prepared(matcher: _Matcher, rng: torch.Generator) -> tuple[Moments | None, Score]:
    """Moments and score by the attacker's own images; None and the first score where there are too few of them."""
    known = matcher.auxiliary
    if len(known) < 2 * STAND_INS:
        return None, SCORES[0]
    order = torch.randperm(len(known), generator=rng)
    moments = Moments.of(matcher.encode_all(known[order[:FOR_MOMENTS]].split(matcher.batch)))
    rehearsed = known[order[:REHEARSED]].cpu()
    candidates = _Candidates(rehearsed[:STAND_INS], (rehearsed[STAND_INS:] * 255).round().byte())
    stand_ins = torch.cat(list(matcher.encode_all(rehearsed[:STAND_INS].split(matcher.batch)))).float()
    state = rng.get_state()

    def rehearse(score: Score) -> list[Tensor]:
        rng.set_state(state)
        return [scores for _, scores in matcher.scores(stand_ins, candidates, moments, score, rng)]

    return moments, choose_score(rehearse)
