from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mocosfl_priv import cli
from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.deployment.shards import shard_name, write_shards
from mocosfl_priv.device.shard import Shard
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.training.sampling import PooledClients, PoolShape, seeded_partition


def private(images: int = 60) -> ImageSet:
    pixels = torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet.ungrouped("made/train", pixels, torch.arange(images) % 5, tuple("abcde"))


@pytest.mark.parametrize("partition", ["iid", "classes_per_client", "dirichlet"])
def test_a_real_client_holds_what_the_simulated_one_draws_from(partition: str, tmp_path: Path) -> None:
    images = private()
    training = TrainingConfig.model_validate({"clients": 6, "partition": partition, "server_batch": 12})
    written = write_shards(images, training, 3, tmp_path)
    assert [path.name for path, _ in written] == [shard_name(client) for client in range(6)]
    shards = [Shard.read(path) for path, _ in written]
    assert sorted(int(i) for shard in shards for i in shard.ids) == list(range(60))
    indices = torch.arange(60)
    draws = PooledClients(
        indices, seeded_partition(images.labels, training, 3), PoolShape.of(training), torch.Generator().manual_seed(0)
    )
    for _ in range(5):
        batch = draws.next()
        owners = batch.pool.repeat_interleave(torch.tensor(batch.sizes)).tolist()
        for owner, index in zip(owners, batch.images.tolist(), strict=True):
            place = shards[owner].ids.tolist().index(index)
            assert np.array_equal(shards[owner].take([place])[0], images.images[index].numpy())


def test_one_client_alone_and_one_that_does_not_exist(tmp_path: Path) -> None:
    training = TrainingConfig(clients=3)
    everybody = write_shards(private(), training, 0, tmp_path / "all")
    [(path, count)] = write_shards(private(), training, 0, tmp_path / "one", client=2)
    assert path.read_bytes() == everybody[2][0].read_bytes() and count == everybody[2][1] == 20
    assert len(list((tmp_path / "one").iterdir())) == 1
    for client in (-1, 3):
        with pytest.raises(ConfigurationError, match="does not exist"):
            write_shards(private(), training, 0, tmp_path, client)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match="cannot be written"):
        write_shards(private(), training, 0, tmp_path / "file")


def test_the_command(
    tmp_path: Path, make_image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_image_folder({"train/a": 40, "train/b": 40, "test/a": 20, "test/b": 20}, size=16)
    config = tmp_path / "small.yaml"
    config.write_text(
        f"""
        attacks: [floor]
        data: {{dataset: "imagefolder:{root}", victims: 4}}
        model: {{backbone: resnet8, width: 8}}
        training: {{clients: 4, server_batch: 8}}
        seeds: [0, 1]
        """
    )
    with pytest.raises(SystemExit) as done:
        cli.main(["shard", str(config), "--out", str(tmp_path / "shards"), "--client", "1", "--seed", "1"])
    assert done.value.code == 0
    path = tmp_path / "shards" / shard_name(1)
    assert f"{path}: {len(Shard.read(path))} images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as failed:
        cli.main(["shard", str(config), "--out", str(tmp_path / "shards"), "--seed", "7"])
    assert failed.value.code == 2 and "--seed 7" in capsys.readouterr().err
