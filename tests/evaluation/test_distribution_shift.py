from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mocosfl_priv.config import DataConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import Role, assign_roles
from mocosfl_priv.evaluation.distribution_shift import ImageStatistics, distribution_shifts, image_statistics


def statistics_of(images: ImageSet) -> ImageStatistics:
    return image_statistics(images.images.numpy(), images.groups.numpy())


def shrunk(images: ImageSet, factor: float) -> ImageStatistics:
    """The same images with less contrast about mid-grey, as after un-normalising with wrong constants."""
    pixels = 127.5 + factor * (images.images.numpy().astype(float) - 127.5)
    return image_statistics(pixels.round().astype(np.uint8), images.groups.numpy())


def test_statistics_are_those_of_the_pixels() -> None:
    images = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    images[0, 0] = 255
    images[1, :, :2] = 255
    np.testing.assert_allclose(
        image_statistics(images, np.arange(2)).values, np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]), atol=1e-6
    )


@pytest.mark.parametrize(("dataset", "factor"), [("photos", 0.5), ("cifar10", 0.8)])  # photos have few groups
def test_victims_of_the_data_itself_pass_and_shrunken_ones_do_not(
    dataset: str, factor: float, request: pytest.FixtureRequest
) -> None:
    config = DataConfig()
    if dataset == "cifar10":
        shared: Path = request.getfixturevalue("shared")
        folders = {"dataset": shared / "data/cifar10", "source": shared / "data/cifar100"}
        config = DataConfig(**{key: f"imagefolder:{folder}" for key, folder in folders.items()})
    roles = assign_roles(config, 0.0)
    victims, target = roles[Role.VICTIMS], statistics_of(roles[Role.CLIENT_PRIVATE])
    assert not any(shift.matters for shift in distribution_shifts(statistics_of(victims), target))
    contrast = distribution_shifts(shrunk(victims, factor), target)[-1]
    assert contrast.statistic == "contrast" and contrast.matters and contrast.effect < -0.3
    assert contrast.victims < contrast.target


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Two hundred comparisons of images of one distribution, at one in a thousand for each statistic."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> ImageStatistics:
        return ImageStatistics(rng.gamma(2, 0.1, (count, 4)), np.arange(count))

    p_values = [shift.p_value for _ in range(10) for shift in distribution_shifts(draw(40), draw(300))]
    assert min(p_values) > 0.001 and 0.2 < np.mean(p_values) < 0.8


def test_overlapping_images_are_one_observation() -> None:
    """Twenty copies of four images look like eighty images of another distribution, but are four."""
    rng = np.random.default_rng(1)
    four = rng.normal(0.5, 0.1, (4, 4)) + 0.06
    copies = np.repeat(four, 20, axis=0)
    target = ImageStatistics(rng.normal(0.5, 0.1, (400, 4)), np.arange(400))
    naive = distribution_shifts(ImageStatistics(copies, np.arange(80)), target)
    grouped = distribution_shifts(ImageStatistics(copies, np.repeat(np.arange(4), 20)), target)
    assert any(shift.matters for shift in naive) and not any(shift.matters for shift in grouped)
