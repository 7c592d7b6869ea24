"""mocosfl-priv: how much does a split-learning system leak, and at what price is it defended?

Write an attack or a defense against the contracts exported here; run experiments through :class:`Experiment`.
Names are imported on first use, so that the device client can import this package without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment as Experiment
    from mocosfl_priv.api import RunResult as RunResult
    from mocosfl_priv.api import Sweep as Sweep
    from mocosfl_priv.api import SweepResult as SweepResult
    from mocosfl_priv.config import ExperimentConfig as ExperimentConfig
    from mocosfl_priv.config import ModelConfig as ModelConfig
    from mocosfl_priv.config import TrainingConfig as TrainingConfig
    from mocosfl_priv.errors import ConfigurationError as ConfigurationError
    from mocosfl_priv.errors import MocosflPrivError as MocosflPrivError
    from mocosfl_priv.errors import RunFailedError as RunFailedError
    from mocosfl_priv.errors import ThreatModelError as ThreatModelError
    from mocosfl_priv.plugins import Attack as Attack
    from mocosfl_priv.plugins import AttackerView as AttackerView
    from mocosfl_priv.plugins import AuxiliaryData as AuxiliaryData
    from mocosfl_priv.plugins import Budget as Budget
    from mocosfl_priv.plugins import Capability as Capability
    from mocosfl_priv.plugins import DefenderContext as DefenderContext
    from mocosfl_priv.plugins import Defense as Defense
    from mocosfl_priv.plugins import Detection as Detection
    from mocosfl_priv.plugins import Guarantee as Guarantee
    from mocosfl_priv.plugins import PreparedModel as PreparedModel
    from mocosfl_priv.plugins import StreamView as StreamView
    from mocosfl_priv.plugins import ThreatModel as ThreatModel
    from mocosfl_priv.plugins import TrainedExpert as TrainedExpert
    from mocosfl_priv.training.hooks import Message as Message

_HOMES = {
    "api": ("Experiment", "RunResult", "Sweep", "SweepResult"),
    "config": ("ExperimentConfig", "ModelConfig", "TrainingConfig"),
    "errors": ("ConfigurationError", "MocosflPrivError", "RunFailedError", "ThreatModelError"),
    "plugins": (
        "Attack",
        "AttackerView",
        "AuxiliaryData",
        "Budget",
        "Capability",
        "DefenderContext",
        "Defense",
        "Detection",
        "Guarantee",
        "PreparedModel",
        "StreamView",
        "ThreatModel",
        "TrainedExpert",
    ),
    "training.hooks": ("Message",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - derived from the table above
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mocosfl_priv' has no attribute {name!r}")
    return getattr(import_module(f"mocosfl_priv.{_HOME_OF[name]}"), name)
