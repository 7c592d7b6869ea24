from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.config import DataConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import (
    MAY_OVERLAP,
    DataRoles,
    Role,
    _deal_groups,
    assign_roles,
    check_disjoint,
)
from mocosfl_priv.errors import ConfigurationError


@pytest.fixture(scope="module")
def roles() -> DataRoles:
    return assign_roles(DataConfig(), 0.05)


def test_roles_share_no_image_but_the_declared_pair(roles: DataRoles) -> None:
    digests = {role: set(roles[role].digests()) for role in Role}
    for first, second in combinations(Role, 2):
        if frozenset({first, second}) not in MAY_OVERLAP:
            assert not digests[first] & digests[second], (first, second)
    assert digests[Role.CLIENT_PRIVATE] == digests[Role.PROBE_TRAIN]


def test_training_roles_share_no_tile(roles: DataRoles) -> None:
    training = (Role.CLIENT_PRIVATE, Role.DEFENDER_TARGET, Role.AUXILIARY_TARGET, Role.PROBE_VALIDATION)
    for first, second in combinations(training, 2):
        assert not set(roles[first].groups.tolist()) & set(roles[second].groups.tolist())


def test_sizes_follow_the_declared_fractions(roles: DataRoles) -> None:
    assert roles.training_size == 4200
    assert len(roles[Role.DEFENDER_TARGET]) == 210
    assert len(roles[Role.AUXILIARY_TARGET]) == 420
    assert len(roles[Role.PROBE_VALIDATION]) == 420
    assert len(roles[Role.VICTIMS]) == 128


def test_target_fractions_are_nested(roles: DataRoles) -> None:
    small, large = roles.defender_target(0.01), roles.defender_target(0.05)
    assert len(small) == 42 and len(large) == 210
    assert torch.equal(small.images, large.images[:42])
    assert len(roles.defender_target(0.0)) == 0


def test_roles_do_not_depend_on_anything_but_their_seed(roles: DataRoles) -> None:
    again = assign_roles(DataConfig(), 0.05)
    assert {r: v.content_sha256 for r, v in again.records.items()} == {
        r: v.content_sha256 for r, v in roles.records.items()
    }
    other = assign_roles(DataConfig(role_seed=1), 0.05)
    assert other.records[Role.VICTIMS].index_sha256 != roles.records[Role.VICTIMS].index_sha256


def test_victims_stay_the_same_for_every_defender(roles: DataRoles) -> None:
    other = assign_roles(DataConfig(auxiliary_target_fraction=0.3), 0.01)
    assert other.records[Role.VICTIMS].content_sha256 == roles.records[Role.VICTIMS].content_sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "photos"}, "overlap: .*share"),
        ({"auxiliary_target_fraction": 0.95}, "together ask for"),
        ({"victims": 5000}, "data.victims"),
        ({"image_size": 64}, "data.image_size"),
    ],
)
def test_overlapping_or_impossible_wishes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        assign_roles(DataConfig(**changes), 0.01)


def test_overlap_names_the_roles() -> None:
    shared = np.array([b"x" * 16], dtype="S16")
    with pytest.raises(ConfigurationError, match="victims and probe_train share 1 images"):
        check_disjoint({Role.VICTIMS: shared, Role.PROBE_TRAIN: shared})
    check_disjoint({Role.CLIENT_PRIVATE: shared, Role.PROBE_TRAIN: shared})


def test_duplicated_pixels_are_dropped_from_training_not_from_test(make_image_folder) -> None:  # type: ignore[no-untyped-def]
    root: Path = make_image_folder({"train/a": 30, "train/b": 30, "test/a": 10, "test/b": 10})
    source: Path = make_image_folder({"train/c": 10, "test/c": 2}, name="source", seed=9)
    (root / "train/b/copy.png").write_bytes((root / "test/a/0000.png").read_bytes())
    (root / "train/b/twin.png").write_bytes((root / "train/a/0000.png").read_bytes())
    config = DataConfig(dataset=f"imagefolder:{root}", source=f"imagefolder:{source}", victims=8)
    roles = assign_roles(config, 0.1)
    assert roles.duplicates_dropped == 2
    assert roles.training_size == 60


@given(
    groups=st.lists(st.integers(0, 12), min_size=4, max_size=80),
    first=st.integers(0, 10),
    second=st.integers(0, 10),
    seed=st.integers(0, 3),
)
def test_dealt_groups_are_never_shared(groups: list[int], first: int, second: int, seed: int) -> None:
    tensor = torch.tensor(groups)
    images = ImageSet("x", torch.zeros(len(groups), 3, 1, 1, dtype=torch.uint8), tensor % 3, ("a", "b", "c"), tensor)
    wanted = {Role.PROBE_VALIDATION: first, Role.AUXILIARY_TARGET: second}
    try:
        dealt, rest = _deal_groups(images, wanted, torch.Generator().manual_seed(seed))
    except ConfigurationError:
        return
    parts = [*dealt.values(), rest]
    assert [len(dealt[role]) for role in wanted] == [first, second]
    indices = torch.cat(parts).tolist()
    assert len(set(indices)) == len(indices)
    owners = [set(tensor[part].tolist()) for part in parts]
    for a, b in combinations(owners, 2):
        assert not a & b


def test_every_role_knows_every_class(roles: DataRoles) -> None:
    for role in (Role.AUXILIARY_TARGET, Role.PROBE_VALIDATION, Role.CLIENT_PRIVATE, Role.DEFENDER_TARGET):
        counts = roles[role].labels.bincount(minlength=6)
        assert counts.min() > 0.5 * counts.max(), (role, counts)
    assert len(roles.defender_target(0.01).labels.unique()) >= 4
