"""The same experiment, smaller: what `--scale` makes of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mocosfl_priv.config.documents import with_overrides
from mocosfl_priv.errors import ConfigurationError, did_you_mean

# What `--scale tiny` makes of any configuration: minutes on two cores with the embedded photographs. It keeps what is
# studied (cut layers, fractions, defenses, attacks, partition kind) and shrinks how much of it is done.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "seeds": [0],
        "data.dataset": "photos",
        "data.path": None,
        "data.source": "photos-source",
        "data.source_path": None,
        "data.image_size": 32,
        "data.train_limit": 600,
        "data.test_limit": 200,
        "data.victims": 16,
        "data.auxiliary_target_fraction": 0.2,
        "model.backbone": "resnet8",
        "model.width": 16,
        "model.projector_hidden": 32,
        "model.projector_out": 32,
        "training.clients": 4,
        "training.pool": None,
        "training.micro_batch": None,
        "training.server_batch": 32,
        "training.classes_per_client": 2,
        "training.epochs": 1,
        "training.queue_size": 128,
        "training.sync_period": 4,
        "training.monitor_every": 1,
        "evaluation.bootstrap_samples": 200,
        "evaluation.linear_probe_penalties": [0.1],
        "evaluation.label_fractions": [],
        "evaluation.recognition_epochs": 0,
        "threat.steps": 20,
        "threat.messages_per_victim": 2,
    }
}
# The same for the parameters of defenses, where a configuration writes them out; an attack obeys `threat.steps`.
SCALED_PARAMETERS: dict[str, dict[str, Any]] = {
    "tiny": {"epochs": 1, "batch_size": 32, "decoder": "res_normN0C8", "training_decoder": "conv_normN0C8"}
}


def scaled(document: Mapping[str, Any], scale: str | None) -> dict[str, Any]:
    """`document` at a named scale, as it is for None; ConfigurationError if there is none of that name."""
    if scale is None:
        return dict(document)
    if scale not in SCALES:
        raise ConfigurationError(f"--scale {scale!r}: {did_you_mean(scale, SCALES)}")
    shrunk = with_overrides(document, SCALES[scale], f"--scale {scale}")
    smaller = SCALED_PARAMETERS[scale]
    if isinstance(shrunk.get("defenses"), list):
        shrunk["defenses"] = [
            {**entry, **{name: smaller[name] for name in entry if name in smaller}}
            if isinstance(entry, Mapping)
            else entry
            for entry in shrunk["defenses"]
        ]
    return shrunk
