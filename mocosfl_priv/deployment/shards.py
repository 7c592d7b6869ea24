"""The private images of a configuration's clients as shard files, as the simulation deals them out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mocosfl_priv.data.roles import Role
from mocosfl_priv.deployment.deployment import device_name
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.shard import Shard
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.experiment import client_partition
from mocosfl_priv.sweep.grid import Plan


def write_shards(plan: Plan, folder: Path, clients: Iterable[int] | None = None) -> list[Path]:
    """Write ``client-0000.shard`` and so on for these clients, or all, of the plan's first seed; returns the files."""
    partition = client_partition(plan.laboratory, plan.config.seeds[0])
    images = plan.laboratory.roles[Role.CLIENT_PRIVATE].images
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for client in range(len(partition)) if clients is None else clients:
            if not 0 <= client < len(partition):
                raise ConfigurationError(f"there is no client {client} among {len(partition)}")
            part, name = partition[client], device_name(client)
            files.append(folder / f"{name}.shard")
            Shard(images[part].numpy(), part.numpy().astype(np.int64), f"{plan.config.name} {name}").write(files[-1])
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror}") from error
    except DeviceError as error:
        raise ConfigurationError(str(error)) from error
    return files
