"""The private images of simulated clients as files for devices."""

from __future__ import annotations

from pathlib import Path

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.shard import Shard
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.training.sampling import seeded_partition


def write_shards(
    private: ImageSet, training: TrainingConfig, seed: int, folder: Path, client: int | None = None
) -> list[tuple[Path, int]]:
    """Write every client's images, or one client's, to `folder`; returns the files and how many images each holds.

    private: the images of the role client_private. The partition is that of a simulated training with `seed`, in its
    order, and an image's id is its index among the private ones: what the server's sampler calls it.
    Raises ConfigurationError for a client that does not exist, RunFailedError where a file cannot be written.
    """
    partition = seeded_partition(private.labels, training, seed)
    if client is not None and not 0 <= client < len(partition):
        raise ConfigurationError(f"client {client} does not exist: there are {len(partition)}, counted from 0")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(partition)) if client is None else [client]:
            mine = partition[number]
            path = folder / shard_name(number)
            Shard(private.images[mine].numpy(), mine.numpy(), f"{private.name}, client {number}").write(path)
            written.append((path, len(mine)))
    except (OSError, DeviceError) as error:
        raise RunFailedError(f"shards cannot be written to {folder}: {error}") from error
    return written


def shard_name(client: int) -> str:
    """The file name of a client's shard."""
    return f"client-{client:04}.shard"
