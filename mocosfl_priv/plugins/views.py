"""The view that an attack is granted.

An attack declares the capabilities it needs; an experiment grants some. What was not granted is not merely
forbidden but absent: the view is built from the victims' smashed data and holds no reference to their images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocosfl_priv.errors import ThreatModelError
from mocosfl_priv.plugins.threat import Capability
from mocosfl_priv.runtime.compute import Compute

QUERY_BATCH = 256


ENOUGH_IMAGES = 16  # the mean of so many errs by another sixteenth of their variance


class AuxiliaryData:
    """The attacker's own images.

    Args:
        images: float (n, c, h, w) in [0, 1]; or uint8 on the CPU, which takes a quarter of the memory: :attr:`images`
            then makes floats of them whenever it is asked, on the device of `of_target`.
        of_target: bool (n,), which of them come from the target distribution.
        labels: int64 (n,) where the attacker knows the classes that the clients are trained for; else None.

    >>> known = AuxiliaryData(torch.rand(20, 3, 8, 8), of_target=torch.arange(20) < 17)
    >>> len(known), len(known.nearest)
    (20, 17)
    """

    def __init__(self, images: Tensor, of_target: Tensor, labels: Tensor | None = None) -> None:
        self._stored = images
        self.of_target = of_target
        self.labels = labels

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def images(self) -> Tensor:
        """Float (n, c, h, w) in [0, 1]; a new tensor each time where bytes are stored."""
        if self._stored.dtype != torch.uint8:
            return self._stored
        return self._stored.float().div_(255).to(self.of_target.device)

    def select(self, chosen: Tensor) -> AuxiliaryData:
        """Some of it, by indices or a mask."""
        chosen = chosen.to(self.of_target.device)
        labels = None if self.labels is None else self.labels[chosen]
        return AuxiliaryData(self._stored[chosen.to(self._stored.device)], self.of_target[chosen], labels)

    def copy(self) -> AuxiliaryData:
        """The same for somebody who may spoil it. Stored bytes are shared, since nobody is handed them."""
        stored = self._stored if self._stored.dtype == torch.uint8 else self._stored.clone()
        return AuxiliaryData(stored, self.of_target.clone(), None if self.labels is None else self.labels.clone())

    def without(self, held_out: Tensor) -> AuxiliaryData:
        """All but the indices `held_out`, in their order."""
        rest = torch.ones(len(self), dtype=torch.bool)
        rest[held_out] = False
        return self.select(rest)

    def hold_out(self, share: float, rng: torch.Generator, most: int | None = None) -> Tensor:
        """Indices of images to choose by: a `share` of those of the target distribution, where that makes enough of
        them (a choice by a few images is chance), else of all; at least one, and at most `most`.
        """
        candidates = self.of_target.nonzero().squeeze(1).cpu()
        if round(share * len(candidates)) < ENOUGH_IMAGES:
            candidates = torch.arange(len(self))
        count = round(share * len(candidates))
        count = max(1, count if most is None else min(most, count))
        return candidates[torch.randperm(len(candidates), generator=rng)[:count]]

    @property
    def nearest(self) -> AuxiliaryData:
        """What is of the target distribution where that is enough to know its mean by, else all."""
        return self.select(self.of_target) if int(self.of_target.sum()) >= ENOUGH_IMAGES else self

    @property
    def nearest_images(self) -> Tensor:
        """The images of :attr:`nearest`."""
        return self.nearest.images


class AttackerView:
    """All that one attack gets to see.

    smashed: the victims' smashed data as sent, float (n, *smashed_shape): maps (n, c, h, w), tokens (n, t, d) or
        vectors (n, d).
    image_shape: (c, h, w), grey or colour.
    compute: where to compute; `compute.autocast()` is the run's mixed precision.
    queries: images the attacker sent through the client so far.
    simulator: the decoder, in the decoder grammar, against which the defense was trained; None where it was trained
        against none, or where the attacker does not know the defense.

    protect, undefended: what arrives of smashed data that a client sends with its defense, and would send without one.

    A capability whose object is not given (the server of a system that has none) is not visible, whatever was granted.
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
        undefended: Callable[[Tensor], Tensor] | None = None,
        knows_defense: bool = True,
        simulates_queries: bool = True,
        auxiliary: AuxiliaryData | None = None,
        build_client: Callable[[], nn.Module] | None = None,
        server: nn.Module | None = None,
        colluder: nn.Module | None = None,
        simulator: str | None = None,
        listener: object | None = None,
    ) -> None:
        if server is None:
            visible -= {Capability.SERVER_MODEL}
        if colluder is None:
            visible -= {Capability.COLLUDING_CLIENT}
        self.smashed = smashed
        self.image_shape = image_shape
        self.compute = compute
        self.queries = 0
        self.simulator = simulator if knows_defense else None
        self._parent: AttackerView | None = None
        self._visible = visible
        self._client = client if visible & {Capability.CLIENT_WEIGHTS, Capability.QUERY} else None
        plain = undefended if undefended is not None else _identity
        applied = protect if protect is not None else plain
        self._protect = applied if knows_defense else plain
        # A real query passes the defense whether or not the attacker knows of it. One who holds the weights runs
        # the client at home, and adds the defense only if it knows it.
        self._answer = applied if knows_defense or not simulates_queries else plain
        self._build_client = build_client if Capability.ARCHITECTURE in visible else None
        self._auxiliary = auxiliary if Capability.AUXILIARY_DATA in visible else None
        self._server = server if Capability.SERVER_MODEL in visible else None
        self._colluder = colluder if Capability.COLLUDING_CLIENT in visible else None
        self._listener = listener if Capability.TRAINING_STREAM in visible else None

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
        """CLIENT_WEIGHTS, COLLUDING_CLIENT or ARCHITECTURE: the defense's transformation with fresh randomness, and
        what the codec leaves of it, differentiable; without the defense for an attacker that is not adaptive. For who
        runs a client at home, be it the victims', another participant's or one trained by the attack itself.
        """
        if not self._visible & {Capability.COLLUDING_CLIENT, Capability.ARCHITECTURE}:
            self._require(Capability.CLIENT_WEIGHTS)
        return self._protect(smashed)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """QUERY: what the client would send for images (n, 3, h, w) in [0, 1]; no gradient.

        The defense is included, except for an attacker that holds the weights and does not know the defense.
        """
        self._require(Capability.QUERY)
        assert self._client is not None
        self._count_queries(len(images))
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

    @property
    def server(self) -> nn.Module:
        """SERVER_MODEL: received smashed data to contrastive embeddings (n, d); differentiable, frozen.

        Its children `trunk` (smashed data to features) and `projector` (features to embeddings) can be used alone.
        """
        self._require(Capability.SERVER_MODEL)
        assert self._server is not None
        return self._server

    @property
    def colluder(self) -> nn.Module:
        """COLLUDING_CLIENT: another participant's copy of the client model, which need not equal the victims'; as
        `client`, images in [0, 1] to smashed data before any defense; differentiable.
        """
        self._require(Capability.COLLUDING_CLIENT)
        assert self._colluder is not None
        return self._colluder

    def restricted(self, declared: frozenset[Capability]) -> AttackerView:
        """What an attack within this one sees that declares `declared`; its queries count here, too."""
        inner = copy.copy(self)
        inner.queries = 0
        inner._parent = self
        inner._visible = self._visible & declared
        return inner

    def rehearsal(self, held_out: Tensor, victims: bool = True) -> AttackerView:
        """QUERY, AUXILIARY_DATA: a view on which an attack shows how well it does.

        held_out: which auxiliary images (indices) are no longer among its auxiliary data. Their messages stand in
        `smashed` instead, after the victims' or alone without `victims`, so that what an attack makes of them can be
        compared with the truth.
        """
        messages = self.query(self.auxiliary.select(held_out).images)
        inner = self.restricted(self._visible)
        inner.smashed = torch.cat([self.smashed, messages]) if victims else messages
        inner._auxiliary = self.auxiliary.without(held_out)
        return inner

    def _count_queries(self, images: int) -> None:
        self.queries += images
        if self._parent is not None:
            self._parent._count_queries(images)

    @property
    def listener(self) -> object | None:
        """TRAINING_STREAM: what the attack's own `attend` returned, after it heard the training; None if nothing."""
        self._require(Capability.TRAINING_STREAM)
        return self._listener

    def _require(self, capability: Capability) -> None:
        _require(self._visible, capability)


class StreamView:
    """All that one attack holds while it attends a training: it sits at the server.

    smashed_shape: of what clients will send. image_shape: (3, h, w). compute: as in :class:`AttackerView`.
    """

    def __init__(
        self,
        *,
        smashed_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        compute: Compute,
        visible: frozenset[Capability],
        server: Callable[[Tensor], Tensor] | None = None,
        protect: Callable[[Tensor], Tensor] | None = None,
        auxiliary: AuxiliaryData | None = None,
        build_client: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.smashed_shape = smashed_shape
        self.image_shape = image_shape
        self.compute = compute
        self._visible = visible
        self._server = server if Capability.TRAINING_STREAM in visible else None
        self._protect = protect if protect is not None else _identity
        self._build_client = build_client if Capability.ARCHITECTURE in visible else None
        self._auxiliary = auxiliary if Capability.AUXILIARY_DATA in visible else None

    def has(self, capability: Capability) -> bool:
        """Whether this view holds `capability`."""
        return capability in self._visible

    def server(self, smashed: Tensor) -> Tensor:
        """TRAINING_STREAM: what the server's networks, as they are at this moment of training, make of `smashed`.

        smashed: (n, *smashed_shape). Returns embeddings (n, d), not normalised; the logits of the classes where
        training is supervised. Differentiable in `smashed`; the networks themselves get no gradient.
        """
        _require(self._visible, Capability.TRAINING_STREAM)
        assert self._server is not None
        return self._server(smashed)

    def protect(self, smashed: Tensor) -> Tensor:
        """TRAINING_STREAM: what the defense and the codec would make of `smashed`, with randomness from torch's global
        generator; differentiable. Without the defense for an attacker that is not adaptive.
        """
        _require(self._visible, Capability.TRAINING_STREAM)
        return self._protect(smashed)

    def untrained_client(self) -> nn.Module:
        """ARCHITECTURE: as in :class:`AttackerView`."""
        _require(self._visible, Capability.ARCHITECTURE)
        assert self._build_client is not None
        return self._build_client()

    @property
    def auxiliary(self) -> AuxiliaryData:
        """AUXILIARY_DATA: as in :class:`AttackerView`."""
        _require(self._visible, Capability.AUXILIARY_DATA)
        assert self._auxiliary is not None
        return self._auxiliary


def _require(visible: frozenset[Capability], capability: Capability) -> None:
    if capability not in visible:
        raise ThreatModelError(
            f"this attack reached for {capability}, which it did not declare or was not granted, or which this "
            "system does not have; list it in the attack's `needs` or `optional`"
        )


def _identity(smashed: Tensor) -> Tensor:
    return smashed
