"""What holds for every backbone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.backbones import BACKBONES, build_units
from mocosfl_priv.models.layers import Residual, WeightStandardisedConv2d
from mocosfl_priv.models.resnet import BasicBlock
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.training.clients import ClientBank

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
EVERY_BACKBONE = pytest.mark.parametrize("backbone", sorted(BACKBONES))


def build(cut: int, image_size: int = 32, **settings: object) -> SplitModel:
    torch.manual_seed(0)
    return build_split_model(
        ModelConfig(**{"projector_hidden": 8, "projector_out": 8, **settings}), cut, image_size, MEAN, STD
    )


@EVERY_BACKBONE
def test_every_cut_trains_on_one_image_and_computes_the_uncut_function(backbone: str) -> None:
    image = torch.rand(1, 3, 32, 32)
    whole = build(BACKBONES[backbone].units, backbone=backbone, width=8)
    expected = whole.projector(whole.client(image).mean((2, 3)))
    for cut in range(1, BACKBONES[backbone].units + 1):
        model = build(cut, backbone=backbone, width=8)
        assert len([name for name, _ in model.client.named_children() if name.isdecimal()]) == cut
        output = model.projector(model.trunk(model.client(image)))
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        for part in (model.client, model.trunk, model.projector):
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in part.parameters())


@EVERY_BACKBONE
def test_every_client_trains_in_the_bank_as_it_does_alone(backbone: str) -> None:
    """The deepest client, which has every kind of unit; three clients with weights and images of their own."""
    settings = TrainingConfig(clients=3, learning_rate=0.1)
    client = build(BACKBONES[backbone].units, backbone=backbone, width=8).client.double()
    bank = ClientBank(client, 3, settings)
    alone = [copy.deepcopy(client) for _ in range(3)]
    for index, module in enumerate(alone):
        for name, parameter in module.named_parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
            bank.online[name][index] = parameter.data
    images = torch.rand(3, 1, 3, 32, 32, dtype=torch.float64)
    smashed = bank.encode_queries(torch.arange(3), [1, 1, 1], images.flatten(0, 1)).unflatten(0, (3, 1))
    returned = torch.randn_like(smashed)
    smashed.backward(returned)
    bank.learn(torch.arange(3), torch.full((3,), 0.1, dtype=torch.float64))
    for index, module in enumerate(alone):
        optimiser = torch.optim.SGD(
            module.parameters(), lr=0.1, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        output = module(images[index])
        torch.testing.assert_close(smashed[index], output, rtol=1e-8, atol=1e-10)
        output.backward(returned[index])
        optimiser.step()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(bank.online[name][index], parameter.data, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("backbone", "image_size", "cut", "shape"),
    [
        ("resnet18", 64, 1, (64, 32, 32)),
        ("resnet18", 96, 2, (64, 48, 48)),
        ("resnet18", 224, 1, (64, 112, 112)),
        ("resnet50", 32, 2, (256, 32, 32)),
        ("resnet50", 64, 5, (512, 16, 16)),
        ("vgg13", 32, 2, (64, 32, 32)),
        ("vgg13", 32, 3, (64, 16, 16)),
        ("vgg11", 64, 2, (64, 32, 32)),
        ("vgg11", 96, 1, (64, 96, 96)),
        ("vgg11", 224, 2, (64, 112, 112)),
        ("mobilenetv2", 32, 1, (32, 32, 32)),
        ("mobilenetv2", 32, 2, (16, 32, 32)),
        ("mobilenetv2", 32, 3, (24, 32, 32)),
        ("mobilenetv2", 64, 2, (16, 32, 32)),
        ("mobilenetv2", 96, 3, (24, 24, 24)),
        ("mobilenetv2", 224, 9, (1280, 7, 7)),
        ("vit_tiny", 32, 1, (192, 8, 8)),
        ("vit_tiny", 64, 1, (192, 8, 8)),
        ("vit_tiny", 96, 2, (192, 12, 12)),
        ("vit_tiny", 224, 13, (192, 14, 14)),
    ],
)
def test_smashed_shapes(backbone: str, image_size: int, cut: int, shape: tuple[int, ...]) -> None:
    assert build(cut, image_size, backbone=backbone).smashed_shape == shape


@EVERY_BACKBONE
def test_a_bottleneck_fits_behind_the_first_unit(backbone: str) -> None:
    model = build(1, backbone=backbone, width=8, bottleneck="C4S2")
    side = 4 if backbone == "vit_tiny" else 16
    assert model.smashed_shape == (4, side, side)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if not name.startswith("vgg")])
def test_a_client_without_residuals_has_no_shortcut_and_the_server_keeps_its_own(backbone: str) -> None:
    cut = BACKBONES[backbone].units // 2 + 1
    model, plain = (build(cut, backbone=backbone, width=8, client_residuals=residuals) for residuals in (True, False))
    client_blocks = [m for m in plain.client.modules() if isinstance(m, Residual)]
    server_blocks = [m for m in plain.trunk.modules() if isinstance(m, Residual)]
    assert all(block.shortcut is None for block in client_blocks)
    assert not any(".shortcut" in name for name in plain.client.state_dict())
    assert client_blocks and server_blocks
    shortcuts = sum(isinstance(m, Residual) and m.shortcut is not None for m in model.trunk.modules())
    assert sum(block.shortcut is not None for block in server_blocks) == shortcuts
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(model.client(image), plain.client(image))
    for name, value in plain.client.state_dict().items():  # otherwise the same draw
        assert torch.equal(value, model.client.state_dict()[name])


def test_shortcuts_that_are_not_there_cannot_be_taken_away() -> None:
    with pytest.raises(ConfigurationError, match="vgg11 has no shortcuts to remove"):
        build(1, backbone="vgg11", width=8, client_residuals=False)


def test_a_block_without_shortcut_by_hand() -> None:
    client = build(2, backbone="resnet8", width=8, client_residuals=False).client
    image = torch.rand(1, 3, 32, 32)
    stem, block = client.get_submodule("0"), client.get_submodule("1")
    assert isinstance(block, BasicBlock)
    x = stem((image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
    torch.testing.assert_close(client(image), y)


@pytest.mark.parametrize("backbone", ["resnet8", "resnet50", "vgg11", "mobilenetv2"])
@pytest.mark.parametrize(("norm", "channels_per_group"), [("group", 4), ("layer", None), ("instance", 1)])
def test_norms_and_standardisation_are_as_asked(backbone: str, norm: str, channels_per_group: int | None) -> None:
    model = ModelConfig(backbone=backbone, width=8, norm=norm, weight_standardisation=norm != "layer")
    modules = [m for unit in build_units(model, 32) for m in unit.modules()]
    norms = [m for m in modules if isinstance(m, nn.GroupNorm)]
    assert norms and all(m.num_channels // m.num_groups == (channels_per_group or m.num_channels) for m in norms)
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert {isinstance(m, WeightStandardisedConv2d) for m in convolutions} == {norm != "layer"}


def test_batch_norm_is_refused_with_its_reason_or_mended() -> None:
    with pytest.raises(ConfigurationError) as caught:
        build(1, backbone="resnet8", norm="batch")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("model.norm: batch", "0.bn1: BatchNorm2d mixes the images", "(and 8 more)", "model.mend_norms: true"):
        assert part in message
    mended = build(1, backbone="resnet8", norm="batch", mend_norms=True)
    image = torch.rand(1, 3, 32, 32)

    def features(model: SplitModel) -> Tensor:
        return model.trunk(model.client(image))

    torch.testing.assert_close(features(mended), features(build(1, backbone="resnet8")))


@pytest.mark.parametrize(
    ("backbone", "image_size", "message"),
    [
        ("vgg11", 16, r"unit 13 \(MaxPool2d\) of vgg11 cannot process .*\(1, 512, 1, 1\), at data.image_size 16"),
        ("vit_tiny", 50, "patches of 8 pixels do not tile images of 50"),
    ],
)
def test_image_sizes_that_do_not_fit(backbone: str, image_size: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(1, image_size, backbone=backbone)
