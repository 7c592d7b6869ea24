from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.data.partitions import classes_per_client, iid
from mocosfl_priv.errors import ConfigurationError


@given(n=st.integers(1, 300), clients=st.integers(1, 40), seed=st.integers(0, 5))
def test_iid_deals_out_everything_evenly(n: int, clients: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    if clients > n:
        with pytest.raises(ConfigurationError, match="clients"):
            iid(n, clients, rng)
        return
    parts = iid(n, clients, rng)
    assert len(parts) == clients
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=300),
    clients=st.integers(1, 20),
    shards=st.integers(1, 5),
)
def test_shards_are_disjoint_and_complete(labels: list[int], clients: int, shards: int) -> None:
    rng = torch.Generator().manual_seed(0)
    if clients * shards > len(labels):
        with pytest.raises(ConfigurationError, match="shards"):
            classes_per_client(torch.tensor(labels), clients, shards, rng)
        return
    parts = classes_per_client(torch.tensor(labels), clients, shards, rng)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= shards


@given(seed=st.integers(0, 50))
def test_two_classes_per_client_when_shards_divide_classes(seed: int) -> None:
    labels = torch.arange(10).repeat(20)
    parts = classes_per_client(labels, 10, 2, torch.Generator().manual_seed(seed))
    assert all(len(labels[part].unique()) <= 2 for part in parts)
    assert all(len(part) == 20 for part in parts)
