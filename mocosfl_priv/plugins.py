"""The two contracts, Attack and Defense, and the registry that finds their implementations.

A plugin is addressed as
- a built-in by its file name in ``attacks/`` or ``defenses/``: ``decoder``;
- a class that an installed package lists under the entry-point group ``mocosfl_priv.attacks`` or
  ``mocosfl_priv.defenses``, by the entry point's name;
- ``package.module:Class`` or ``path/to/file.py:Class``, or ``path/to/file.py`` where that holds a single one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from mocosfl_priv.compute import Compute
from mocosfl_priv.config import ModelConfig, PluginSpec, TrainingConfig, plain_types
from mocosfl_priv.errors import ConfigurationError, did_you_mean, unknown_name
from mocosfl_priv.guarantee import Guarantee
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.progress import Progress, Silent
from mocosfl_priv.references import import_place
from mocosfl_priv.threat import AttackerView, Budget, Capability, StreamView
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.hooks import ServerHooks
from mocosfl_priv.training.mocosfl import messages_per_draw
from mocosfl_priv.training.sampling import PoolShape


class Attack(ABC):
    """Reconstructs the victims' images from their smashed data.

    Constructor arguments are the attack's parameters in a configuration; annotate them, since values are checked
    against the annotations.

    needs: capabilities without which the attack cannot work; refused before training where they are not granted.
    optional: capabilities it makes use of where they are granted.
    blind: it does not look at the smashed data; a control, not an attack.

    An attack that is granted TRAINING_STREAM attends the training of the system that it attacks. One that is granted
    GRADIENT_CHANNEL changes that training, so it gets one of its own.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()
    blind: ClassVar[bool] = False
    optional: ClassVar[frozenset[Capability]] = frozenset()

    @property
    def parts(self) -> Sequence[Loaded[Attack]]:
        """The attacks that this one may run, where it runs others: their code decides about its results, too."""
        return ()

    def attend(self, stream: StreamView, seed: int) -> ServerHooks | None:
        """Before training, with TRAINING_STREAM: a listener that will get every message; None for no interest.

        :meth:`reconstruct` finds it as ``view.listener``, in the state it had when the attacked checkpoint was taken.
        Its `returned` is called, and heeded, with GRADIENT_CHANNEL only. Torch's global generator is seeded anew for
        every call of it; `state` must hold everything that its calls change.
        """
        return None

    @abstractmethod
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        """The attack: float (n, 3, h, w) in [0, 1] for the n victims of ``view.smashed``.

        Draw steps from ``budget.iterate(planned)``; torch's global generator is seeded with `seed` already.
        """


@dataclass(frozen=True)
class TrainedExpert:
    """A model that a defender has trained before there are clients. Whoever gets it may change it.

    earlier_seconds: what was spent on it before whoever has it now began to measure.
    """

    model: SplitModel
    earlier_seconds: float = 0.0


@dataclass(frozen=True)
class DefenderContext:
    """What a defender has before training starts: public data, its declared share of target data, a model builder.

    target_images, source_images: uint8 (n, 3, h, w); the target images are the configured target fraction.
    build_model: a freshly initialised split model of the experiment (after the defense's own `architecture`).
    training: the experiment's training settings. training_steps: how many steps it will take.
    checkpoints: where pre-training may keep its state, to go on from it after an interruption; None for nowhere.
    most_draws: counts how often training draws the private image that it draws most; once per epoch if None.
    expert: what :meth:`Defense.train_expert` made of the same context before; None if `prepare` is to train it.
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

    @property
    def training_passes(self) -> int:
        """How often the hooks of a pass are called in training; about, where clients' batches are unequal."""
        views = PoolShape.of(self.training).images * (2 if self.training.symmetric else 1)
        return self.training_steps * -(-views // self.compute.rows_per_pass)

    @property
    def messages_per_image(self) -> int:
        """The most messages that a private image gives rise to in training, of clients that learn; counted anew."""
        draws = self.training.epochs if self.most_draws is None else self.most_draws()
        return draws * messages_per_draw(self.training, frozen_client=False)


@dataclass(frozen=True)
class PreparedModel:
    """What a defense hands to training: a model to start from.

    frozen_client: clients keep it as it is; only the server learns.
    learning_rate, client_learning_rate: replace those of the configuration where given.
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

    clients_judging: those that gathered enough to judge; without any nothing is detected. clients_alarmed: how many of
    them raised an alarm at some time; the run alarms when more than half did. first_alarm_step: when that was so, None
    for never. score: the detector's own, averaged over the judging clients; NaN without any.
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


class Defense(ABC):  # noqa: B024 - every hook has a default; a defense overrides those it uses
    """Protects smashed data. Override the hooks that the defense uses; each default does nothing.

    Constructor arguments are the defense's parameters in a configuration, checked against their annotations. Every
    system that is trained has a copy of its own, on which `prepare` is called before any other hook.

    randomised: the same image is not always sent as the same smashed data.
    uses_target_data: pre-trains on a share of the target data, so it is run once per target fraction.
    detects: judges the server by the gradients that come in; refused where clients are frozen and none does.
    """

    randomised: bool = False
    uses_target_data: bool = False
    detects: bool = False

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

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        """Before training: a pre-trained model to start from, or None to start afresh."""
        return None

    def restore(self, context: DefenderContext) -> PreparedModel | None:
        """Before :meth:`load_state`, where a trained system comes back from disk: what :meth:`prepare` sets.

        The model is one of the same architecture, whose weights are replaced. Override it where `prepare` takes long.
        """
        return self.prepare(context)

    def planned_steps(self, context: DefenderContext) -> int:
        """How many steps :meth:`prepare` will report, for the progress display."""
        return 0

    def expert_document(self, context: DefenderContext) -> dict[str, Any] | None:
        """What decides about the expert that `prepare` trains, as JSON; None if it trains none.

        A sweep trains one expert for all systems whose documents are equal, so name everything that
        :meth:`train_expert` reads of this defense and of ``context.training``, and nothing that only comes after. The
        plugin's code, the defender's images, the model, its seed, and the machine are known without it.
        """
        return None

    def train_expert(self, context: DefenderContext) -> TrainedExpert:
        """The expert alone: `prepare` takes ``context.expert``, or calls this. Only for who has a document."""
        raise NotImplementedError

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """A scalar, averaged over the batch, added to the clients' loss.

        images: float (n, 3, h, w) in [0, 1]; smashed: (n, *smashed_shape) with gradient.
        """
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        """The smashed data (n, *smashed_shape) on its way out: same shape, image by image, differentiable.

        Draw randomness from `rng` only. The same function defends training, inference and the attacker's queries.
        """
        return smashed

    def disguise(self, keys: Tensor, owners: Tensor, step: int, rng: torch.Generator) -> Tensor:
        """The keys (n, *smashed_shape) that really go out beside the queries of the same rows; same shape.

        For detectors, which watch how the server takes false ones. owners: int64 (n,) on the CPU, the clients of the
        rows, who know their own keys only. Called after :meth:`protect`, in training only, and only where a gradient
        will come in; the next :meth:`filter_gradient` gets the one for these rows.
        """
        return keys

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """The server's gradient (n, *smashed_shape) on its way in; same shape."""
        return gradient

    def detection(self) -> Detection | None:
        """After training, of a defense that detects: what it found, over the whole of the training."""
        return None

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
        """Go on where :meth:`state` was taken; a resumed training must continue exactly."""


PluginT = TypeVar("PluginT", Attack, Defense)


@dataclass(frozen=True)
class Loaded(Generic[PluginT]):
    """A created plugin, its label in reports, and where its code, that of its parts included, came from."""

    label: str
    plugin: PluginT
    origin: str
    code_sha256: str
    parameters: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[PluginT]):
    """Finds, checks and creates the plugins of one kind."""

    def __init__(self, kind: str, base: type[PluginT], package: str) -> None:
        self.kind = kind
        self.base: type[PluginT] = base
        self.package = package
        self.group = f"mocosfl_priv.{package}"

    def origins(self) -> dict[str, str]:
        """Every known name and where it comes from, without importing anything.

        Raises ConfigurationError where two sources claim one name.
        """
        found: dict[str, str] = {}
        spec = importlib.util.find_spec(self.package)
        for module in pkgutil.iter_modules(spec.submodule_search_locations if spec else None):
            if not module.name.startswith("_"):
                found[module.name] = f"{self.package}.{module.name}"
        for entry in entry_points(group=self.group):
            if entry.name in found and found[entry.name] != entry.value:
                raise ConfigurationError(
                    f"two {self.package} are called {entry.name!r}: {found[entry.name]} and {entry.value}"
                )
            found[entry.name] = entry.value
        return dict(sorted(found.items()))

    def load(self, reference: str) -> type[PluginT]:
        """The class behind a name, ``module:Class``, ``file.py:Class`` or ``file.py``; raises ConfigurationError."""
        if ":" in reference:
            place, class_name = reference.rsplit(":", 1)
            return self._class_in(import_place(place, reference), class_name, reference)
        if reference.endswith(".py"):
            return self._only_class_in(import_place(reference, reference), reference)
        origins = self.origins()
        if reference not in origins:
            raise unknown_name(self.kind, reference, origins)
        origin = origins[reference]
        if ":" in origin:
            return self.load(origin)
        return self._only_class_in(import_place(origin, reference), origin)

    def create(self, spec: PluginSpec) -> Loaded[PluginT]:
        """Load the class of `spec`, check its parameters against the constructor's annotations, and create it."""
        cls = self.load(spec.name)
        try:
            plugin = cls(**_checked_parameters(cls, spec.parameters, f"{self.kind} {spec.short_name!r}"))
        except ValueError as error:
            raise ConfigurationError(f"{self.kind} {spec.short_name!r}: {error}") from error
        own = cls.__mro__[: cls.__mro__.index(self.base)]
        code = [Path(inspect.getfile(ancestor)).read_bytes() for ancestor in own]
        origins = [f"{cls.__module__}:{cls.__qualname__}"]
        code += [Path(file).read_bytes() for file in vars(plugin).values() if isinstance(file, Path) and file.is_file()]
        code += [part.code_sha256.encode() for part in plugin.parts]
        if isinstance(plugin, Defense) and plugin.parts:
            origins = [part.origin for part in plugin.parts]
        return Loaded(
            label=spec.label or spec.short_name,
            plugin=plugin,
            origin="+".join(origins),
            code_sha256=hashlib.sha256(b"".join(code)).hexdigest(),
            parameters=spec.parameters,
        )

    def _class_in(self, module: Any, name: str, reference: str) -> type[PluginT]:
        candidate = getattr(module, name, None)
        if candidate is None:
            known = [n for n, value in vars(module).items() if self._is_implementation(value)]
            raise ConfigurationError(f"{reference}: there is no class {name!r}; {did_you_mean(name, known)}")
        if not self._is_implementation(candidate):
            raise ConfigurationError(f"{reference}: {name} is not a {self.base.__name__}")
        implementation: type[PluginT] = candidate
        return implementation

    def _only_class_in(self, module: Any, where: str) -> type[PluginT]:
        own = [
            value
            for value in vars(module).values()
            if self._is_implementation(value)
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        if len(own) != 1:
            names = f" ({', '.join(cls.__name__ for cls in own)}); name one as {where}:{own[0].__name__}" if own else ""
            raise ConfigurationError(f"{where} must define exactly one {self.base.__name__}, found {len(own)}{names}")
        implementation: type[PluginT] = own[0]
        return implementation

    def _is_implementation(self, value: object) -> bool:
        return isinstance(value, type) and issubclass(value, self.base) and value is not self.base


ATTACKS: Registry[Attack] = Registry("attack", Attack, "attacks")  # type: ignore[type-abstract]
DEFENSES: Registry[Defense] = Registry("defense", Defense, "defenses")


def summary(cls: type) -> str:
    """The first line of a plugin's docstring."""
    return (inspect.getdoc(cls) or "").split("\n", 1)[0]


def _checked_parameters(cls: type, given: dict[str, Any], who: str) -> dict[str, Any]:
    """`given` converted and checked by the constructor's annotations; ConfigurationError names the parameter."""
    signature = inspect.signature(cls)
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except (NameError, TypeError) as error:
        raise ConfigurationError(f"{who}: the constructor's annotations cannot be read: {error}") from error
    fields: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ConfigurationError(f"{who}: unknown parameter {unknown[0]!r}; {did_you_mean(unknown[0], fields)}")
    for name, value in given.items():
        wanted = plain_types(fields[name][0])
        if isinstance(value, bool) and wanted & {int, float} and bool not in wanted:
            raise ConfigurationError(f"{who}: {name}: {str(value).lower()} is no number")
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    checker = create_model(cls.__name__, __config__=config, **fields)
    try:
        checked = checker(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']} (got {problem.get('input')!r})"
            for problem in error.errors()
        )
        raise ConfigurationError(f"{who}: {problems}") from error
    return {name: getattr(checked, name) for name in given}
