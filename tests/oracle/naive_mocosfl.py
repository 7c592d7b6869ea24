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
    """Trains on given views, so that augmentation plays no part in a comparison."""

    def __init__(self, model: SplitModel, training: TrainingConfig, memory: Tensor, steps: int) -> None:
        self.settings = training
        self.steps = steps
        self.clients = [copy.deepcopy(model.client) for _ in range(training.clients)]
        self.client_keys = [copy.deepcopy(model.client) for _ in range(training.clients)]
        self.server = nn.Sequential(copy.deepcopy(model.trunk), copy.deepcopy(model.projector))
        self.server_key = copy.deepcopy(self.server)
        self.client_optimisers = [self._optimiser(client) for client in self.clients]
        self.server_optimiser = self._optimiser(self.server)
        self.memory = [row.clone() for row in memory]
        self.oldest = 0
        self.step_count = 0

    def step(self, pool: Sequence[int], first: Tensor, second: Tensor) -> float:
        """One step; first, second: views (P, b, 3, h, w) of the pool's images."""
        rate = 0.5 * self.settings.learning_rate * (1 + math.cos(math.pi * self.step_count / self.steps))
        self.step_count += 1
        directions = [(first, second), (second, first)] if self.settings.symmetric else [(first, second)]
        loss = torch.zeros((), dtype=first.dtype)
        new_keys = []
        memory = torch.stack(self.memory)
        for query_view, key_view in directions:
            terms = []
            for position, client in enumerate(pool):
                q = F.normalize(self.server(self.clients[client](query_view[position])), dim=1)
                with torch.no_grad():
                    k = F.normalize(self.server_key(self.client_keys[client](key_view[position])), dim=1)
                for one_q, one_k in zip(q, k, strict=True):
                    scores = torch.cat([(one_q @ one_k).view(1), memory @ one_q]) / self.settings.temperature
                    terms.append(torch.logsumexp(scores, 0) - scores[0])
                    new_keys.append(one_k)
            loss = loss + torch.stack(terms).mean()
        optimisers = [self.server_optimiser, *(self.client_optimisers[client] for client in pool)]
        for optimiser in optimisers:
            optimiser.zero_grad()
            optimiser.param_groups[0]["lr"] = rate
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        self._follow(self.server_key, self.server)
        for client in pool:
            self._follow(self.client_keys[client], self.clients[client])
        for key in new_keys:
            self.memory[self.oldest] = key
            self.oldest = (self.oldest + 1) % len(self.memory)
        if self.step_count % self.settings.sync_period == 0:
            self._average(self.clients, pool)
            if self.settings.average_momentum_models:
                self._average(self.client_keys, pool)
        return float(loss.detach())

    def _optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.SGD(
            model.parameters(), lr=1.0, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def _follow(self, slow: nn.Module, fast: nn.Module) -> None:
        with torch.no_grad():
            for s, f in zip(slow.parameters(), fast.parameters(), strict=True):
                s.copy_(self.settings.ema * s + (1 - self.settings.ema) * f)

    def _average(self, models: Sequence[nn.Module], pool: Sequence[int]) -> None:
        states = [models[client].state_dict() for client in pool]
        mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        for model in models:
            model.load_state_dict(mean)
