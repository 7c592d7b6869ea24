"""MocoSFL as a loop nobody can misread: N client models, N optimisers, a for loop, plain autograd end to end.

No messages, no vectorising, no hand-written optimiser: the loss is built from images to scalar in one graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.models.split import SplitModel


class NaiveMocoSFL:
    """Trains on given views, so that augmentation plays no part in a comparison.

    memory: (rings, size, dim), the feature memory's first keys; one ring for all clients, or one for each.
    """

    def __init__(self, model: SplitModel, training: TrainingConfig, memory: Tensor, steps: int) -> None:
        self.settings = training
        self.steps = steps
        self.clients = [copy.deepcopy(model.client) for _ in range(training.clients)]
        self.client_keys = [copy.deepcopy(model.client) for _ in range(training.clients)]
        self.server = nn.Sequential(copy.deepcopy(model.trunk), copy.deepcopy(model.projector))
        self.server_key = copy.deepcopy(self.server)
        self.client_optimisers = [self._optimiser(client) for client in self.clients]
        self.server_optimiser = self._optimiser(self.server)
        self.memory = [[row.clone() for row in ring] for ring in memory]
        self.oldest = [0 for _ in memory]
        self.client_steps = [0 for _ in self.clients]
        self.kept_per_divergence: dict[int, float] = {}
        self.step_count = 0

    def step(self, pool: Sequence[int], first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
        """One step; first, second: a view (b, 3, h, w) of each pool client's images."""
        settings = self.settings
        if settings.ema_update == "before_encoding":
            self._follow(self.server_key, self.server)
            for client in pool:
                self._follow(self.client_keys[client], self.clients[client])
        batch = sum(len(view) for view in first)
        rings = [torch.stack(ring) for ring in self.memory]
        loss = torch.zeros((), dtype=first[0].dtype)
        new_keys: list[tuple[int, Tensor]] = []
        for position, client in enumerate(pool):
            for query, key in self._pairs(client, first[position], second[position]):
                q = F.normalize(self.server(query), dim=1)
                with torch.no_grad():
                    k = F.normalize(self.server_key(key), dim=1)
                ring = client if len(rings) > 1 else 0
                for one_q, one_k in zip(q, k, strict=True):
                    scores = torch.cat([(one_q @ one_k).view(1), rings[ring] @ one_q]) / settings.temperature
                    loss = loss + (torch.logsumexp(scores, 0) - scores[0]) / batch
                    new_keys.append((ring, one_k))
        self._set_rates(pool)
        optimisers = [self.server_optimiser, *(self.client_optimisers[client] for client in pool)]
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        if settings.ema_update == "after_step":
            self._follow(self.server_key, self.server)
            for client in pool:
                self._follow(self.client_keys[client], self.clients[client])
        for ring, key in new_keys:
            self.memory[ring][self.oldest[ring]] = key
            self.oldest[ring] = (self.oldest[ring] + 1) % len(self.memory[ring])
        self.step_count += 1
        for client in pool:
            self.client_steps[client] += 1
        if self.step_count % settings.sync_period == 0:
            self._average(pool)
        return float(loss.detach())

    def _pairs(self, client: int, first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Query and key messages of one client, one pair per direction of the loss."""
        online, slow = self.clients[client], self.client_keys[client]
        with torch.no_grad():
            slow_first, slow_second = slow(first), slow(second)
        if not self.settings.symmetric:
            return [(online(first), slow_second)]
        if self.settings.paper_gradient == "one_sided":
            query = online(first)
            return [(query, slow_second), (slow_second, query.detach())]
        return [(online(first), slow_second), (online(second), slow_first)]

    def _set_rates(self, pool: Sequence[int]) -> None:
        settings = self.settings
        epoch = self.step_count * settings.epochs // self.steps
        per_step = self._cosine(settings.learning_rate, self.step_count, self.steps)
        per_epoch = self._cosine(settings.learning_rate, epoch, settings.epochs)
        self.server_optimiser.param_groups[0]["lr"] = per_epoch if settings.server_schedule == "per_epoch" else per_step
        base = settings.client_learning_rate or settings.learning_rate
        for client in pool:
            rate = self._cosine(base, self.step_count, self.steps)
            if settings.client_schedule == "oscillating":
                rate = self._cosine(base, self.client_steps[client], settings.epochs)
            self.client_optimisers[client].param_groups[0]["lr"] = rate

    def _cosine(self, base: float, position: int, length: int) -> float:
        return base * (1 + math.cos(math.pi * position / length)) / 2

    def _optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.SGD(
            model.parameters(), lr=1.0, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def _follow(self, slow: nn.Module, fast: nn.Module) -> None:
        with torch.no_grad():
            for s, f in zip(slow.parameters(), fast.parameters(), strict=True):
                s.copy_(self.settings.ema * s + (1 - self.settings.ema) * f)

    def _average(self, pool: Sequence[int]) -> None:
        averaged = [0, *pool[1:]] if self.settings.average_base == "client_0" else pool
        mean = self._mean(self.clients, averaged)
        for client, model in enumerate(self.clients):
            kept = self._kept_share(client, mean) if client in pool else 0.0
            own = model.state_dict()
            model.load_state_dict({name: kept * own[name] + (1 - kept) * mean[name] for name in mean})
        if self.settings.average_momentum_models:
            mean = self._mean(self.client_keys, averaged)
            for model in self.client_keys:
                model.load_state_dict(mean)

    def _mean(self, models: Sequence[nn.Module], pool: Sequence[int]) -> dict[str, Tensor]:
        states = [models[client].state_dict() for client in pool]
        return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}

    def _kept_share(self, client: int, mean: dict[str, Tensor]) -> float:
        if self.settings.divergence_aware is None:
            return 0.0
        own = self.clients[client].state_dict()
        divergence = math.sqrt(sum(float(((own[name] - mean[name]) ** 2).sum()) for name in mean))
        if client not in self.kept_per_divergence and divergence > 0:
            self.kept_per_divergence[client] = self.settings.divergence_aware / divergence
        return min(1.0, self.kept_per_divergence.get(client, 0.0) * divergence)
