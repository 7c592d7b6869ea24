"""The contract of an attack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mocosfl_priv.plugins.budget import Budget
from mocosfl_priv.plugins.loaded import Loaded
from mocosfl_priv.plugins.threat import Capability
from mocosfl_priv.plugins.views import AttackerView, StreamView
from mocosfl_priv.training.hooks import ServerHooks


class Attack(ABC):
    """Reconstructs the victims' images from their smashed data.

    Constructor arguments are the attack's parameters in a configuration; annotate them, since values are checked
    against the annotations.

    needs: capabilities without which the attack cannot work; refused before training where they are not granted.
    optional: capabilities it makes use of where they are granted.
    blind: it does not look at the smashed data; a control, not an attack.
    searches_by_gradient: it searches for every victim's image by gradients through the client, instead of learning to
        invert messages from images of its own. A defense may mask such gradients, which protects from nobody else.

    An attack that is granted TRAINING_STREAM attends the training of the system that it attacks. One that is granted
    GRADIENT_CHANNEL changes that training, so it gets one of its own.

    `mocosfl_priv.plugins.attack_checks` has the contract of this class as checks for a test of your own.

    >>> class Grey(Attack):
    ...     blind = True
    ...
    ...     def reconstruct(self, view, budget, seed):
    ...         return view.smashed.new_full((len(view.smashed), *view.image_shape), 0.5)
    >>> sorted(Grey.needs)
    []
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()
    blind: ClassVar[bool] = False
    searches_by_gradient: ClassVar[bool] = False
    optional: ClassVar[frozenset[Capability]] = frozenset()

    @property
    def parts(self) -> Sequence[Loaded[Attack]]:
        """The attacks that this one may run, where it runs others: their code decides about its results, too."""
        return ()

    def check(self, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:  # noqa: B027 - most take any
        """Refuse, before anything is trained, what cannot work on smashed data of this shape.

        Args:
            smashed_shape: of one message.
            image_shape: (3, h, w).

        Raises:
            ConfigurationError: it cannot, with the reason.
        """

    def attend(self, stream: StreamView, seed: int) -> ServerHooks | None:
        """Attend a training, with TRAINING_STREAM: called before its first step.

        Torch's global generator is seeded anew for every call of the listener. Its `state` must hold everything that
        its calls change. Its `returned` is called, and heeded, with GRADIENT_CHANNEL only.

        Args:
            stream: what the attack holds while it attends.
            seed: of the attack.

        Returns:
            A listener that gets every message; None for no interest. :meth:`reconstruct` finds it as ``view.listener``,
            in the state that it had when the attacked checkpoint was taken.
        """
        return None

    @abstractmethod
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        """The attack itself.

        Args:
            view: the victims' messages, and what else was granted.
            budget: draw steps from ``budget.iterate(planned)``, and end with them.
            seed: make every random choice from it; torch's global generator is seeded with it already.

        Returns:
            Float (n, 3, h, w) in [0, 1], for the n victims of ``view.smashed``.

        Raises:
            ThreatModelError: by the view, where the attack reaches for what it was not granted. It ends the run.
            Exception: any other one makes this attempt a row that failed, with the cause.
        """
