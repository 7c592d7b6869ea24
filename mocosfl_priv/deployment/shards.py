"""Write the private images of each client to a shard file for its device."""

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
    """Write the images of every client, or of one, to `folder`; returns the files and their numbers of images.

    Images are partitioned as in a simulated training with `seed`, in the same order. The id of an image is its index in
    `private`, as in the server's sampler.

    Args:
        private: The images of the role client_private.
        training: Settings of the partition.
        seed: Seed of the training.
        folder: Where to write; made if needed.
        client: Write the shard of this client only.

    Raises:
        ConfigurationError: `client` does not exist.
        RunFailedError: A file cannot be written.

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
    """Return the file name of a client's shard."""
    return f"client-{client:04}.shard"
