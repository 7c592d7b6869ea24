"""Fast convolutions and norms against torch's own, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mocosfl_priv.models.convolution import MatmulConvolution, convolve, in_fast_layout, matrix_products, standardise
from mocosfl_priv.models.normalisation import ChannelsLastGroupNorm, GroupNorm, stacked_parameters


def test_standardised_filters_have_zero_mean_and_unit_unbiased_deviation() -> None:
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64) * 4 + 2
    result = standardise(weight)
    expected = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert bool(torch.isfinite(standardise(torch.ones(2, 3, 1, 1))).all())  # constant filters become zero


@given(
    n=st.integers(1, 3), channels=st.integers(1, 4), out=st.integers(1, 5), height=st.integers(3, 7),
    width=st.integers(3, 7), kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 2), seed=st.integers(0, 3),
)  # fmt: skip
def test_a_matrix_product_is_the_convolution(
    n: int, channels: int, out: int, height: int, width: int, kernel: int, stride: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, height, width, dtype=torch.float64, generator=rng).requires_grad_()
    weight = torch.randn(out, channels, kernel, kernel, dtype=torch.float64, generator=rng).requires_grad_()
    padding = kernel // 2
    expected = F.conv2d(x, weight, None, stride, padding)
    returned = torch.randn(expected.shape, dtype=torch.float64, generator=rng)
    gradients = torch.autograd.grad(expected, (x, weight), returned)
    unfolded = MatmulConvolution.apply(x, weight, stride, padding)
    with matrix_products(float("inf")):
        batched = convolve(x, weight, stride, padding, 1)
    for result in (unfolded, batched):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(torch.autograd.grad(result, (x, weight), returned), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_small_maps_in_bfloat16_equal_float32_up_to_rounding(stride: int) -> None:
    x = torch.randn(2, 128, 4, 4).requires_grad_()
    weight = (torch.randn(128, 128, 3, 3) / 34).requires_grad_()
    expected = F.conv2d(x, weight, None, stride, 1)
    returned = torch.randn_like(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = convolve(x, weight, stride, 1, 1)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)
    gradients = torch.autograd.grad(expected, (x, weight), returned)
    for ours, theirs in zip(torch.autograd.grad(result, (x, weight), returned.bfloat16()), gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@given(
    n=st.integers(1, 3), groups=st.integers(1, 3), each=st.integers(1, 4), height=st.integers(1, 8),
    width=st.integers(2, 8), offset=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 3),
)  # fmt: skip
def test_group_norm_is_the_same_in_either_layout(
    n: int, groups: int, each: int, height: int, width: int, offset: float, seed: int
) -> None:
    channels = groups * each
    torch.manual_seed(seed)
    norm = GroupNorm(groups, channels).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    plain = (torch.randn(n, channels, height, width, dtype=torch.float64) + offset).requires_grad_()
    returned = torch.randn(n, channels, height, width, dtype=torch.float64)
    expected = F.group_norm(plain, groups, norm.weight, norm.bias)
    last = plain.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    result = norm(last)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected, (plain, norm.weight, norm.bias), returned)
    for ours, theirs in zip(torch.autograd.grad(result, (last, norm.weight, norm.bias), returned), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 30.0])
def test_group_norm_in_bfloat16_is_as_precise_as_torchs(mean: float) -> None:
    x = (torch.randn(4, 16, 16, 16) + mean).bfloat16()
    exact = F.group_norm(x.double(), 4)
    norm = GroupNorm(4, 16)
    with torch.no_grad():
        torchs = (norm(x).double() - exact).abs().mean()
        ours = (norm(x.contiguous(memory_format=torch.channels_last)).double() - exact).abs().mean()
    assert float(ours) < 3 * float(torchs)


def test_stacked_group_norm_is_each_clients_own() -> None:
    norm = GroupNorm(2, 4).double()
    parameters = {
        "weight": torch.randn(3, 4, dtype=torch.float64).requires_grad_(),
        "bias": torch.randn(3, 4, dtype=torch.float64).requires_grad_(),
    }
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64).requires_grad_()

    def one(own: dict[str, Tensor], images: Tensor) -> Tensor:
        result: Tensor = functional_call(norm, own, (images,))
        return result

    with stacked_parameters():
        result = vmap(one)(parameters, x)
    expected = torch.stack([one({k: v[i] for k, v in parameters.items()}, x[i]) for i in range(3)])
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    returned = torch.randn_like(expected)
    leaves = (x, *parameters.values())
    for ours, theirs in zip(
        torch.autograd.grad(result, leaves, returned), torch.autograd.grad(expected, leaves, returned), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_wide_networks_see_channels_last_and_all_see_the_same_values() -> None:
    for width, last in ((64, True), (16, False)):
        network = torch.nn.Sequential(torch.nn.Conv2d(4, width, 3), torch.nn.Conv2d(width, width, 3))
        maps = torch.rand(2, 4, 8, 8)
        arranged = in_fast_layout(maps, network)
        assert arranged.is_contiguous(memory_format=torch.channels_last) is last
        assert torch.equal(arranged, maps)


def channels_last_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = ChannelsLastGroupNorm.apply(x, weight, bias, 2, 1e-5)
    return y


def test_second_derivatives_are_right() -> None:
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng).requires_grad_()

    last = drawn(2, 4, 3, 3).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradgradcheck(channels_last_norm, (last, drawn(4), drawn(4)))
    assert torch.autograd.gradgradcheck(
        lambda x, weight: MatmulConvolution.apply(x, weight, 2, 1), (drawn(2, 2, 4, 4), drawn(3, 2, 3, 3))
    )


def test_a_gradient_penalty_through_a_client_is_that_of_torchs_own_layers() -> None:
    """The square norm of a Jacobian-vector product, as invertibility penalties and gradient matching differentiate."""
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    ).double()
    theirs = nn.Sequential(ours[0], nn.GroupNorm(2, 8).double(), nn.ReLU(), ours[3])
    theirs[1].load_state_dict(ours[1].state_dict())
    found = []
    for network in (ours.to(memory_format=torch.channels_last), theirs):
        images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        (slope,) = torch.autograd.grad(network(images).square().sum(), images, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [images, *network.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_in_bfloat16_are_refused() -> None:
    x = torch.randn(2, 4, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    (slope,) = torch.autograd.grad(channels_last_norm(x, torch.ones(4), torch.zeros(4)).square().sum(), x)
    assert slope.isfinite().all()
    with pytest.raises(RuntimeError, match=r"second derivatives of GroupNorm need float32.*set compute\.precision"):
        torch.autograd.grad(channels_last_norm(x, torch.ones(4), torch.zeros(4)).square().sum(), x, create_graph=True)


def test_gradients_per_image_by_vmap() -> None:
    norm = GroupNorm(2, 4).double()
    images = torch.randn(3, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()

    def power(image: Tensor) -> Tensor:
        return norm(image.unsqueeze(0)).pow(3).sum()

    each = torch.func.vmap(torch.func.grad(power))(images.detach())
    torch.testing.assert_close(each, torch.autograd.grad(norm(images).pow(3).sum(), images)[0])
