from __future__ import annotations

import pytest
import torch
from torch import nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.inversion.arrangement import MOST_WEIGHTS, CoarseImage
from mocosfl_priv.inversion.decoders import ArrangedDecoder, SubPixelDecoder, build_decoder


@pytest.mark.parametrize("architecture", ["res_normN0C8", "res_normN2C6", "conv_normN1C8", "ressfl_N1C8"])
@pytest.mark.parametrize("smashed", [(4, 16, 16), (8, 32, 32), (3, 8, 8)])
def test_decoders_give_images(architecture: str, smashed: tuple[int, int, int]) -> None:
    images = build_decoder(architecture, smashed, (3, 32, 32))(torch.randn(2, *smashed))
    assert images.shape == (2, 3, 32, 32)
    assert float(images.detach().min()) > 0 and float(images.detach().max()) < 1


@pytest.mark.parametrize("architecture", ["edsr_N2C8", "unet_N1C8"])
@pytest.mark.parametrize("smashed", [(4, 16, 16), (8, 32, 32), (3, 8, 8), (6, 1, 1), (5, 2, 2)])
def test_sub_pixel_decoders_give_images_of_any_size(architecture: str, smashed: tuple[int, int, int]) -> None:
    assert build_decoder(architecture, smashed, (3, 32, 32))(torch.randn(2, *smashed)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("architecture", ["edsr_N2C32", "unet_N2C32"])
@pytest.mark.parametrize("smashed", [(3, 16, 16), (12, 8, 8)])
def test_a_linear_beginning_inverts_what_is_linear(architecture: str, smashed: tuple[int, int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(smashed[0], smashed[0], generator=rng))[0]
    fold = nn.PixelUnshuffle(16 // smashed[1])
    known, others = torch.rand(64, 3, 16, 16, generator=rng), torch.rand(8, 3, 16, 16, generator=rng)

    def send(images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("dc,nchw->ndhw", mixing, fold(images)) * 5 + 2

    torch.manual_seed(0)
    decoder = build_decoder(architecture, smashed, (3, 16, 16))
    assert isinstance(decoder, SubPixelDecoder)
    decoder.begin_linear(send(known), known)
    with torch.no_grad():
        assert float((decoder(send(others)) - others).square().mean()) < 1e-5


@pytest.mark.parametrize("architecture", ["edsr_N1C8", "unet_N1C8"])
@pytest.mark.parametrize("smashed", [(64, 16, 16), (24, 32, 32), (6, 1, 1), (5, 2, 2)])
@pytest.mark.parametrize("count", [1, 40])
def test_a_beginning_is_no_worse_than_a_constant_on_what_it_was_made_of(
    architecture: str, smashed: tuple[int, int, int], count: int
) -> None:
    rng = torch.Generator().manual_seed(0)
    images, messages = torch.rand(count, 3, 32, 32, generator=rng), torch.randn(count, *smashed, generator=rng)
    messages[:, 0] = 0  # a dead channel
    decoder = build_decoder(architecture, smashed, (3, 32, 32)).to(memory_format=torch.channels_last)
    assert isinstance(decoder, SubPixelDecoder)
    decoder.begin_linear(messages, images)
    with torch.no_grad():
        error = float((decoder(messages) - images).square().mean())
    assert error <= float((images - images.mean((0, 2, 3), keepdim=True)).square().mean()) * (1 + 1e-5)


def test_the_network_of_the_published_attacks_has_its_size() -> None:
    def block(before: int, after: int) -> int:
        shortcut = before * after + 2 * after if before != after else 0
        return 2 * before + 9 * before * after + after + 2 * after + 9 * after**2 + after + shortcut

    stem = block(4, 64) + 4 * block(64, 64)
    doubling = 9 * 64 * 64 + 64 + 2 * 64
    for smashed, stages in ((32, 2 * block(64, 64)), (16, doubling + block(64, 64)), (4, 3 * doubling)):
        network = build_decoder("ressfl_N4C64", (4, smashed, smashed), (3, 32, 32), "batch")
        assert sum(p.numel() for p in network.parameters()) == stem + stages + block(64, 3)


def test_norm_is_as_asked() -> None:
    batch = build_decoder("res_normN1C8", (4, 16, 16), (3, 32, 32), norm="batch")
    group = build_decoder("res_normN1C8", (4, 16, 16), (3, 32, 32))
    assert any(isinstance(m, nn.BatchNorm2d) for m in batch.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in group.modules())


@pytest.mark.parametrize("architecture", ["resnormN1C8", "res_normN1", "res_normN1C0", "unet_normN1C8", "edsr_N1C0"])
def test_grammar_errors(architecture: str) -> None:
    with pytest.raises(ConfigurationError, match="not of the form"):
        build_decoder(architecture, (4, 16, 16), (3, 32, 32))


@pytest.mark.parametrize("smashed", [(4, 0, 8), (2, 4, 8, 8), ()])
def test_shapes_that_cannot_be_decoded(smashed: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"neither a map \(c, h, w\), nor tokens"):
        build_decoder("res_normN1C8", smashed, (3, 32, 32))


@pytest.mark.parametrize("architecture", ["res_normN0C4", "unet_N1C4"])
@pytest.mark.parametrize("image", [(3, 24, 16), (1, 28, 28), (3, 15, 20)])
@pytest.mark.parametrize(
    "smashed", [(4, 12, 12), (2, 64, 64), (64,), (17, 6), (16, 6), (26, 4), (9, 5), (24, 5), (7, 3), (8, 2, 1)]
)
def test_all_shapes_lead_to_images(architecture: str, image: tuple[int, ...], smashed: tuple[int, ...]) -> None:
    decoder = build_decoder(architecture, smashed, image)
    assert decoder(torch.randn(2, *smashed)).shape == (2, *image)
    if isinstance(decoder, ArrangedDecoder):
        decoder.begin_linear(torch.randn(5, *smashed), torch.rand(5, *image))
        assert bool(decoder(torch.randn(2, *smashed)).isfinite().all())


@pytest.mark.parametrize("smashed", [(16, 6), (17, 6), (40,), (3, 12, 12)])
def test_no_number_of_a_message_is_left_out(smashed: tuple[int, ...]) -> None:
    decoder = build_decoder("edsr_N1C8", smashed, (1, 16, 16))
    assert isinstance(decoder, ArrangedDecoder)
    message = torch.randn(2, *smashed, requires_grad=True)
    maps = decoder.arrange(message)
    weights = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((weights * maps).sum(), message)
    assert bool((gradient != 0).all())


def test_large_vectors_lead_to_coarser_images() -> None:
    layer = CoarseImage(5000, (3, 224, 224))
    assert layer.linear.weight.numel() <= MOST_WEIGHTS
    assert layer.shape == (12, 14, 14)
