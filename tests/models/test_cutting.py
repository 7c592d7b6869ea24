"""Whole networks, cut: both parts against the network itself, whose modules are listened to by hand."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18, vgg11_bn, vit_b_16

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.client_check import check_client
from mocosfl_priv.models.cutting import cut_model, cut_names

SHAPE = (3, 32, 32)
SMALL = (3, 8, 8)


class Deciding(nn.Module):
    """The image decides in the root how it is treated, so nothing of it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.bright = nn.Conv2d(3, 8, 3, padding=1)
        self.dark = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x.flatten(1).mean(1).view(-1, 1, 1, 1) > 0.5, self.bright(x), self.dark(x))
        if bool(x.sum() > 0):
            x = x + 1
        return self.head(self.block(self.norm(x)).mean((2, 3)))


@cache
def network(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    torch.manual_seed(0)
    model: nn.Module
    if name == "vgg11_bn":
        with torch.device("meta"):  # its head has 120 million weights, which are not drawn here
            model = vgg11_bn(weights=None)
            model.classifier = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(512 * 49, 10))
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
    elif name == "vit_b_16":
        transformer = vit_b_16(weights=None, image_size=32, num_classes=10)
        transformer.encoder.layers = transformer.encoder.layers[:2]
        nn.init.normal_(transformer.heads[0].weight)  # torchvision starts with zeros
        model = transformer
    else:
        model = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2, "Deciding": Deciding}[name]()
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.uniform_(0.5, 1.5)
    return model, cut_names(model, SHAPE)


def by_hand(model: nn.Module, name: str, images: Tensor) -> tuple[Any, Any]:
    """What the module returns, and what the model returns, in eval mode."""
    model, heard = copy.deepcopy(model).eval(), []
    model.get_submodule(name).register_forward_hook(lambda _m, _a, output: heard.append(output.clone()))
    with torch.no_grad():
        output = model(images.clone())
    assert len(heard) == 1
    return heard[0], output


@pytest.mark.parametrize("which", ["resnet18", "mobilenet_v2", "vgg11_bn", "vit_b_16", "Deciding"])
@settings(max_examples=3)
@given(
    place=st.floats(0, 1, exclude_max=True),
    number=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_client_and_server_are_the_whole_model_to_the_last_bit(
    which: str, place: float, number: int, seed: int
) -> None:
    model, names = network(which)
    name = names[int(place * len(names))]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if name in ("bright", "dark"):
        with pytest.raises(ConfigurationError, match="server would also need another value"):
            cut_model(model, name, SHAPE)
        return
    client, server = cut_model(model, name, SHAPE)
    images = torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(seed))
    expected, whole = by_hand(model, name, images)
    with torch.no_grad():
        smashed = client(images)
        assert torch.equal(smashed, expected)
        assert (server is None) == (which == "Deciding")
        if server is not None:
            assert torch.equal(server(smashed), whole)
            assert torch.equal(smashed, expected)  # the server has not worked in place on what was sent
            assert not {id(p) for p in client.parameters()} & {id(p) for p in model.parameters()}
            mine, theirs = (set(dict(part.named_parameters())) for part in (client, server))
            assert mine | theirs <= set(dict(model.named_parameters())) and not mine & theirs
    assert model.training  # as it was given
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_where_models_can_be_cut_in_order() -> None:
    layers = [f"layer{stage}{block}" for stage in range(1, 5) for block in (".0", ".1", "")]
    assert network("resnet18")[1] == ("conv1", "bn1", "relu", "maxpool", *layers, "avgpool", "fc")
    assert network("vit_b_16")[1][:4] == (
        "conv_proj",
        "encoder.dropout",
        "encoder.layers.encoder_layer_0",
        "encoder.layers.encoder_layer_1",
    )
    assert network("Deciding")[1] == ("bright", "dark", "norm", "block.0", "block.1", "block", "head")


class Net(nn.Module):
    """Two convolutions and a head; subclasses say how they are joined."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3 * 64, 4)


class Sizes(Net):
    """Sizes of the images, a constant, and a parameter that grows with the batch, are used after the cut."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.dim() != 4 or x.shape[2] < 8:
            raise ValueError("no images")
        n, (height, width) = x.shape[0], x.shape[2:]
        token = self.token.expand(n, -1, height, width)
        mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
        y = self.first((x - mean) * (self.scale * 2))
        y.relu_()
        y = self.second(y) + token + mean
        if mask is not None:
            y = y * mask
        return self.head(y.reshape(n * 2, -1).view(x.size(0), 3 * height * width))


class OpaqueBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.abs().sum()) > 0 else x


class CountingBlock(OpaqueBlock):
    """Makes a tensor of as many rows as there are images, which a trace cannot know."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.zeros(x.shape[0], 3, 1, 1)


class WithOpaqueBlock(Net):
    def __init__(self, kind: type[OpaqueBlock] = OpaqueBlock) -> None:
        super().__init__()
        self.block = kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.block(self.first(x))).flatten(1))


class MendsAfterwards(Net):
    """A module that still works in place on what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.block = InPlace()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.block(x)).flatten(1))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y.relu_()
        return y


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(self.embed(x).flatten(2).transpose(1, 2))
        return {"logits": self.head(tokens.mean(1)), "tokens": tokens}


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        (Sizes(), "first", (3, 8, 8)),
        (Sizes(), "second", (3, 8, 8)),
        (WithOpaqueBlock(), "block", (3, 8, 8)),
        (WithOpaqueBlock(), "first", (3, 8, 8)),
        (WithOpaqueBlock(CountingBlock), "block", (3, 8, 8)),
        (MendsAfterwards(), "block", (3, 8, 8)),
        (MendsAfterwards(), "block.inner", (3, 8, 8)),
        (Tokens(), "encoder.layers.0", (4, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), "1", (5,)),
        (nn.DataParallel(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())), "module.0", (2, 8, 8)),
    ],
)
def test_users_networks_get_both_parts(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    client, server = cut_model(model, name, SMALL)
    assert server is not None and not client.training and not server.training
    checked = check_client(client, SMALL)
    assert checked.smashed_shape == shape and not checked.randomised
    for number in (1, 3, 7):
        images = torch.rand(number, *SMALL)
        expected, whole = by_hand(model, name, images)
        with torch.no_grad():
            smashed = copy.deepcopy(client)(images)
            assert torch.equal(smashed, expected)
            got = copy.deepcopy(server)(smashed)
        for ours, theirs in zip(got.values(), whole.values(), strict=True) if isinstance(got, dict) else [(got, whole)]:
            assert torch.equal(ours, theirs)


RAN: list[str] = []


class Witness(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        RAN.append("after the cut")
        return x


class Stopped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.witness = Witness()

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.first(x) if float(x.detach().sum()) > 0 else x * 2
            y = self.second(y)
        except Exception:  # a client must not be swallowed by this
            y = x
        return self.head(self.witness(y).flatten(1))


class Baked(Net):
    """Noise of a fixed shape, which a trace would draw once for ever."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x) + torch.randn(3, 8, 8)).flatten(1))


class SometimesHeard(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.second(self.first(x)) if float(x.sum()) > 0 else x * 1).flatten(1))


class CountsBright(Net):
    """How many pixels are bright decides, by a size, what follows; nearly every image has some."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head((self.second(y) if x[x > 0.5].numel() > 0 else self.second(y * 2)).flatten(1))


class Steered(Net):
    """A number that is computed of the images before the cut is used after it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).flatten(1)) * float(x.mean())


class SkipAndBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if float(x.sum()) > 0:
            y = y + 1
        return self.head((self.second(y) + y).flatten(1))


class Skip(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.head((self.second(y) + y).flatten(1))


class Shared(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.first(x)).flatten(1))


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.second(x)
        return self.head(self.first(x).flatten(1))


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class WithPairs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = Pairs()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.pairs(self.first(x))
        return self.head((left + right).flatten(1))


class Windows(Net):
    """Windows stand along the batch axis, as in a Swin transformer."""

    def forward(self, x: Tensor) -> Tensor:
        windows = self.first(x.unfold(3, 4, 4).permute(0, 3, 1, 2, 4).flatten(0, 1))
        return self.head(windows.reshape(x.shape[0], -1))


def test_a_client_that_cannot_be_traced_stops_at_the_cut_and_learns() -> None:
    model = Stopped()
    client, server = cut_model(model, "second", SMALL)
    assert server is None
    RAN.clear()
    images = torch.rand(2, *SMALL, requires_grad=True)
    smashed = client(images)
    assert not RAN
    assert torch.equal(smashed, by_hand(model, "second", images.detach())[0])
    smashed.sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0
    assert not any(module._forward_hooks for module in client.modules())


def test_a_size_that_depends_on_the_images_is_not_taken_for_a_constant() -> None:
    assert cut_model(CountsBright(), "second", SMALL)[1] is None
    with pytest.raises(ConfigurationError, match="server would also need another value"):
        cut_model(CountsBright(), "first", SMALL)


def test_noise_is_not_frozen_by_a_cut() -> None:
    client, _ = cut_model(Baked(), "second", SMALL)
    images = torch.rand(2, *SMALL)
    assert not torch.equal(client(images), client(images))
    assert check_client(client, SMALL).randomised
    assert not check_client(cut_model(Baked(), "first", SMALL)[0], SMALL).randomised


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (
            network("resnet18")[0],
            "layr1",
            r"no module of that name; did you mean 'layer1'\? it can be cut after conv1, ",
        ),
        (network("resnet18")[0], "", "no module of that name"),
        (network("resnet18")[0], "layer1.0.relu", "called 2 times in a forward pass"),
        (
            network("resnet18")[0],
            "layer1.0.conv1",
            r"also need maxpool, which add\(\) in layer1\.0 takes, .* after conv1",
        ),
        (Skip(), "second", r"also need relu\(\) in the model, which add\(\) in the model takes"),
        (SkipAndBranch(), "second", "server would also need another value that is computed of the images"),
        (Steered(), "first", "server would also need another value that is computed of the images"),
        (SometimesHeard(), "second", "is not called"),
        (Shared(), "first", "called 2 times"),
        (Auxiliary(), "second", "also need the images, which first takes"),
        (WithPairs(), "pairs", "its output is a tuple, not one tensor"),
        (Windows(), "first", r"maps 4 images to shape \(8, 3, 8, 4\), which does not have the images along its first"),
        (nn.Conv2d(1, 2, 1), "first", r"the model fails on images of shape \(4, 3, 8, 8\): .*it takes \(4, 1, 8, 8\)"),
    ],
)
def test_what_cannot_be_cut_is_explained_in_one_line(model: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        cut_model(model, name, SMALL)
    assert "\n" not in str(caught.value)
    assert name not in cut_names(model, SMALL) if message.startswith(("called", "also need")) else True
