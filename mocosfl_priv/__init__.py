"""mocosfl-priv: how much does a split-learning system leak, and at what price is it defended?

Write an attack or a defense against the contracts exported here; run experiments through :class:`Experiment`.
What is listed in ``__all__`` is the public API: here, and in the three rooms that plugins may import from.

- ``mocosfl_priv``: the contracts, experiments, and what every inversion attack needs.
- ``mocosfl_priv.plugins``: the contracts with all their parts, and the registries that find plugins.
- ``mocosfl_priv.inversion``: networks of an attacker, and how they learn to invert a client.
- ``mocosfl_priv.defending``: what defenses share, such as noise, clipping and simulated attackers.

Everything else is private and may change at any time. Names are imported on first use, so that the device client can
import this package without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment as Experiment
    from mocosfl_priv.api import RunResult as RunResult
    from mocosfl_priv.api import Sweep as Sweep
    from mocosfl_priv.api import SweepResult as SweepResult
    from mocosfl_priv.audits import attack_again as attack_again
    from mocosfl_priv.audits import audit as audit
    from mocosfl_priv.audits import load_model as load_model
    from mocosfl_priv.config import ExperimentConfig as ExperimentConfig
    from mocosfl_priv.config import ModelConfig as ModelConfig
    from mocosfl_priv.config import PluginEntry as PluginEntry
    from mocosfl_priv.config import PluginSpec as PluginSpec
    from mocosfl_priv.config import TrainingConfig as TrainingConfig
    from mocosfl_priv.config import parse_bottleneck as parse_bottleneck
    from mocosfl_priv.errors import ConfigurationError as ConfigurationError
    from mocosfl_priv.errors import MocosflPrivError as MocosflPrivError
    from mocosfl_priv.errors import RunFailedError as RunFailedError
    from mocosfl_priv.errors import ThreatModelError as ThreatModelError
    from mocosfl_priv.evaluation.floor import mean_image as mean_image
    from mocosfl_priv.evaluation.image_metrics import mse as mse
    from mocosfl_priv.evaluation.perceptual import load_lpips as load_lpips
    from mocosfl_priv.inversion import Inverter as Inverter
    from mocosfl_priv.inversion import MessageEncoder as MessageEncoder
    from mocosfl_priv.inversion import Recipe as Recipe
    from mocosfl_priv.inversion import blind_guess as blind_guess
    from mocosfl_priv.inversion import build_decoder as build_decoder
    from mocosfl_priv.inversion import held_out_split as held_out_split
    from mocosfl_priv.inversion import train_inverter as train_inverter
    from mocosfl_priv.models.weights import load_weights as load_weights
    from mocosfl_priv.plugins import ATTACKS as ATTACKS
    from mocosfl_priv.plugins import DEFENSES as DEFENSES
    from mocosfl_priv.plugins import Attack as Attack
    from mocosfl_priv.plugins import AttackerView as AttackerView
    from mocosfl_priv.plugins import AuxiliaryData as AuxiliaryData
    from mocosfl_priv.plugins import Budget as Budget
    from mocosfl_priv.plugins import Capability as Capability
    from mocosfl_priv.plugins import DefenderContext as DefenderContext
    from mocosfl_priv.plugins import Defense as Defense
    from mocosfl_priv.plugins import Detection as Detection
    from mocosfl_priv.plugins import Detector as Detector
    from mocosfl_priv.plugins import ExpertDefense as ExpertDefense
    from mocosfl_priv.plugins import Guarantee as Guarantee
    from mocosfl_priv.plugins import Learner as Learner
    from mocosfl_priv.plugins import Message as Message
    from mocosfl_priv.plugins import MessageKind as MessageKind
    from mocosfl_priv.plugins import PreparedModel as PreparedModel
    from mocosfl_priv.plugins import ServerHooks as ServerHooks
    from mocosfl_priv.plugins import SplitModel as SplitModel
    from mocosfl_priv.plugins import State as State
    from mocosfl_priv.plugins import StreamView as StreamView
    from mocosfl_priv.plugins import ThreatModel as ThreatModel
    from mocosfl_priv.plugins import TrainedExpert as TrainedExpert
    from mocosfl_priv.runtime.seeding import derive_seed as derive_seed
    from mocosfl_priv.runtime.seeding import drawn_generator as drawn_generator
    from mocosfl_priv.runtime.seeding import global_seed as global_seed

_HOMES = {
    "api": (
        "Experiment",
        "RunResult",
        "Sweep",
        "SweepResult",
    ),
    "audits": (
        "attack_again",
        "audit",
        "load_model",
    ),
    "config": (
        "ExperimentConfig",
        "ModelConfig",
        "PluginEntry",
        "PluginSpec",
        "TrainingConfig",
        "parse_bottleneck",
    ),
    "errors": (
        "ConfigurationError",
        "MocosflPrivError",
        "RunFailedError",
        "ThreatModelError",
    ),
    "evaluation.floor": ("mean_image",),
    "evaluation.image_metrics": ("mse",),
    "evaluation.perceptual": ("load_lpips",),
    "inversion": (
        "Inverter",
        "MessageEncoder",
        "Recipe",
        "blind_guess",
        "build_decoder",
        "held_out_split",
        "train_inverter",
    ),
    "models.weights": ("load_weights",),
    "plugins": (
        "ATTACKS",
        "Attack",
        "AttackerView",
        "AuxiliaryData",
        "Budget",
        "Capability",
        "DEFENSES",
        "DefenderContext",
        "Defense",
        "Detection",
        "Detector",
        "ExpertDefense",
        "Guarantee",
        "Learner",
        "Message",
        "MessageKind",
        "PreparedModel",
        "ServerHooks",
        "SplitModel",
        "State",
        "StreamView",
        "ThreatModel",
        "TrainedExpert",
    ),
    "runtime.seeding": (
        "derive_seed",
        "drawn_generator",
        "global_seed",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - derived from the table above
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mocosfl_priv' has no attribute {name!r}")
    return getattr(import_module(f"mocosfl_priv.{_HOME_OF[name]}"), name)
