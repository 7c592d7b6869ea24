"""Threat models, and the view that an attack is granted.

An attack declares the capabilities it needs; an experiment grants some. What was not granted is not merely
forbidden but absent: the view is built from the victims' smashed data and holds no reference to their images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.errors import ConfigurationError, ThreatModelError, unknown_name
from mocosfl_priv.progress import Progress, Silent

QUERY_BATCH = 256


class Capability(StrEnum):
    """What an attacker may have beyond the victims' smashed data."""

    CLIENT_WEIGHTS = "client_weights"
    QUERY = "query"
    ARCHITECTURE = "architecture"
    AUXILIARY_DATA = "auxiliary_data"
    GRADIENT_CHANNEL = "gradient_channel"
    TRAINING_STREAM = "training_stream"


DESCRIPTIONS = {
    Capability.CLIENT_WEIGHTS: "white box: the client model itself, with gradients through it",
    Capability.QUERY: "may send images of its own through the client and its defense",
    Capability.ARCHITECTURE: "knows the client's layers, not their weights",
    Capability.AUXILIARY_DATA: "has public images, and a declared share of the target distribution",
    Capability.GRADIENT_CHANNEL: "malicious server: chooses the gradients that clients receive",
    Capability.TRAINING_STREAM: "sees every message of training, not one snapshot",
}


# Attacks run on a finished training, so far: what would have to happen during training cannot be granted.
NOT_YET_GRANTABLE = frozenset({Capability.GRADIENT_CHANNEL, Capability.TRAINING_STREAM})


def with_implied(capabilities: Iterable[Capability]) -> frozenset[Capability]:
    """Who has the client's weights can also query it, and knows its architecture."""
    closed = frozenset(capabilities)
    if Capability.CLIENT_WEIGHTS in closed:
        closed |= {Capability.QUERY, Capability.ARCHITECTURE}
    return closed


@dataclass(frozen=True)
class ThreatModel:
    """The capabilities an experiment grants, with what they imply.

    adaptive: the attacker knows the defense (Kerckhoffs) and may train through it.
    """

    grants: frozenset[Capability]
    adaptive: bool = True

    @classmethod
    def of(cls, names: Iterable[str], adaptive: bool = True) -> ThreatModel:
        """From capability names; raises ConfigurationError for unknown ones."""
        grants: set[Capability] = set()
        for name in names:
            try:
                grants.add(Capability(name))
            except ValueError:
                raise unknown_name("capability in threat.grants", name, [c.value for c in Capability]) from None
        if grants & NOT_YET_GRANTABLE:
            names = ", ".join(sorted(grants & NOT_YET_GRANTABLE))
            raise ConfigurationError(f"threat.grants: {names} cannot be granted: attacks run after training only")
        return cls(with_implied(grants), adaptive)

    def require(self, needs: frozenset[Capability], who: str) -> None:
        """Raise ThreatModelError unless all of `needs` are granted."""
        missing = sorted(needs - self.grants)
        if missing:
            raise ThreatModelError(
                f"attack {who!r} needs {', '.join(missing)}, which this threat model does not grant "
                f"(threat.grants: {', '.join(sorted(self.grants)) or 'nothing'})"
            )


@dataclass(frozen=True)
class AuxiliaryData:
    """The attacker's own images: float (n, 3, h, w) in [0, 1].

    of_target: bool (n,), which of them come from the target distribution.
    """

    images: Tensor
    of_target: Tensor

    def __len__(self) -> int:
        return len(self.images)


class AttackerView:
    """All that one attack gets to see.

    smashed: the victims' smashed data as sent, float (n, *smashed_shape).
    image_shape: (3, h, w).
    compute: where to compute; `compute.autocast()` is the run's mixed precision.
    queries: images the attacker sent through the client so far.
    """

    def __init__(
        self,
        *,
        smashed: Tensor,
        image_shape: tuple[int, int, int],
        compute: Compute,
        visible: frozenset[Capability],
        client: nn.Module | None = None,
        protect: Callable[[Tensor], Tensor] | None = None,
        knows_defense: bool = True,
        simulates_queries: bool = True,
        auxiliary: AuxiliaryData | None = None,
        build_client: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.smashed = smashed
        self.image_shape = image_shape
        self.compute = compute
        self.queries = 0
        self._visible = visible
        self._client = client if visible & {Capability.CLIENT_WEIGHTS, Capability.QUERY} else None
        applied = protect if protect is not None else _identity
        self._protect = applied if knows_defense else _identity
        # A real query passes the defense whether or not the attacker knows of it. One who holds the weights runs
        # the client at home, and adds the defense only if it knows it.
        self._answer = applied if knows_defense or not simulates_queries else _identity
        self._build_client = build_client if Capability.ARCHITECTURE in visible else None
        self._auxiliary = auxiliary if Capability.AUXILIARY_DATA in visible else None

    def has(self, capability: Capability) -> bool:
        """Whether this view holds `capability`."""
        return capability in self._visible

    @property
    def client(self) -> nn.Module:
        """CLIENT_WEIGHTS: the client model, images in [0, 1] to smashed data before any defense; differentiable."""
        self._require(Capability.CLIENT_WEIGHTS)
        assert self._client is not None
        return self._client

    def protect(self, smashed: Tensor) -> Tensor:
        """CLIENT_WEIGHTS: the defense's transformation with fresh randomness, differentiable; the identity for an
        attacker that is not adaptive.
        """
        self._require(Capability.CLIENT_WEIGHTS)
        return self._protect(smashed)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """QUERY: what the client would send for images (n, 3, h, w) in [0, 1]; no gradient.

        The defense is included, except for an attacker that holds the weights and does not know the defense.
        """
        self._require(Capability.QUERY)
        assert self._client is not None
        self.queries += len(images)
        return torch.cat([self._answer(self._client(batch)) for batch in images.split(QUERY_BATCH)])

    def untrained_client(self) -> nn.Module:
        """ARCHITECTURE: a client with the same layers and freshly drawn weights, for the attack to train."""
        self._require(Capability.ARCHITECTURE)
        assert self._build_client is not None
        return self._build_client()

    @property
    def auxiliary(self) -> AuxiliaryData:
        """AUXILIARY_DATA: images of the attacker's own."""
        self._require(Capability.AUXILIARY_DATA)
        assert self._auxiliary is not None
        return self._auxiliary

    def _require(self, capability: Capability) -> None:
        if capability not in self._visible:
            raise ThreatModelError(
                f"this attack reached for {capability}, which it did not declare or was not granted; "
                "list it in the attack's `needs` or `optional`"
            )


def _identity(smashed: Tensor) -> Tensor:
    return smashed


class Budget:
    """How much an attack may spend, and what it spent.

    seconds: wall-clock limit; None for no limit, which keeps runs repeatable.
    steps: counted as the attack draws them from :meth:`iterate`.
    """

    def __init__(self, seconds: float | None = None, progress: Progress | None = None, stage: str = "attack") -> None:
        self.seconds = seconds
        self.steps = 0
        self._progress = progress or Silent()
        self._stage = stage
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the budget was opened."""
        return time.monotonic() - self._started

    @property
    def exhausted(self) -> bool:
        """Whether the time is up."""
        return self.spent(1.0)

    def spent(self, share: float) -> bool:
        """Whether `share` of the time is gone, for attacks of several stages: a later one needs what is left."""
        return self.seconds is not None and self.elapsed >= share * self.seconds

    def iterate(self, planned: int) -> Iterator[int]:
        """0, 1, ... for `planned` steps, or until the time is up."""
        self._progress.begin(self._stage, planned)
        try:
            for step in range(planned):
                if self.exhausted:
                    return
                self.steps += 1
                yield step
                self._progress.advance()
        finally:
            self._progress.end()
