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
    """A 63-bit seed that depends on `seed` and on every part of `purpose`, and on nothing else.

    Args:
        seed: the experiment's or the attack's seed.
        purpose: names or numbers that say what the seed is for.

    Returns:
        An integer in [0, 2**63).

    >>> derive_seed(0, "decoder") == derive_seed(0, "decoder")
    True
    >>> derive_seed(0, "decoder") == derive_seed(0, "client", 1)
    False
    """
    text = "/".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator for one purpose, on `device`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))


def drawn_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose seed is drawn from torch's global one: it needs no state of its own.

    Args:
        device: where the generator draws.

    Returns:
        A fresh generator; two calls give generators with different seeds.

    >>> with global_seed(0, "example"):
    ...     first = drawn_generator().initial_seed()
    >>> with global_seed(0, "example"):
    ...     drawn_generator().initial_seed() == first
    True
    """
    return torch.Generator(device=device).manual_seed(int(torch.randint(2**62, ())))


@contextmanager
def global_seed(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generator for a block (module initialisation draws from it), then restore it.

    Args:
        seed: the experiment's or the attack's seed.
        purpose: names or numbers that say what is drawn in the block; see :func:`derive_seed`.

    Returns:
        A context manager.

    >>> with global_seed(0, "weights"):
    ...     first = torch.nn.Linear(2, 1).weight
    >>> with global_seed(0, "weights"):
    ...     torch.equal(torch.nn.Linear(2, 1).weight, first)
    True
    """
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
