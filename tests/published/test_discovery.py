"""Both layouts of the release, written by the test; the published files themselves where they are at hand."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.published.discovery import find_published, load_attack_images
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.published.logs import LoggedValues
from tests.published.test_loader import fake_state

EXPERT = (
    "mocosflV2_ResNet18_cifar10_cut2_bnlC4S2_expert_batchsize128_ressfl_2.0_SSIM0.6_data_proportion_0.01_aux_cifar100"
)
FLAT = "resnet18_cifar10_C4S2_cut2_alpha2.0_ssim0.6_target0.01_cifar100"
CLIENT_STD, STORED_STD = torch.tensor([0.2023, 0.1994, 0.2010]), torch.tensor([0.247, 0.243, 0.261])
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])


def attack(mse: str, ssim: str, psnr: str) -> str:
    lines = [
        "Generating IR ...... (may take a while)",
        "epoch [1/50], train_loss 0.0580 (0.0765), val_loss 0.0604 (0.0592)",
        "Using MIA arch res_normN4C64 Best Validation Loss is 0.03897087",
    ]
    for name, value in {"MSE": mse, "SSIM": ssim, "PSNR": psnr}.items():
        if value:
            lines.append(f"{name} Loss on ALL Image is {value} (Real Attack Results on the Target Client)")
    return "".join(f"2022-07-10 04:50:06,498 DEBUG {line}\n" for line in lines)


def training(knn: str, linear: str) -> str:
    return (
        "2022-07-09 09:41:03,209 DEBUG SFL-Moco (ResSFL-expert) Train on cifar10 with cutlayer 2: total epochs: 200\n"
        "2022-07-09 09:43:47,600 DEBUG epoch:1, knn_val_accu: 35.41, contrast_loss: 14.28, contrast_acc: 11.55\n"
        + (f"2022-07-09 18:51:17,928 DEBUG final knn evaluation accuracy is {knn}\n" if knn else "")
        + (f"2022-07-09 19:03:22,040 DEBUG final linear-probe evaluation accuracy is {linear}\n" if linear else "")
    )


def released(folder: Path, cut: int = 2, mia: str | None = None, output: str | None = None) -> Path:
    folder.mkdir(parents=True)
    torch.save(fake_state(cut), folder / "checkpoint_c_best.tar")
    torch.save({"0.weight": torch.zeros(1)}, folder / "checkpoint_s_best.tar")  # the server's half is no client
    for name, text in (("MIA.log", mia), ("output.log", output)):
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_the_releases_own_layout(tmp_path: Path) -> None:
    later = "2022-07-10 04:49:36,817 DEBUG final knn evaluation accuracy is 69.89\n"  # the attack measures it again
    output = training("69.36", "73.04") + later
    folder = released(tmp_path / "experts" / EXPERT, mia=attack("0.0386", "0.4539", "14.8815"), output=output)
    (found,) = find_published(tmp_path)
    assert (found.name, found.path, found.cut_layer) == (EXPERT, folder / "checkpoint_c_best.tar", 2)
    assert (found.bottleneck, found.alpha, found.ssim_threshold) == ("C4S2", 2.0, 0.6)
    assert (found.target_fraction, found.source) == (0.01, "cifar100")
    assert found.logged == LoggedValues(0.0386, 0.4539, 14.8815, 0.6989, 0.7304)
    assert found.notes == ()
    assert load_published_client(found.path, found.cut_layer) is not None
    assert [c.name for c in find_published(folder)] == [EXPERT]  # the folder of one expert will do


@pytest.mark.parametrize(
    ("mia", "mse", "note"),
    [
        (attack("0.0430", "0.41", "14.5") + attack("0.0410", "0.42", "14.7"), 0.0410, "2 finished attacks (MSE 0.0430"),
        (attack("0.0410", "0.42", "14.7") + attack("0.0430", "0.41", ""), 0.0410, "1 unfinished attacks"),
        (attack("0.0410", "nan", "14.7"), None, "no finished attack"),
        (attack("1e", "0.4", "14.7"), None, "no finished attack"),
        ("\x00\xff not a log", None, "no finished attack"),
        (None, None, "this checkpoint was not attacked"),
    ],
)
def test_attacks_that_cannot_be_read_are_told_and_do_no_harm(
    mia: str | None, mse: float | None, note: str, tmp_path: Path
) -> None:
    released(tmp_path / EXPERT, mia=mia)
    (found,) = find_published(tmp_path)
    assert found.logged.mse == mse
    assert (found.logged.ssim is None) == (mse is None) and (found.logged.psnr is None) == (mse is None)
    assert any(note in text for text in found.notes)


def test_a_log_that_is_a_folder(tmp_path: Path) -> None:
    (released(tmp_path / EXPERT) / "MIA.log").mkdir()
    (found,) = find_published(tmp_path)
    assert found.logged == LoggedValues() and found.notes == ("MIA.log cannot be read: Is a directory",)


def test_accuracies_of_an_overwritten_training_are_not_taken(tmp_path: Path) -> None:
    released(tmp_path / EXPERT, output=training("71.99", "74.91") + training("66.08", ""))
    (found,) = find_published(tmp_path)
    assert found.logged.knn_accuracy == 0.6608 and found.logged.linear_accuracy is None


def test_a_file_per_checkpoint(tmp_path: Path) -> None:
    torch.save(fake_state(2), tmp_path / f"{FLAT}.tar")
    torch.save(fake_state(1), tmp_path / "client.tar")
    (tmp_path / "README.md").write_text(
        "| file | cut | alpha / t | accuracy kNN / linear | logged attack MSE / SSIM / PSNR |\n|---|---|---|---|---|\n"
        "| `..._ssim0.6_target0.01_cifar100.tar` | 2 | 2 / .6 | 69.89 / 73.04 | .0386 / .4539 / 14.88 |\n"
        "| `client.tar` | 1 | 2 / .6 | 69.62 / none | never attacked |\n"
    )
    plain, named = find_published(tmp_path)
    assert (plain.name, plain.cut_layer, plain.logged) == ("client", 1, LoggedValues(knn_accuracy=0.6962))
    assert {plain.bottleneck, plain.alpha, plain.ssim_threshold, plain.target_fraction, plain.source} == {None}
    assert (named.name, named.cut_layer, named.bottleneck, named.alpha) == (FLAT, 2, "C4S2", 2.0)
    assert (named.ssim_threshold, named.target_fraction, named.source) == (0.6, 0.01, "cifar100")
    assert named.logged == LoggedValues(0.0386, 0.4539, 14.88, 0.6989, 0.7304)
    (tmp_path / "README.md").unlink()
    for found in find_published(tmp_path):
        assert set(asdict(found.logged).values()) == {None}
        assert found.notes == ("there are no logged values for this file",)


def test_names_are_unique(tmp_path: Path) -> None:
    released(tmp_path / "one" / EXPERT)
    released(tmp_path / "two" / EXPERT)
    torch.save(fake_state(1), tmp_path / "alone.tar")
    assert [c.name for c in find_published(tmp_path)] == [
        "alone",
        f"{tmp_path.name}/one/{EXPERT}",
        f"{tmp_path.name}/two/{EXPERT}",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{FLAT}.tar".replace("cut2", "cut3"), "cut after unit 2, not after unit 3"),
        (f"{FLAT}.tar".replace("C4S2", "C4S4"), "bottleneck C4S4 cannot be rebuilt"),
        (f"{FLAT}.tar".replace("C4S2", "noReLUC4S2"), "bottleneck noReLUC4S2 cannot be rebuilt"),
        (f"{FLAT}.tar".replace("C4S2", "C8S2"), "the name says bottleneck C8S2, but the weights have K3C4"),
        (f"{FLAT}.tar".replace("C4S2", "bnlNone"), "the name says bottleneck none, but the weights have K3C4"),
    ],
)
def test_checkpoints_that_are_not_what_they_are_called(name: str, message: str, tmp_path: Path) -> None:
    torch.save(fake_state(2), tmp_path / name)
    with pytest.raises(ConfigurationError, match=message) as caught:
        find_published(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        find_published(tmp_path / "missing")
    (tmp_path / "checkpoint_s_best.tar").write_bytes(b"a server")
    with pytest.raises(ConfigurationError, match="no published checkpoint below"):
        find_published(tmp_path)
    (tmp_path / "client.tar").write_bytes(b"no torch file")
    with pytest.raises(ConfigurationError, match=r"client\.tar: not a torch file with weights only"):
        find_published(tmp_path)


def test_attack_images_are_undone_as_the_release_did(tmp_path: Path) -> None:
    assert load_attack_images(tmp_path) is None
    true = torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    std, mean = STORED_STD.view(3, 1, 1), MEAN.view(3, 1, 1)
    stored = (true - mean) / std
    folder = released(tmp_path / "experts" / EXPERT)
    (tmp_path / "saved_tensors").mkdir()
    torch.save(stored, tmp_path / "saved_tensors" / "test_cifar10_image.pt")
    images, *others = [load_attack_images(place) for place in (tmp_path, tmp_path / "experts", folder)]
    assert images is not None and images.dtype == torch.float32
    assert all(other is not None and torch.equal(other, images) for other in others)
    # the same picture with less contrast around CIFAR's mean colour
    paler = mean + (true - mean) * (CLIENT_STD / STORED_STD).view(3, 1, 1)
    torch.testing.assert_close(images, paler, rtol=0, atol=1e-6)
    assert images.std() < 0.83 * true.std()
    # and the client's own normalisation gives the saved numbers back
    torch.testing.assert_close((images - mean) / CLIENT_STD.view(3, 1, 1), stored, rtol=0, atol=1e-5)
    torch.save(torch.full((128, 3, 32, 32), 9.0), tmp_path / "cifar10_attack_images_128.pt")
    clamped = load_attack_images(tmp_path)
    assert clamped is not None and bool((clamped == 1).all())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(4, 3, 32, 32), r"not the release's attack images of shape \(128, 3, 32, 32\): \(4, 3, 32, 32\)"),
        (torch.zeros(128, 3, 32, 32, dtype=torch.uint8), "not the release's attack images"),
        ({"images": torch.zeros(1)}, "not the release's attack images of shape .*: dict"),
        (torch.full((128, 3, 32, 32), float("nan")), "not finite"),
        (Path("code"), "not a torch file with weights only"),
    ],
)
def test_attack_images_of_another_kind(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "cifar10_attack_images_128.pt")
    with pytest.raises(ConfigurationError, match=message):
        load_attack_images(tmp_path)


@pytest.fixture
def published() -> Path:
    folder = Path(os.environ.get("MOCOSFL_SHARED", Path(__file__).parents[3] / "shared")) / "published"
    if not any(folder.glob("*.tar")):
        pytest.skip(f"no published clients in {folder}; set MOCOSFL_SHARED to the folder that has published/ in it")
    return folder


def test_the_published_files(published: Path) -> None:
    found = {(c.cut_layer, c.ssim_threshold, c.target_fraction): c for c in find_published(published)}
    assert set(found) == {(1, 0.6, 0.0), (1, 0.6, 0.005), (2, 0.6, 0.01), (2, 0.5, 0.01)}
    assert all((c.bottleneck, c.alpha, c.source) == ("C4S2", 2.0, "cifar100") for c in found.values())
    assert found[2, 0.6, 0.01].logged == LoggedValues(0.0386, 0.4539, 14.88, 0.6989, 0.7304)
    assert found[1, 0.6, 0.0].logged == LoggedValues(knn_accuracy=0.6962, linear_accuracy=0.7169)


def test_the_published_attack_images(published: Path) -> None:
    images = load_attack_images(published)
    assert images is not None and images.min() > 0 and images.max() < 1  # nothing is clamped
    constant = images.mean((0, 2, 3), keepdim=True)
    assert float((images - constant).square().mean()) == pytest.approx(0.0405, abs=5e-5)
