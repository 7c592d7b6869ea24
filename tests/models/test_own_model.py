"""A user's split, as a file brings it, and the examples of the documentation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples import audit_noisy_client, audit_splitfed, audit_torchvision_vit
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.own_model import OwnSplit, load_own_splits

MODULE = "tests.models.test_own_model"
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (3, 8, 8)


def client() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())


def server() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))


def pair() -> tuple[nn.Module, nn.Module]:
    return client(), server()


def pair_in_a_list() -> list[nn.Module]:
    return [client(), server()]


def whole() -> nn.Module:
    return nn.Sequential(client(), server())


there = client()


def drawn() -> nn.Module:
    return nn.Conv2d(3, 2, 1)


def wrong_pair() -> tuple[nn.Module, nn.Module]:
    return client(), nn.Linear(7, 2)


def half_pair() -> tuple[nn.Module, str]:
    return client(), "server"


def three() -> tuple[nn.Module, ...]:
    return client(), client(), client()


def nothing() -> None:
    return None


def needy(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 1)


def spoilt() -> nn.Module:
    net = whole()
    net.get_parameter("1.1.weight").data[0, 0] = torch.nan
    return net


def same(first: nn.Module, second: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(first(images), copy.deepcopy(second).eval()(images))


@pytest.mark.parametrize("name", ["client", "pair", "pair_in_a_list", "there"])
def test_a_client_alone_or_with_its_server(name: str) -> None:
    (split,) = load_own_splits(f"{MODULE}:{name}", SMALL)
    assert (split.cut, split.smashed_shape, split.randomised) == ("", (4, 3, 3), False)
    assert same(split.client, client(), torch.rand(3, *SMALL))
    assert (split.server is not None) == name.startswith("pair")
    assert split.client is not there and there.training


def test_one_network_gives_one_split_per_cut() -> None:
    splits = load_own_splits(f"{MODULE}:whole", SMALL, ["0.0", "0", "1.0"])
    assert [split.cut for split in splits] == ["0.0", "0", "1.0"]
    assert [split.smashed_shape for split in splits] == [(4, 3, 3), (4, 3, 3), (36,)]
    images = torch.rand(3, *SMALL)
    for split in splits:
        assert split.server is not None
        assert same(nn.Sequential(split.client, split.server), whole(), images)


def test_what_a_function_draws_is_the_same_each_time() -> None:
    first, second = (load_own_splits(f"{MODULE}:drawn", SMALL)[0] for _ in range(2))
    assert torch.equal(first.client.get_parameter("weight"), second.client.get_parameter("weight"))


def test_a_users_file(tmp_path: Path) -> None:
    torch.save(client().state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "my_model.py"
    path.write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from mocosfl_priv.models.weights import load_weights\n"
        "def split():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())\n"
        "    load_weights(net, Path(__file__).with_name('weights.pth'))\n"
        "    return net\n"
    )
    (split,) = load_own_splits(f"{path}:split", SMALL)
    assert same(split.client, client(), torch.rand(2, *SMALL))
    # the function would hand the trained weights to the untrained client
    untrained = split.build_untrained(0)
    assert not torch.equal(untrained.get_parameter("0.weight"), client().get_parameter("0.weight"))
    (tmp_path / "weights.pth").unlink()
    assert split.build_untrained(1).get_parameter("0.weight").isfinite().all()


@pytest.mark.parametrize(
    ("reference", "cuts", "message"),
    [
        ("resnet18", [], "name a function as file.py:function"),
        (f"{MODULE}:clint", [], "there is no function 'clint'; did you mean 'client'"),
        (f"{MODULE}:needy", [], r"needy\(\) failed: TypeError: .*missing 1 required positional argument: 'width'"),
        (f"{MODULE}:nothing", [], "must return a torch module, .* not a NoneType$"),
        (f"{MODULE}:three", [], "not a tuple of Sequential, Sequential, Sequential$"),
        (f"{MODULE}:half_pair", [], "the server is a str, not a torch module"),
        (f"{MODULE}:wrong_pair", [], r"the server fails on the client's smashed data of shape \(2, 4, 3, 3\): Runtime"),
        (f"{MODULE}:spoilt", ["0"], r"the model: weights are not finite: 1\.1\.weight"),
        (f"{MODULE}:whole", ["0", "0"], "--cut 0 stands twice"),
        (f"{MODULE}:whole", ["0.9"], r"--cut 0\.9: the model has no module of that name; .*cut after 0\.0, 0\.1"),
        (f"{MODULE}:pair", ["0"], "--cut 0: .*:pair is a client and a server; --cut cuts a whole network"),
    ],
)
def test_what_cannot_be_used_is_explained_in_one_line(reference: str, cuts: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_own_splits(reference, SMALL, cuts)
    assert "\n" not in str(caught.value)


class Token(nn.Module):
    """Has a parameter of its own, which `kind` says how to initialise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.token = nn.Parameter(torch.randn(4, 1, 1))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.token)


class OwnReset(Token):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.token)


class GivesBack(Token):
    def __init__(self) -> None:
        super().__init__()
        self.kept = self.token.detach().clone()

    def reset_parameters(self) -> None:
        self.token.data.copy_(self.kept)


class Deciding(OwnReset):
    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) if float(x.sum()) > -1 else x) + self.token)


@pytest.mark.parametrize("kind", ["OwnReset", "Deciding"])
def test_the_untrained_client_has_no_trained_weight(kind: str) -> None:
    for cut in ("first", "last"):
        (split,) = load_own_splits(f"{MODULE}:{kind}", SMALL, [cut])
        fresh, again, other = (split.build_untrained(seed) for seed in (0, 0, 1))
        images = torch.rand(2, *SMALL)
        assert same(fresh, again, images) and not same(fresh, other, images)
        for name, value in split.client.named_parameters():
            assert not (fresh.get_parameter(name) == value).any(), name
        assert fresh(images).shape == (2, *split.smashed_shape)


def test_an_untrained_client_that_would_keep_trained_weights_is_refused() -> None:
    before, after = load_own_splits(f"{MODULE}:Token", SMALL, ["first", "last"])
    assert before.build_untrained(0)(torch.rand(1, *SMALL)).isfinite().all()  # the token is the server's
    with pytest.raises(
        ConfigurationError, match="nothing initialises token anew; give Token a method reset_parameters"
    ):
        after.build_untrained(0)
    (split,) = load_own_splits(f"{MODULE}:GivesBack", SMALL, ["last"])
    with pytest.raises(ConfigurationError, match=r"reset_parameters\(\) gives token its trained values back"):
        split.build_untrained(0)


def example(name: str, shape: tuple[int, int, int], cuts: tuple[str, ...] = ()) -> list[OwnSplit]:
    return load_own_splits(f"{EXAMPLES / name}.py:split", shape, cuts)


def test_the_example_of_a_resnet() -> None:
    splits = example("audit_torchvision_resnet18", (3, 64, 64), ("layer1", "layer3"))
    assert [split.smashed_shape for split in splits] == [(64, 16, 16), (256, 4, 4)]
    assert splits[0].build_untrained(0)(torch.rand(1, 3, 64, 64)).isfinite().all()


def test_the_example_of_a_transformer() -> None:
    (split,) = example("audit_torchvision_vit", (3, 64, 64), audit_torchvision_vit.CUTS)
    assert split.smashed_shape == (65, 96) and split.server is not None
    assert split.server(split.client(torch.rand(2, 3, 64, 64))).shape == (2, 10)
    with pytest.raises(ConfigurationError, match="nothing initialises class_token anew"):
        split.build_untrained(0)


def test_the_example_of_splitfed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    mine, theirs = audit_splitfed.client(), audit_splitfed.server()
    parallel = {"client": nn.DataParallel(mine).state_dict(), "server": nn.DataParallel(theirs).state_dict()}
    torch.save({**parallel, "round": 7}, tmp_path / "splitfed.pth")
    monkeypatch.chdir(tmp_path)
    (split,) = example("audit_splitfed", (3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    assert split.smashed_shape == (16, 16, 16) and same(split.client, mine, images)
    assert split.server is not None and same(split.server, theirs, split.client(images).detach())


def test_the_example_of_a_noisy_client() -> None:
    (split,) = example("audit_noisy_client", (3, 32, 32))
    assert split.randomised and split.smashed_shape == (8, 16, 16)
    assert isinstance(audit_noisy_client.split()[2], audit_noisy_client.GaussianNoise)  # type: ignore[index]
