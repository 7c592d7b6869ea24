"""A client as a program for devices: ONNX graphs of its forward pass and of its vector-Jacobian product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize, vjp

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.deployment.onnx_rules import DECOMPOSITIONS, RULES
from mocosfl_priv.deployment.recording import Graph, NotTranslatableError, Recorder
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.program import ClientProgram, ClientSettings
from mocosfl_priv.device.runtime import GRADIENT, IMAGE, PARAMETER, PARAMETER_GRADIENT, SMASHED, DeviceClient
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.references import one_line

CHECK_TOLERANCE = 0.01  # relative: what a wrong rule exceeds by far, and rounding does not reach
CHECKED_IMAGES = 5
CHECK_SEED = 0


def client_settings(training: TrainingConfig, trainable: bool) -> ClientSettings:
    """What a device must know of `training`."""
    return ClientSettings(
        trainable=trainable,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        ema=training.ema,
        ema_update=training.ema_update,
        symmetric=training.symmetric,
        paper_gradient=training.paper_gradient,
    )


def export_client(client: nn.Module, image_shape: tuple[int, int, int], settings: ClientSettings) -> ClientProgram:
    """The program with which a device computes what `client` computes, with its present parameters.

    client: images (n, 3, h, w) in [0, 1] to smashed data; unchanged. Graphs take one image: no unit of a client mixes
        images, so a batch is their concatenation and its gradient their sum, and one graph serves every micro-batch.
    The program is run once beside the client, on random images and gradients, before it is handed out.
    Raises ConfigurationError with the reason where the client cannot be exported.
    """
    client = copy.deepcopy(client).cpu().float()
    names = [name for name, _ in client.named_parameters()]
    values = [parameter.detach() for parameter in client.parameters()]
    generator = torch.Generator().manual_seed(CHECK_SEED)
    image = torch.rand((1, *image_shape), generator=generator)

    def forward(image: Tensor, *parameters: Tensor) -> Tensor:
        smashed: Tensor = functional_call(client, dict(zip(names, parameters, strict=True)), (image,))
        return smashed

    def backward(image: Tensor, gradient: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        pull = vjp(lambda *p: forward(image, *p), *parameters)[1]
        gradients: tuple[Tensor, ...] = pull(gradient)
        return gradients

    taken, given = ([prefix + name for name in names] for prefix in (PARAMETER, PARAMETER_GRADIENT))
    try:
        with torch.no_grad():
            smashed = forward(image, *values)
        gradient = torch.randn(smashed.shape, generator=generator)
        program = ClientProgram(
            image_shape,
            _smashed_shape(smashed),
            {name: value.numpy().copy() for name, value in zip(names, values, strict=True)},
            _record(forward, [IMAGE, *taken], (image, *values), [SMASHED]),
            _record(backward, [IMAGE, GRADIENT, *taken], (image, gradient, *values), given)
            if settings.trainable
            else None,
            settings,
        )
        _check(program, client, generator)
    except (ConfigurationError, DeviceError):
        raise
    except NotTranslatableError as error:
        raise ConfigurationError(f"this client cannot be exported: {error}") from error
    except Exception as error:  # a user's unit can fail in any way
        raise ConfigurationError(f"this client cannot be exported: {one_line(error)}") from error
    return program


def _smashed_shape(smashed: Tensor) -> tuple[int, int, int]:
    channels, height, width = smashed.shape[1:]
    return channels, height, width


def _record(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    takes: Sequence[str],
    arguments: Sequence[Tensor],
    gives: Sequence[str],
) -> bytes:
    """`function` as a serialised ONNX model; `functionalize` turns what works in place into new tensors."""
    graph = Graph()
    for name, argument in zip(takes, arguments, strict=True):
        graph.assign(argument, name)
    with Recorder(graph, RULES, DECOMPOSITIONS):
        results = functionalize(function)(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    return graph.model(dict(zip(takes, arguments, strict=True)), dict(zip(gives, results, strict=True)))


def _check(program: ClientProgram, client: nn.Module, generator: torch.Generator) -> None:
    """Compare smashed data and gradients of a few random images with what torch computes.

    Of the gradients most must agree: where a ReLU's input is nothing but rounding, both sides of it are right.
    """
    images = torch.rand((CHECKED_IMAGES, *program.image_shape), generator=generator)
    device = DeviceClient(program)
    errors = []
    for image in images.split(1):
        expected = client(image)
        wrong = _relative_error(device.encode_queries(image.numpy()), expected.detach().numpy(), 0.0)
        if not wrong <= CHECK_TOLERANCE:
            raise ConfigurationError(f"this client cannot be exported: smashed data comes out wrong by {wrong:.0%}")
        if program.settings.trainable:
            gradient = torch.randn(expected.shape, generator=generator)
            errors.append(_gradient_error(device.parameter_gradients(gradient.numpy()), client, expected, gradient))
    if errors and not (error := sorted(errors)[len(errors) // 2])[0] <= CHECK_TOLERANCE:
        raise ConfigurationError(
            f"this client cannot be exported: the gradient of {error[1]} comes out wrong by {error[0]:.0%}"
        )


def _gradient_error(
    found: dict[str, np.ndarray], client: nn.Module, smashed: Tensor, gradient: Tensor
) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and whose it is."""
    named = dict(client.named_parameters())
    computed = torch.autograd.grad(smashed, list(named.values()), gradient, materialize_grads=True)
    expected = {name: value.numpy() for name, value in zip(named, computed, strict=True)}
    # a gradient may be nothing but rounding: that of a bias before a norm, say
    least = CHECK_TOLERANCE * max((float(np.linalg.norm(value)) for value in expected.values()), default=0.0)
    return max(
        ((_relative_error(found[name], value, least), name) for name, value in expected.items()), default=(0, "")
    )


def _relative_error(found: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Distance of two arrays, relative to the length of `expected` or to `least`."""
    distance, length = float(np.linalg.norm(found - expected)), max(float(np.linalg.norm(expected)), least)
    return distance / length if length > 0 else distance
