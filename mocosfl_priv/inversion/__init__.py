"""Building blocks shared by attacks: an attacker's networks, and how they learn to invert a client."""

from mocosfl_priv.config.decoder_grammar import (
    check_grammar,
)
from mocosfl_priv.data.augmentation import moco_v2_view
from mocosfl_priv.inversion.arrangement import (
    as_maps,
    channel_axes,
)
from mocosfl_priv.inversion.colour_match import (
    believable,
    sample,
)
from mocosfl_priv.inversion.colour_reflection import (
    JUDGE_STEPS,
)
from mocosfl_priv.inversion.decoder_training import (
    BATCH_FOR_INFERENCE,
    Inverter,
    MessageEncoder,
    Recipe,
    Standardise,
    batch_size_for,
    blind_guess,
    held_out_split,
    in_batches,
    train_inverter,
)
from mocosfl_priv.inversion.decoders import (
    NormName,
    build_decoder,
)
from mocosfl_priv.inversion.discriminator import (
    Labelled,
    Unlabelled,
    build_critic,
)
from mocosfl_priv.inversion.feature_moments import (
    moment_distance,
    moments,
)
from mocosfl_priv.inversion.generator import (
    Generator,
    VariationalAutoencoder,
    load_generator,
)
from mocosfl_priv.inversion.own_decoder import (
    check_architecture,
    check_own_decoder,
)
from mocosfl_priv.inversion.pilot import (
    build_pilot,
)
from mocosfl_priv.inversion.ridge import (
    Ridge,
)
from mocosfl_priv.inversion.skip_network import (
    StackedSkipNetworks,
)
from mocosfl_priv.inversion.surrogate import (
    FitTarget,
    Inversion,
    KnownImages,
    MessageSample,
    MomentFit,
    fit_best,
    fit_moments,
    invert_through,
    moments_agree,
    redrawn,
)
from mocosfl_priv.training.server import info_nce

__all__ = [
    "BATCH_FOR_INFERENCE",
    "JUDGE_STEPS",
    "FitTarget",
    "Generator",
    "Inversion",
    "Inverter",
    "KnownImages",
    "Labelled",
    "MessageEncoder",
    "MessageSample",
    "MomentFit",
    "NormName",
    "Recipe",
    "Ridge",
    "StackedSkipNetworks",
    "Standardise",
    "Unlabelled",
    "VariationalAutoencoder",
    "as_maps",
    "batch_size_for",
    "believable",
    "blind_guess",
    "build_critic",
    "build_decoder",
    "build_pilot",
    "channel_axes",
    "check_architecture",
    "check_grammar",
    "check_own_decoder",
    "fit_best",
    "fit_moments",
    "held_out_split",
    "in_batches",
    "info_nce",
    "invert_through",
    "load_generator",
    "moco_v2_view",
    "moment_distance",
    "moments",
    "moments_agree",
    "redrawn",
    "sample",
    "train_inverter",
]
