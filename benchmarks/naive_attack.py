"""The decoder attack with the structure of MocoSFL's research code, to be compared with ours.

Auxiliary images are augmented once and saved as JPEG, their smashed data as tensor files, one per image; both are read
again in every epoch. The decoder trains in float32 with Adam; the epoch is chosen on one validation batch with norms in
training mode.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mocosfl_priv.inversion.decoders import build_decoder

BATCH, EPOCHS, RATE = 32, 50, 1e-3


class Files(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of smashed data and image, read from disk one by one."""

    def __init__(self, folder: Path, client: nn.Module, images: Tensor) -> None:
        self._folder = folder
        self._count = len(images)
        folder.mkdir(parents=True)
        augment = Compose([RandomCrop(images.shape[-1], padding=4), RandomHorizontalFlip()])
        with torch.no_grad():
            for index, image in enumerate(map(augment, images)):
                to_pil_image(image.cpu()).save(folder / f"{index}.jpg")
                torch.save(client(image[None])[0].cpu(), folder / f"{index}.pt")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self._folder / f"{index}.jpg") as image:
            pixels = pil_to_tensor(image.convert("RGB")).float() / 255
        return torch.load(self._folder / f"{index}.pt", weights_only=True), pixels


def attack(client: nn.Module, train: Tensor, validation: Tensor, smashed: Tensor, folder: Path, seed: int) -> Tensor:
    """Reconstructions of the images behind `smashed`."""
    torch.manual_seed(seed)
    device = smashed.device
    pairs = DataLoader(Files(folder / "train", client, train), BATCH, shuffle=True)
    checks = DataLoader(Files(folder / "validation", client, validation), BATCH)
    decoder = build_decoder("ressfl_N4C64", smashed.shape[1:], train.shape[1:], "batch").to(device)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=RATE)
    best, kept = float("inf"), decoder.state_dict()
    for _ in range(EPOCHS):
        for sent, images in pairs:
            optimiser.zero_grad()
            F.mse_loss(decoder(sent.to(device)), images.to(device)).backward()
            optimiser.step()
        sent, images = next(iter(checks))
        with torch.no_grad():
            error = float(F.mse_loss(decoder(sent.to(device)), images.to(device)))
        if error < best:
            best, kept = error, copy.deepcopy(decoder.state_dict())
    decoder.load_state_dict(kept)
    decoder.eval()
    with torch.no_grad():
        return decoder(smashed)
