"""What defenses share: noise, decoders to train against, and experts trained at the server."""

from mocosfl_priv.defending.expert import AttackerAware, Checkpoint, decoder_set
from mocosfl_priv.defending.noise import clip_mean_magnitude, clip_rms, gaussian_like, laplace_like
from mocosfl_priv.defending.simulated_attacker import (
    DECODER_DECAY,
    DECODER_MILESTONES,
    Mode,
    Objective,
    SimulatedAttacker,
    check_decoders,
)

__all__ = [
    "DECODER_DECAY",
    "DECODER_MILESTONES",
    "AttackerAware",
    "Checkpoint",
    "Mode",
    "Objective",
    "SimulatedAttacker",
    "check_decoders",
    "clip_mean_magnitude",
    "clip_rms",
    "decoder_set",
    "gaussian_like",
    "laplace_like",
]
