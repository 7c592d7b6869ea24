"""Threat models: what an attacker may have, and what an experiment grants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from mocosfl_priv.errors import ThreatModelError, unknown_name


class Capability(StrEnum):
    """What an attacker may have beyond the victims' smashed data; `DESCRIPTIONS` says what each one is.

    >>> DESCRIPTIONS[Capability.QUERY]
    'may send images of its own through the client and its defense'
    """

    CLIENT_WEIGHTS = "client_weights"
    QUERY = "query"
    ARCHITECTURE = "architecture"
    AUXILIARY_DATA = "auxiliary_data"
    SERVER_MODEL = "server_model"
    COLLUDING_CLIENT = "colluding_client"
    GRADIENT_CHANNEL = "gradient_channel"
    TRAINING_STREAM = "training_stream"


DESCRIPTIONS = {
    Capability.CLIENT_WEIGHTS: "white box: the client model itself, with gradients through it",
    Capability.QUERY: "may send images of its own through the client and its defense",
    Capability.ARCHITECTURE: "knows the client's layers, not their weights",
    Capability.AUXILIARY_DATA: "has public images, and a declared share of the target distribution",
    Capability.SERVER_MODEL: "is the server: holds its own trunk and projector as training left them",
    Capability.COLLUDING_CLIENT: "another participant's own copy of the client model, as before the last averaging",
    Capability.GRADIENT_CHANNEL: "malicious server: chooses the gradients that clients receive",
    Capability.TRAINING_STREAM: "sees every message of training, not one snapshot",
}


def with_implied(capabilities: Iterable[Capability]) -> frozenset[Capability]:
    """Capabilities with those that they imply.

    A client's weights allow queries and show its architecture, as every participant has both. A server that chooses the
    gradients also sees the messages.

    Args:
        capabilities: any.

    Returns:
        These and the implied ones.

    >>> sorted(with_implied({Capability.CLIENT_WEIGHTS}))
    [<Capability.ARCHITECTURE: 'architecture'>, <Capability.CLIENT_WEIGHTS: 'client_weights'>, <Capability.QUERY:
    'query'>]
    """
    closed = frozenset(capabilities)
    if Capability.CLIENT_WEIGHTS in closed:
        closed |= {Capability.QUERY, Capability.ARCHITECTURE}
    if Capability.COLLUDING_CLIENT in closed:
        closed |= {Capability.ARCHITECTURE}
    if Capability.GRADIENT_CHANNEL in closed:
        closed |= {Capability.TRAINING_STREAM}
    return closed


@dataclass(frozen=True)
class ThreatModel:
    """The capabilities that an experiment grants, with what they imply.

    Args:
        grants: the capabilities.
        adaptive: whether the attacker knows the defense (Kerckhoffs's principle) and may train through it.

    >>> ThreatModel.of(["query"]).adaptive
    True
    """

    grants: frozenset[Capability]
    adaptive: bool = True

    def without(self, absent: Iterable[Capability]) -> ThreatModel:
        """The same threat model on a system that does not have what `absent` names.

        Args:
            absent: capabilities.

        Returns:
            A threat model without them.

        >>> sorted(ThreatModel.of(["client_weights"]).without([Capability.QUERY]).grants)
        [<Capability.ARCHITECTURE: 'architecture'>, <Capability.CLIENT_WEIGHTS: 'client_weights'>]
        """
        return ThreatModel(self.grants - frozenset(absent), self.adaptive)

    @classmethod
    def of(cls, names: Iterable[str], adaptive: bool = True) -> ThreatModel:
        """From capability names; raises ConfigurationError for unknown ones."""
        grants: set[Capability] = set()
        for name in names:
            try:
                grants.add(Capability(name))
            except ValueError:
                raise unknown_name("capability in threat.grants", name, [c.value for c in Capability]) from None
        return cls(with_implied(grants), adaptive)

    def require(self, needs: frozenset[Capability], who: str) -> None:
        """Raise ThreatModelError unless all of `needs` are granted."""
        missing = sorted(needs - self.grants)
        if missing:
            raise ThreatModelError(
                f"attack {who!r} needs {', '.join(missing)}, which this threat model does not grant "
                f"(threat.grants: {', '.join(sorted(self.grants)) or 'nothing'})"
            )
