"""Independent random generators derived from the seed of an experiment.

Every random choice uses a generator named after its purpose, so that an additional draw in one place (for example, in a
defense) does not change the draws in another (for example, which images are victims).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that depends only on `seed` and the parts of `purpose`."""
    text = "/".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator for one purpose, on `device`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))


def drawn_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on `device` whose seed is drawn from torch's global generator.

    Its state need not be saved in checkpoints if that of the global generator is.
    """
    return torch.Generator(device=device).manual_seed(int(torch.randint(2**62, ())))


@contextmanager
def global_seed(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generator for a block, then restore it; for example, module initialisation draws from it."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
