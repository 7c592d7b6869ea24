"""What an audit needs of a client that a user brings, checked on a copy before anything expensive runs.

The client must run in eval mode on the images' shape, send one finite tensor per batch with the images along its first
axis, and encode each image by itself. Noise of its own is allowed, and found.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import one_line
from mocosfl_priv.runtime.seeding import derive_seed, generator, global_seed

BATCH = 5  # images in a check; a size that is not often that of another axis
RELATIVE_TOLERANCE = 1e-4  # of the largest value; kernels for other batch sizes round differently
OTHER_SIZES = (28, 32, 64, 96, 224)  # heights and widths that are tried when a client fails, to say what it takes

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class CheckedClient:
    """A client that an audit can attack.

    Args:
        client: A copy of the user's client in eval mode: images (n, c, h, w) in [0, 1], float32, to smashed data
            (n, *smashed_shape).
        smashed_shape: Shape of one image's smashed data, without the batch axis.
        randomised: Whether the client adds noise of its own, so that one image is not always encoded alike.
    """

    client: nn.Module
    smashed_shape: tuple[int, ...]
    randomised: bool


def check_client(client: object, image_shape: ImageShape, what: str = "the client") -> CheckedClient:
    """Check that `client` can be audited, and return a copy of it in eval mode; `client` itself is not changed.

    Args:
        client: The user's client, from images (n, c, h, w) in [0, 1], float32, to smashed data.
        image_shape: Channels, height and width of one image.
        what: What messages call the client.

    Returns:
        The copy, the shape of its smashed data, and whether it adds noise of its own.

    Raises:
        ConfigurationError: In one line, where `client` is no torch module, cannot be copied, has weights that are not
            finite, runs in training mode only, fails on this shape, changes its images in place, changes its buffers
            from run to run, or where its output is not one finite floating-point tensor with the images along the
            first axis, or depends on the other images of the batch.
    """
    copied = copy_in_eval_mode(client, what)
    images = probe_images(copied, image_shape, BATCH)
    given = images.clone()
    before = {name: value.clone() for name, value in copied.state_dict().items() if isinstance(value, Tensor)}
    smashed = _require_smashed(first_run(copied, given, what), BATCH, what)
    if not torch.equal(given, images):
        raise ConfigurationError(f"{what} changes the images that it is given, in place: let it work on a copy")
    repeats = same_values(run(copied, images), smashed)
    if not repeats:
        changed = [name for name, value in copied.state_dict().items() if not same_values(value, before.get(name))]
        if changed:
            raise ConfigurationError(
                f"{what} changes {changed[0]} in eval mode, so its output depends on what it was given before"
            )
    randomised = not repeats or not same_values(run(copied, images, seed=1), smashed)
    _require_independence(copied, images, repeats, what)
    try:
        alone = [_require_smashed(run(copied, image), 1, what) for image in (images[:1], images[-1:])]
    except ConfigurationError:
        raise
    except Exception as error:  # a user's module can fail in any way
        raise ConfigurationError(f"{what} fails on a single image: {one_line(error)}{_culprit(copied)}") from error
    if any(one.shape[1:] != smashed.shape[1:] for one in alone):
        raise ConfigurationError(
            f"{what} maps one image to {tuple(alone[0].shape)} and {BATCH} images to {tuple(smashed.shape)}"
        )
    if not randomised and not (_close(alone[0], smashed[:1], smashed) and _close(alone[1], smashed[-1:], smashed)):
        raise _mixes(copied, what)
    return CheckedClient(copied, tuple(smashed.shape[1:]), randomised)


def copy_in_eval_mode(module: object, what: str) -> nn.Module:
    """Return a deep copy of a user's module in eval mode.

    Args:
        module: What the user brought.
        what: What messages call it.

    Returns:
        The copy.

    Raises:
        ConfigurationError: `module` is no torch module, cannot be copied, or has weights that are not finite.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"{what} is a {type(module).__name__}, not a torch module (nn.Module)")
    lazy = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if is_lazy(value)]
    if lazy:
        raise ConfigurationError(f"{what}: {lazy[0]} has no shape before the first batch: run the module once")
    try:
        copied = copy.deepcopy(module).eval()
    except Exception as error:  # a user's module can fail in any way
        raise ConfigurationError(
            f"{what} cannot be copied, and only a copy of it is run, so that yours stays as it is: {one_line(error)}"
        ) from error
    require_finite_weights(copied, what)
    return copied


def require_finite_weights(module: nn.Module, what: str) -> None:
    """Raise ConfigurationError, which names the tensor, if a weight of `module` is not finite.

    Infinities in buffers are allowed: attention masks have them.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise ConfigurationError(f"{what}: weights are not finite: {name}")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise ConfigurationError(f"{what}: weights are not finite: {name}")


def probe_images(module: nn.Module, image_shape: ImageShape, number: int, seed: int = 0) -> Tensor:
    """Draw images (number, *image_shape) uniformly from [0, 1], float32, on the device of `module`."""
    parameter = next(module.parameters(), None)
    images = torch.rand(number, *image_shape, generator=generator(seed, "probe images"))
    return images if parameter is None else images.to(parameter.device)


def run(module: nn.Module, images: Tensor, seed: int = 0) -> object:
    """Run `module` on a copy of `images` without gradients, with the global generators seeded; returns its output."""
    return _run_in_place(module, images.clone(), seed)


def _run_in_place(module: nn.Module, images: Tensor, seed: int = 0) -> object:
    with torch.no_grad(), seeded(seed):
        return module(images)


def first_run(module: nn.Module, images: Tensor, what: str) -> object:
    """Run `module` on `images` themselves, or say in one line why it fails and which shapes were tried.

    Args:
        module: A module in eval mode.
        images: (n, c, h, w), float32; a module that works in place changes them.
        what: What messages call the module.

    Returns:
        The output of the module.

    Raises:
        ConfigurationError: It fails.
    """
    try:
        return _run_in_place(module, images)
    except Exception as error:  # a user's module can fail in any way
        raise _failure(module, images, what, error) from error


def _failure(module: nn.Module, images: Tensor, what: str, error: Exception) -> ConfigurationError:
    number, channels, *size = images.shape
    begin = f"{what} fails on images of shape {tuple(images.shape)}: {one_line(error)}"
    others = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.dtype is not torch.float32}
    if others:
        return ConfigurationError(f"{begin}; images are float32, but it has {'/'.join(sorted(others))} weights")
    training = copy.deepcopy(module).train()
    if _runs(training, images):
        return ConfigurationError(f"{what} runs in training mode only; in eval mode it fails: {one_line(error)}")
    shapes = [(number, 4 - channels, *size)] if channels in (1, 3) else []
    shapes += [(number, channels, side, side) for side in OTHER_SIZES if [side, side] != size]
    fits = [shape for shape in shapes if _runs(module, torch.zeros(shape, device=images.device))]
    found = f"it takes {' and '.join(map(str, fits))}" if fits else "none works"
    return ConfigurationError(f"{begin}; also tried {', '.join(map(str, shapes))}: {found}")


def _runs(module: nn.Module, images: Tensor) -> bool:
    try:
        run(module, images)
    except Exception:  # a user's module can fail in any way
        return False
    return True


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for a block, then restore them."""
    number = derive_seed(seed, "a user's module")
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's module may draw from it
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    try:
        with global_seed(number):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def same_values(first: object, second: object) -> bool:
    """Whether two outputs of a module have the same structure and the same values to the last bit; NaN equals NaN."""
    ours, structure = tree_flatten(first)
    theirs, other = tree_flatten(second)
    return structure == other and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(first: object, second: object) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return type(first) is type(second) and bool(first == second)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(((first == second) | ((first != first) & (second != second))).all())  # noqa: PLR0124 - NaN


def _require_smashed(output: object, number: int, what: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigurationError(f"{what} must send one tensor, not a {type(output).__name__}")
    if not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        raise ConfigurationError(f"{what} must send floating-point numbers, not {kind}")
    if output.dim() < 2 or output.shape[0] != number or output.numel() == 0:
        raise ConfigurationError(
            f"{what} maps {number} images to shape {tuple(output.shape)}; smashed data must have the images along its "
            f"first axis and numbers along others: ({number}, ...)"
        )
    if not bool(output.isfinite().all()):
        raise ConfigurationError(f"{what} maps images in [0, 1] to values that are not finite")
    return output


def _require_independence(client: nn.Module, images: Tensor, repeats: bool, what: str) -> None:
    """Exchange the other images of a batch, with the same seed, so that noise stays the same: nothing may change."""

    def encode(batch: Tensor) -> Tensor:
        # a client with a generator of its own repeats its noise only from a copy
        return _require_smashed(run(client if repeats else copy.deepcopy(client), batch), BATCH, what)

    smashed = encode(images)
    if not repeats and not same_values(encode(images), smashed):
        raise ConfigurationError(
            f"{what} draws noise that no seed repeats: draw it from torch's, NumPy's or Python's global generator"
        )
    for mine in (slice(0, 1), slice(BATCH - 1, BATCH)):
        exchanged = 1 - images
        exchanged[mine] = images[mine]
        if not _close(encode(exchanged)[mine], smashed[mine], smashed):
            raise _mixes(client, what)


def _close(first: Tensor, second: Tensor, scale: Tensor) -> bool:
    tolerance = max(RELATIVE_TOLERANCE, 4 * torch.finfo(scale.dtype).eps) * float(scale.abs().max())
    return float((first - second).abs().max()) <= tolerance


def _mixes(client: nn.Module, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} mixes the images of a batch: what it sends for an image depends on the others{_culprit(client)}"
    )


def _culprit(client: nn.Module) -> str:
    for name, module in client.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return f"; {name or 'it'} is a {type(module).__name__} without running statistics"
    return ""
