"""MocoSFL as its research code is built: what `benchmarks.training` compares with.

One DataLoader with PIL augmentations, one module, one momentum module, one optimiser and one scheduler per client;
a Python loop over clients for forward, backward and moving average; the two directions of the symmetric loss one
after the other, each a forward of query and key; everything in float32; a garbage collection per step, as there.
It differs from `tests/oracle` in purpose: that one is obvious, this one is honest about how people write it.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.models.split import SplitModel


class PilBlur:
    """MoCo v2's Gaussian blur, with PIL as in its research code."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, blurred with a deviation of its own."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self._sigma)))  # noqa: S311 - an augmentation


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two augmented views of each of a client's images, decoded and transformed by PIL."""

    def __init__(self, images: Tensor) -> None:
        self._images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(images.shape[-1], scale=(0.08, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([PilBlur((0.1, 2.0))], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(self._images[index]), self._transform(self._images[index])


class NaiveClient:
    """One client: loader, online and momentum model, optimiser, scheduler."""

    def __init__(
        self, module: nn.Module, images: Tensor, micro_batch: int, training: TrainingConfig, device: str
    ) -> None:
        self.device = device
        self.online = copy.deepcopy(module).to(device)
        self.key = copy.deepcopy(module).to(device).requires_grad_(False)
        self.optimiser = torch.optim.SGD(
            self.online.parameters(), lr=training.learning_rate, momentum=training.momentum,
            weight_decay=training.weight_decay,
        )  # fmt: skip
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, 1000)
        self._loader = DataLoader(TwoViews(images), batch_size=micro_batch, shuffle=True, drop_last=True)
        self._iterator: Iterator[list[Tensor]] = iter(self._loader)
        self._ema = training.ema
        self.sent: list[Tensor] = []

    def views(self) -> list[Tensor]:
        """The next micro-batch, twice augmented: two tensors (b, 3, h, w)."""
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader)
            return next(self._iterator)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What travels to the server for one direction of the loss."""
        smashed = self.online(query)
        self.sent.append(smashed)
        with torch.no_grad():
            return smashed.detach(), self.key(key)

    def backward(self, gradients: list[Tensor]) -> None:
        """Backward pass with the server's gradients, optimiser, scheduler, moving average."""
        self.optimiser.zero_grad()
        for smashed, gradient in zip(self.sent, gradients, strict=True):
            smashed.backward(gradient)
        self.sent = []
        self.optimiser.step()
        self.scheduler.step()
        follow(self.key, self.online, self._ema)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, ema: float) -> None:
    """The momentum model's moving average, parameter by parameter."""
    for s, f in zip(slow.parameters(), fast.parameters(), strict=True):
        s.data = ema * s.data + (1 - ema) * f.data


class NaiveMocoSFL:
    """Clients in a list, one server; :meth:`step` is one real training step including augmentation."""

    def __init__(
        self, model: SplitModel, images: Tensor, clients: int, micro_batch: int, training: TrainingConfig,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self._training = training
        self.clients = [
            NaiveClient(model.client, part, micro_batch, training, device) for part in images.tensor_split(clients)
        ]
        self.server = nn.Sequential(copy.deepcopy(model.trunk), copy.deepcopy(model.projector)).to(device)
        self.server_key = copy.deepcopy(self.server).requires_grad_(False)
        self._optimiser = torch.optim.SGD(
            self.server.parameters(), lr=training.learning_rate, momentum=training.momentum,
            weight_decay=training.weight_decay,
        )  # fmt: skip
        dim = [m.out_features for m in model.projector.modules() if isinstance(m, nn.Linear)][-1]
        self._queue = F.normalize(torch.randn(dim, training.queue_size, device=device), dim=0)
        self._oldest = 0
        self._steps = 0

    def step(self) -> None:
        """Augment, encode, score both directions, learn; synchronise when it is time."""
        self.client_step(self.server_gradients, [client.views() for client in self.clients])
        self._steps += 1
        gc.collect()
        if self._steps % self._training.sync_period == 0:
            self.average()

    def client_step(
        self, server: Callable[[list[tuple[Tensor, Tensor]]], list[Tensor]], views: list[list[Tensor]]
    ) -> None:
        """The clients' side; `server` turns two directions of (queries, keys) into two gradients."""
        directions = []
        for q, k in ((0, 1), (1, 0)):
            pairs = [
                client.forward(v[q].to(client.device), v[k].to(client.device))
                for client, v in zip(self.clients, views, strict=True)
            ]
            directions.append((torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])))
        gradients = server(directions)
        size = len(gradients[0]) // len(self.clients)
        for index, client in enumerate(self.clients):
            client.backward([gradient[index * size : (index + 1) * size] for gradient in gradients])

    def server_gradients(self, directions: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The server's step; returns dL/dz for the queries of each direction."""
        self._optimiser.zero_grad()
        gradients, keys, loss = [], [], torch.zeros((), device=self._queue.device)
        received = [queries.requires_grad_() for queries, _ in directions]
        for queries, (_, key_smashed) in zip(received, directions, strict=True):
            q = F.normalize(self.server(queries), dim=1)
            with torch.no_grad():
                k = F.normalize(self.server_key(key_smashed), dim=1)
            positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
            negative = torch.einsum("nc,ck->nk", q, self._queue.clone())
            logits = torch.cat([positive, negative], dim=1) / self._training.temperature
            loss = loss + F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
            keys.append(k)
        loss.backward()
        for queries in received:
            assert queries.grad is not None
            gradients.append(queries.grad.detach().clone())
        self._optimiser.step()
        follow(self.server_key, self.server, self._training.ema)
        new = torch.cat(keys)
        places = (self._oldest + torch.arange(len(new), device=new.device)) % self._queue.shape[1]
        self._queue[:, places] = new.T
        self._oldest = (self._oldest + len(new)) % self._queue.shape[1]
        float(loss.detach())
        return gradients

    @torch.no_grad()
    def average(self) -> None:
        """FedAvg over all clients, state dict by state dict."""
        states = [client.online.state_dict() for client in self.clients]
        mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        for client in self.clients:
            client.online.load_state_dict(mean)
