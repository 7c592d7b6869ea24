"""The contract of a defense, and what it has before training starts."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.plugins.loaded import Loaded
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Progress, Silent
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.hooks import MessageKind
from mocosfl_priv.training.message_count import messages_per_draw, rows_per_image
from mocosfl_priv.training.sampling import PoolShape


@dataclass(frozen=True)
class TrainedExpert:
    """A model that a defender has trained before there are clients. Whoever gets it may change it.

    Args:
        model: the whole split model.
        earlier_seconds: what was spent on it before whoever has it now began to measure.
        selected_step: number of training steps after which it was what it is; None where it is the last state.
    """

    model: SplitModel
    earlier_seconds: float = 0.0
    selected_step: int | None = None


@dataclass(frozen=True)
class CheckpointScore:
    """How good a model is, for a defender that chooses among the checkpoints of its pre-training.

    Args:
        of: scores a split model, higher is better: its weighted kNN accuracy, in [0, 1]. It does not change the model.
        document: everything that decides about the score besides the model, as JSON.
    """

    of: Callable[[SplitModel], float]
    document: dict[str, Any]


@dataclass(frozen=True)
class DefenderContext:
    """What a defender has before training starts: public data, its declared share of target data, a model builder.

    Args:
        target_images: uint8 (n, 3, h, w), the configured target fraction.
        source_images: uint8 (n, 3, h, w), public.
        build_model: makes a freshly initialised split model of the experiment (after the defense's own `architecture`).
        training: the experiment's training settings.
        compute: device and precision.
        seed: of the defender's random choices.
        progress: shows the steps of a pre-training.
        checkpoints: where pre-training may keep its state, to go on from it after an interruption; None for nowhere.
        training_steps: how many steps training will take.
        most_draws: counts how often training draws the private image that it draws most; once per epoch if None.
        expert: what :meth:`ExpertDefense.train_expert` made of the same context before; None if `prepare` is to
            train it.
        checkpoint_score: scores checkpoints on the labelled images that ``training.select_on`` names. These are more
            than a server has. None if there are no labels.
    """

    target_images: Tensor
    source_images: Tensor
    build_model: Callable[[], SplitModel]
    training: TrainingConfig
    compute: Compute
    seed: int
    progress: Progress = field(default_factory=Silent)
    checkpoints: Checkpoints | None = None
    training_steps: int = 1
    most_draws: Callable[[], int] | None = None
    expert: TrainedExpert | None = None
    checkpoint_score: CheckpointScore | None = None

    @property
    def training_passes(self) -> int:
        """How often the hooks of a pass are called in training; about, where clients' batches are unequal."""
        views = PoolShape.of(self.training).images * (2 if self.training.symmetric else 1)
        return self.training_steps * -(-views // self.compute.rows_per_pass)

    @property
    def fewest_rows(self) -> int:
        """The fewest queries that a client sends in a step, of clients that learn; its own loss has no more rows."""
        shape = PoolShape.of(self.training)
        images = min(shape.size_of(0), shape.size_of(self.training.clients - 1))  # clients with more memory come first
        return images * rows_per_image(self.training, frozen_client=False)

    @property
    def queries_per_step(self) -> int:
        """How many queries all clients send in a step, of clients that learn; averaged over pools and rounded."""
        return PoolShape.of(self.training).images * rows_per_image(self.training, frozen_client=False)

    @property
    def messages_per_image(self) -> int:
        """The most messages that a private image gives rise to in training, of clients that learn; counted anew."""
        draws = self.training.epochs if self.most_draws is None else self.most_draws()
        return draws * messages_per_draw(self.training, frozen_client=False)


@dataclass(frozen=True)
class PreparedModel:
    """What a defense hands to training: a model to start from.

    Args:
        model: the whole split model.
        frozen_client: clients keep it as it is; only the server learns.
        learning_rate: of the server; replaces that of the configuration where given.
        client_learning_rate: of the clients, likewise.
        earlier_seconds: what pre-training took before it was interrupted and resumed.
    """

    model: SplitModel
    frozen_client: bool = False
    learning_rate: float | None = None
    client_learning_rate: float | None = None
    earlier_seconds: float = 0.0


@dataclass(frozen=True)
class Detection:
    """What the clients of one training found out about their server.

    Args:
        fakes_judged: false messages that were judged, over all clients.
        clients_judging: those that gathered enough to judge; without any nothing is detected.
        clients_alarmed: how many of them raised an alarm at some time; the run alarms when more than half did.
        first_alarm_step: when that was so; None for never.
        score: the detector's own, averaged over the judging clients; NaN without any.

    >>> Detection(fakes_judged=9, clients_judging=4, clients_alarmed=3).alarm
    True
    """

    fakes_judged: int
    clients_judging: int
    clients_alarmed: int
    first_alarm_step: int | None = None
    score: float = math.nan

    @property
    def alarm(self) -> bool:
        """Of the run as a whole."""
        return 2 * self.clients_alarmed > self.clients_judging


HOOKS_OF_KINDS = {
    "planned_steps": "ExpertDefense",
    "expert_document": "ExpertDefense",
    "train_expert": "ExpertDefense",
    "replace_keys": "Detector",
    "detection": "Detector",
    "detects": "Detector",
}


class Defense(ABC):  # noqa: B024 - every hook has a default; a defense overrides those it uses
    """Protects smashed data. Override the hooks that the defense uses; each default does nothing.

    Constructor arguments are the defense's parameters in a configuration, checked against their annotations. Every
    system that is trained has a copy of its own, on which `prepare` is called before any other hook.

    randomised: the same image is not always sent as the same smashed data.
    uses_target_data: pre-trains on a share of the target data, so it is run once per target fraction.

    A defense that trains a model at the server before there are clients is an :class:`ExpertDefense`; one that judges
    the server is a :class:`Detector`. `mocosfl_priv.plugins.defense_checks` has the contract as checks for a test of
    your own.

    >>> class Halves(Defense):
    ...     def protect(self, smashed, rng, kind=MessageKind.INFERENCE):
    ...         return smashed / 2
    >>> Halves().protect(torch.ones(1, 2), torch.Generator())
    tensor([[0.5000, 0.5000]])
    """

    randomised: bool = False
    uses_target_data: bool = False

    def __init_subclass__(cls) -> None:
        """Refuse hooks under a former name or with a former signature, and those of another kind of defense."""
        super().__init_subclass__()
        if "disguise" in vars(cls):
            raise ConfigurationError(f"{cls.__name__}.disguise: this hook is now called replace_keys")
        if "protect" in vars(cls) and not _takes_three(vars(cls)["protect"]):
            raise ConfigurationError(
                f"{cls.__name__}.protect is called with smashed, rng and kind: write "
                "def protect(self, smashed, rng, kind=MessageKind.INFERENCE), from mocosfl_priv import MessageKind"
            )
        for hook, kind in HOOKS_OF_KINDS.items():
            if hook in vars(cls) and not cls.hands_hooks_on and kind not in {base.__name__ for base in cls.__mro__}:
                raise ConfigurationError(
                    f"{cls.__name__}.{hook}: only a defense that extends mocosfl_priv.{kind} has this"
                )

    hands_hooks_on: ClassVar[bool] = False  # to its parts, of whatever kind they are

    @property
    def parts(self) -> Sequence[Loaded[Defense]]:
        """The defenses that this one consists of, where it consists of others."""
        return ()

    @property
    def freezes_clients(self) -> bool:
        """Whether clients keep the model of :meth:`prepare`: what works on their learning is then without effect."""
        return False

    @property
    def simulator(self) -> str | None:
        """The decoder, in the decoder grammar, that a defense was trained against; adaptive attackers know it."""
        return None

    def architecture(self, model: ModelConfig) -> ModelConfig:
        """The model that this defense trains, from the configured one; for example with a bottleneck."""
        return model

    def check(self, context: DefenderContext) -> None:  # noqa: B027 - most defenses can be prepared with anything
        """Refuse, before anything is trained, what cannot be prepared. Raises ConfigurationError with the reason."""

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        """Before training: a pre-trained model to start from, or None to start afresh."""
        return None

    def restore(self, context: DefenderContext) -> PreparedModel | None:
        """Before :meth:`load_state`, where a trained system comes back from disk: what :meth:`prepare` sets.

        The model is one of the same architecture, whose weights are replaced. Override it where `prepare` takes long.
        """
        return self.prepare(context)

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """A term of one client's loss, from what this client has in a step: called for each client by itself.

        Args:
            images: float (n, 3, h, w) in [0, 1], the views that the client sends as queries. With a symmetric loss
                these are both views of each image, the first ones of all images before the second ones.
            smashed: (n, *smashed_shape) with gradient, before :meth:`protect`.

        Returns:
            A scalar, averaged over the rows; None for no term. Clients are weighted by their rows.
        """
        return None

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """A term of the clients' loss from the rows of all clients: called once per pass, before :meth:`client_loss`.

        No real client can compute it, since it has no images but its own. It is for a simulation in which all clients
        share one model, such as a simulated attacker, as if theirs were averaged in every step; say so in the docs of
        the defense. A defense that overrides it does not run on devices.

        Args:
            images: float (n, 3, h, w) in [0, 1], grouped by client.
            smashed: (n, *smashed_shape) with gradient, before :meth:`protect`.

        Returns:
            A scalar, averaged over the rows; None for no term.
        """
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        """The smashed data on its way out. The same function defends training, inference and the attacker's queries.

        It leaves :meth:`state` as it is. It may remember something of a QUERY for the next :meth:`filter_gradient` or
        :meth:`joint_loss`, and nothing of other messages.

        Args:
            smashed: float (n, *smashed_shape); it is not changed.
            rng: draw all randomness from it; on the device of `smashed`.
            kind: what the messages are for.

        Returns:
            The same shape and dtype, image by image, differentiable in `smashed`.
        """
        return smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """The server's gradient on its way in.

        Args:
            gradient: float (n, *smashed_shape), for the messages of the last QUERY.
            rng: draw all randomness from it.

        Returns:
            The same shape.
        """
        return gradient

    def guarantee(self, messages: int) -> Guarantee | None:
        """What holds for any attacker that saw `messages` messages of each image; None if nothing is promised.

        Reports set it beside what was measured, and a measurement below it is an error.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors that change while training goes on (a simulator's weights, its optimiser), for checkpoints; where
        training keeps an earlier state of the model, this comes back with it.
        """
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most defenses have no state
        """Restore what :meth:`state` returned; a resumed training must continue exactly."""


class ExpertDefense(Defense):
    """A defense that trains an expert at the server before there are clients, and hands out its client side."""

    def planned_steps(self, context: DefenderContext) -> int:
        """How many steps :meth:`train_expert` will report, for the progress display."""
        return 0

    def expert_document(self, context: DefenderContext) -> dict[str, Any] | None:
        """What decides about the expert that `prepare` trains, as JSON; None if it trains none.

        A sweep trains one expert for all systems whose documents are equal, so name everything that
        :meth:`train_expert` reads of this defense and of ``context.training``, and nothing that only comes after. The
        plugin's code, the defender's images, the model, its seed, and the machine are known without it.
        """
        return None

    def train_expert(self, context: DefenderContext) -> TrainedExpert:
        """The expert alone: `prepare` takes ``context.expert``, or calls this. Only called where there is a document.

        Raises RunFailedError where the pre-training fails.
        """
        raise NotImplementedError


class Detector(Defense):
    """A defense by which clients judge their server, by the gradients that come in for false messages.

    It records and does not intervene. It is refused where clients are frozen, since no gradient comes in there.
    """

    def replace_keys(self, keys: Tensor, client_ids: Tensor, step: int, rng: torch.Generator) -> Tensor:
        """The keys that really go out beside the queries of the same rows.

        Called after :meth:`protect`, in training only, and only where a gradient will come in; the next
        :meth:`filter_gradient` gets the one for these rows.

        Args:
            keys: float (n, *smashed_shape).
            client_ids: int64 (n,) on the CPU, the clients of the rows, who know their own keys only.
            step: of training, from 0.
            rng: draw all randomness from it.

        Returns:
            The same shape.
        """
        return keys

    @abstractmethod
    def detection(self) -> Detection:
        """After training: what was found, over the whole of the training."""


def detector_in(defense: Defense) -> Detector | None:
    """`defense`, or the first of its parts, that judges the server; None if none does.

    Args:
        defense: any.

    Returns:
        The detector.

    >>> detector_in(Defense()) is None
    True
    """
    if isinstance(defense, Detector):
        return defense
    return next((found for part in defense.parts if (found := detector_in(part.plugin)) is not None), None)


def overrides(defense: Defense, hook: str) -> bool:
    """Whether the class of a defense has a hook of its own instead of the default.

    Args:
        defense: any.
        hook: name of a method, for example ``protect``.

    Returns:
        False for the default, and for a hook that only other kinds of defenses have.

    >>> overrides(Defense(), "protect")
    False
    """
    return getattr(type(defense), hook, None) is not getattr(Defense, hook, None)


def expert_steps(defense: Defense, context: DefenderContext) -> int:
    """How many steps the pre-training of `defense` and of its parts will report.

    Args:
        defense: any.
        context: of the defense.

    Returns:
        Steps; 0 if it trains no expert.

    >>> expert_steps(Defense(), context=None)
    0
    """
    own = defense.planned_steps(context) if isinstance(defense, ExpertDefense) else 0
    return own + sum(expert_steps(part.plugin, context) for part in defense.parts)


def _takes_three(protect: Any) -> bool:
    """Whether a method can be called with smashed data, a generator and a kind."""
    try:
        inspect.signature(protect).bind(None, None, None, None)
    except TypeError:
        return False
    return True
