"""The contracts of attacks and defenses, what each may know, and the registry that finds them."""

from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins.attack import (
    Attack,
)
from mocosfl_priv.plugins.budget import (
    Budget,
)
from mocosfl_priv.plugins.defense import (
    CheckpointScore,
    DefenderContext,
    Defense,
    Detection,
    Detector,
    ExpertDefense,
    PreparedModel,
    TrainedExpert,
    detector_in,
    expert_steps,
    overrides,
)
from mocosfl_priv.plugins.guarantee import (
    Guarantee,
)
from mocosfl_priv.plugins.loaded import (
    Loaded,
)
from mocosfl_priv.plugins.parameters import (
    parameter_descriptions,
    parameter_model,
)
from mocosfl_priv.plugins.registry import (
    ATTACKS,
    DEFENSES,
    Registry,
    summary,
)
from mocosfl_priv.plugins.threat import (
    DESCRIPTIONS,
    Capability,
    ThreatModel,
    with_implied,
)
from mocosfl_priv.plugins.views import (
    ENOUGH_IMAGES,
    AttackerView,
    AuxiliaryData,
    StreamView,
)
from mocosfl_priv.training.hooks import Message, MessageKind, ServerHooks
from mocosfl_priv.training.sampling import PoolShape
from mocosfl_priv.training.state import Learner, State, load_optimiser_state, optimiser_state, under, within

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "DESCRIPTIONS",
    "ENOUGH_IMAGES",
    "Attack",
    "AttackerView",
    "AuxiliaryData",
    "Budget",
    "Capability",
    "CheckpointScore",
    "DefenderContext",
    "Defense",
    "Detection",
    "Detector",
    "ExpertDefense",
    "Guarantee",
    "Learner",
    "Loaded",
    "Message",
    "MessageKind",
    "PoolShape",
    "PreparedModel",
    "Registry",
    "ServerHooks",
    "SplitModel",
    "State",
    "StreamView",
    "ThreatModel",
    "TrainedExpert",
    "detector_in",
    "expert_steps",
    "load_optimiser_state",
    "optimiser_state",
    "overrides",
    "parameter_descriptions",
    "parameter_model",
    "summary",
    "under",
    "with_implied",
    "within",
]
