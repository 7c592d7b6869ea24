"""The contracts of attacks and defenses, what each may know, and the registry that finds them."""

from mocosfl_priv.plugins.attack import (
    Attack,
)
from mocosfl_priv.plugins.budget import (
    Budget,
)
from mocosfl_priv.plugins.defense import (
    DefenderContext,
    Defense,
    Detection,
    PreparedModel,
    TrainedExpert,
)
from mocosfl_priv.plugins.guarantee import (
    Guarantee,
)
from mocosfl_priv.plugins.loaded import (
    Loaded,
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
    "DefenderContext",
    "Defense",
    "Detection",
    "Guarantee",
    "Loaded",
    "PreparedModel",
    "Registry",
    "StreamView",
    "ThreatModel",
    "TrainedExpert",
    "summary",
    "with_implied",
]
