"""Export a client for devices: ONNX graphs of its forward pass and of its vector-Jacobian product.

A defense at the client is part of both graphs. Random numbers that it draws become inputs of the graphs, which the
device draws itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize, vjp

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.deployment.onnx_rules import DECOMPOSITIONS, RULES
from mocosfl_priv.deployment.recording import Graph, NotTranslatableError, Recorder, Redrawn
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.program import ClientProgram, ClientSettings, RandomInput
from mocosfl_priv.device.runtime import (
    GRADIENT,
    IMAGE,
    PARAMETER,
    PARAMETER_GRADIENT,
    SHARE,
    SMASHED,
    DeviceClient,
    draw,
)
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import one_line
from mocosfl_priv.training.hooks import ClientHooks, MessageKind, NoHooks

CHECK_TOLERANCE = 0.01  # relative error; a wrong translation exceeds it by far, and rounding stays below
CHECKED_IMAGES = 5
CHECK_SEED = 0
CHECK_SHARE = 0.5


def client_settings(training: TrainingConfig, trainable: bool) -> ClientSettings:
    """Return the settings of `training` that a device needs; trainable: whether clients learn."""
    return ClientSettings(
        trainable=trainable,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        ema=training.ema,
        ema_update=training.ema_update,
        symmetric=training.symmetric,
        paper_gradient=training.paper_gradient,
    )


def export_client(
    client: nn.Module,
    image_shape: tuple[int, int, int],
    settings: ClientSettings,
    hooks: ClientHooks | None = None,
) -> ClientProgram:
    """Export `client` with its current parameters as a program for devices.

    The graphs take a single image: no unit of a client mixes images, so a batch is processed image by image, and its
    gradient is the sum over images. Before it is returned, the program is compared with `client` and the defense on
    random images and gradients.

    Args:
        client: Maps images (n, 3, h, w) in [0, 1] to smashed data; not changed.
        image_shape: (3, h, w).
        settings: What the device needs to train the client.
        hooks: The defense; its `protect` and `client_loss` become part of the program.

    Raises:
        ConfigurationError: Client or defense cannot be exported, with the reason.

    """
    client = copy.deepcopy(client).cpu().float()
    names = [name for name, _ in client.named_parameters()]
    values = [parameter.detach() for parameter in client.parameters()]
    generator = torch.Generator().manual_seed(CHECK_SEED)
    image = torch.rand((1, *image_shape), generator=generator)
    rng = torch.Generator().manual_seed(CHECK_SEED)
    defended = _Defended(client, hooks or NoHooks(), rng, settings.trainable)
    shares: dict[str, Tensor] = {}

    def forward(image: Tensor, *parameters: Tensor) -> Tensor:
        return defended(image, dict(zip(names, parameters, strict=True)))[0]

    def backward(image: Tensor, gradient: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        share, parameters = rest[: len(shares)], rest[len(shares) :]
        pull = vjp(lambda *p: defended(image, dict(zip(names, p, strict=True)))[: 1 + len(shares)], *parameters)[1]
        gradients: tuple[Tensor, ...] = pull((gradient, *share))
        return gradients

    taken, given = ([prefix + name for name in names] for prefix in (PARAMETER, PARAMETER_GRADIENT))
    try:
        with torch.no_grad():
            sent, loss = defended(image, dict(zip(names, values, strict=True)))
        gradient = torch.randn(sent.shape, generator=generator)
        if loss is not None:
            shares[SHARE] = torch.tensor(CHECK_SHARE)
        graph, random_inputs = _record(forward, [IMAGE, *taken], (image, *values), [SMASHED])
        vjp_graph = None
        if settings.trainable:
            maps = (image, gradient, *shares.values(), *values)
            vjp_graph, drawn_again = _record(backward, [IMAGE, GRADIENT, *shares, *taken], maps, given)
            if drawn_again != random_inputs:
                raise NotTranslatableError(
                    "the defense draws different random numbers in the backward pass than in the forward pass"
                )
        program = ClientProgram(
            image_shape,
            _smashed_shape(sent),
            {name: value.numpy().copy() for name, value in zip(names, values, strict=True)},
            graph,
            vjp_graph,
            settings,
            random_inputs,
            own_loss=loss is not None,
        )
        _check(program, defended, generator, np.random.default_rng)
        if random_inputs:  # once more without noise, because large noise would hide errors of the message
            _check(program, defended, generator, _Silence)
    except (ConfigurationError, DeviceError):
        raise
    except NotTranslatableError as error:
        raise ConfigurationError(f"this client cannot be exported: {error}") from error
    except Exception as error:  # a user's unit can fail in any way
        raise ConfigurationError(f"this client cannot be exported: {one_line(error)}") from error
    return program


@dataclass(frozen=True)
class _Defended:
    """A client with its defense, which draws from `rng`.

    learns: whether the client trains, so that the defense may add a loss.
    """

    client: nn.Module
    hooks: ClientHooks
    rng: torch.Generator
    learns: bool

    def __call__(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the message (n, *smashed_shape) for `images` (n, 3, h, w), and the defense's loss or None.

        parameters: used in place of the client's.
        """
        smashed = functional_call(self.client, parameters or {}, (images,))
        loss = self.hooks.client_loss(images, smashed) if self.learns else None
        return self.hooks.protect(smashed, self.rng, MessageKind.QUERY), loss

    def redrawn(self, images: Tensor, drawn: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same, with `drawn` as the random numbers of the defense."""
        with Redrawn(drawn):
            return self(images)


def _smashed_shape(smashed: Tensor) -> tuple[int, int, int]:
    channels, height, width = smashed.shape[1:]
    return channels, height, width


def _record(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    takes: Sequence[str],
    arguments: Sequence[Tensor],
    gives: Sequence[str],
) -> tuple[bytes, tuple[RandomInput, ...]]:
    """Record `function` as a serialised ONNX model; also returns its random inputs, which follow `takes`.

    `functionalize` replaces in-place operations, which ONNX does not have.
    """
    graph = Graph()
    inputs = dict(zip(takes, arguments, strict=True))
    for name, argument in inputs.items():
        graph.assign(argument, name)
    with Recorder(graph, RULES, DECOMPOSITIONS) as recorder:
        results = functionalize(function)(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    model = graph.model({**inputs, **recorder.drawn}, dict(zip(gives, results, strict=True)))
    return model, tuple(recorder.random_inputs)


class _Silence(np.random.Generator):
    """A generator without randomness: it returns the middle of every distribution."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:  # noqa: ARG002
        """Return zeros."""
        return np.zeros(size, dtype)

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:  # noqa: ARG002
        """Return 0.5 everywhere."""
        return np.full(size, 0.5, dtype)


def _check(
    program: ClientProgram,
    defended: _Defended,
    generator: torch.Generator,
    make_rng: Callable[[int], np.random.Generator],
) -> None:
    """Compare smashed data and gradients of a few random images with what torch computes from equal random numbers.

    The median gradient error must be small. Single gradients may differ: if the input of a ReLU is zero up to rounding,
    both of its gradients are correct.
    """
    images = torch.rand((CHECKED_IMAGES, *program.image_shape), generator=generator)
    device, rng = DeviceClient(program, make_rng(CHECK_SEED)), make_rng(CHECK_SEED)
    errors, sent, drawn, losses = [], [], [], []
    for image in images.split(1):
        drawn.append([torch.from_numpy(value) for value in draw(program.random_inputs, rng).values()])
        expected, loss = defended.redrawn(image, drawn[-1])
        sent.append(device.encode_queries(image.numpy()))
        wrong = _relative_error(sent[-1], expected.detach().numpy(), 0.0)
        if not wrong <= CHECK_TOLERANCE:
            raise ConfigurationError(f"this client cannot be exported: its smashed data are wrong by {wrong:.0%}")
        if loss is not None:
            losses.append(loss.detach())
        if program.settings.trainable:
            gradient = torch.randn(expected.shape, generator=generator)
            found = device.parameter_gradients(gradient.numpy(), CHECK_SHARE)
            objective = (expected * gradient).sum() + (0 if loss is None else CHECK_SHARE * loss)
            errors.append(_gradient_error(found, defended.client, objective))
    if errors and not (error := sorted(errors)[len(errors) // 2])[0] <= CHECK_TOLERANCE:
        raise ConfigurationError(
            f"this client cannot be exported: the gradient of {error[1]} is wrong by {error[0]:.0%}"
        )
    _check_batch(np.concatenate(sent), defended, images, drawn, losses)


def _check_batch(
    found: np.ndarray,
    defended: _Defended,
    images: Tensor,
    drawn: Sequence[Sequence[Tensor]],
    losses: list[Tensor],
) -> None:
    """Check that client and defense treat each image of a batch independently, as graphs of one image do."""
    together, loss = defended.redrawn(images, [torch.cat(each) for each in zip(*drawn, strict=True)])
    wrong = _relative_error(found, together.detach().numpy(), 0.0)
    if not wrong <= CHECK_TOLERANCE:
        raise ConfigurationError(
            f"this client cannot be exported: the message of an image depends on the other images of its batch (it "
            f"changes by {wrong:.0%}), and devices process images one by one"
        )
    alone = torch.stack(losses).mean() if losses else None
    if (loss is None) != (alone is None) or (
        loss is not None
        and alone is not None
        and not torch.isclose(loss.detach(), alone, rtol=CHECK_TOLERANCE, atol=CHECK_TOLERANCE)
    ):
        raise ConfigurationError(
            "this client cannot be exported: the defense's loss is not a mean over images, and devices process images "
            "one by one"
        )


def _gradient_error(found: dict[str, np.ndarray], client: nn.Module, objective: Tensor) -> tuple[float, str]:
    """The largest relative error among the parameters' gradients of `objective`, and the parameter's name."""
    named = dict(client.named_parameters())
    computed = torch.autograd.grad(objective, list(named.values()), materialize_grads=True)
    expected = {name: value.numpy() for name, value in zip(named, computed, strict=True)}
    # some gradients are zero up to rounding, such as that of a bias before a norm
    least = CHECK_TOLERANCE * max((float(np.linalg.norm(value)) for value in expected.values()), default=0.0)
    return max(
        ((_relative_error(found[name], value, least), name) for name, value in expected.items()), default=(0, "")
    )


def _relative_error(found: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Distance of two arrays, relative to the length of `expected` or to `least`."""
    distance, length = float(np.linalg.norm(found - expected)), max(float(np.linalg.norm(expected)), least)
    return distance / length if length > 0 else distance
