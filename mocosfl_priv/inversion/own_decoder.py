"""A user's own decoder: a function(smashed_shape, image_shape) that returns a torch module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mocosfl_priv.config.decoder_grammar import check_grammar
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.custom_backbone import is_own
from mocosfl_priv.runtime.imports import load_function, one_line

ROWS = 2  # messages of the trial of a decoder


def check_architecture(architecture: str) -> None:
    """Refuse a decoder that does not exist; call it in the constructor of a plugin that takes one.

    Args:
        architecture: a name, see :func:`mocosfl_priv.build_decoder`, or ``file.py:function`` of one's own.

    Raises:
        ConfigurationError: the name is not in the grammar, or the file holds no such function.

    >>> check_architecture("unet_N2C32")
    """
    if is_own(architecture):
        load_function(architecture)
    else:
        check_grammar(architecture)


def check_own_decoder(architecture: str, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:
    """Refuse a decoder of one's own that does not fit, before anything is trained; names in the grammar pass.

    Args:
        architecture: a name, or ``file.py:function``.
        smashed_shape: (c, h, w) of smashed data.
        image_shape: (3, h, w).

    Raises:
        ConfigurationError: the function fails, or its module does not make images of smashed data.

    >>> check_own_decoder("unet_N2C32", (4, 8, 8), (3, 16, 16))
    """
    if is_own(architecture):
        with torch.random.fork_rng():
            build_own_decoder(architecture, smashed_shape, image_shape)


def build_own_decoder(reference: str, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> nn.Module:
    """Call the user's function, and check that a module from smashed data to images comes back.

    Raises ConfigurationError.
    """
    function = load_function(reference)
    smashed, image = tuple(smashed_shape), tuple(image_shape)
    try:
        decoder = function(smashed, image)
    except Exception as error:  # a user's function can fail in any way
        raise ConfigurationError(f"decoder {reference}({smashed}, {image}) failed: {one_line(error)}") from error
    if not isinstance(decoder, nn.Module):
        raise ConfigurationError(f"decoder {reference} must return a torch module, not a {type(decoder).__name__}")
    was_training = decoder.training
    try:
        device = next((parameter.device for parameter in decoder.parameters()), torch.device("cpu"))
        with torch.no_grad():
            images = decoder.eval()(torch.zeros(ROWS, *smashed, device=device))
    except Exception as error:
        raise ConfigurationError(f"decoder {reference} fails on smashed data {smashed}: {one_line(error)}") from error
    finally:
        decoder.train(was_training)
    found = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
    if found != (ROWS, *image):
        raise ConfigurationError(f"decoder {reference} makes {found} of {ROWS} messages {smashed}, not images {image}")
    return decoder
