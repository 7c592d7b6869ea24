"""The grammar in which configurations and defenses name an inversion network."""

from __future__ import annotations

import re

from mocosfl_priv.errors import ConfigurationError

GRAMMAR = re.compile(r"(res|conv)_normN(\d+)C(\d+)|(edsr|unet|ressfl)_N(\d+)C(\d+)")


def check_grammar(architecture: str) -> tuple[str, int, int]:
    """Take the name of an inversion network apart; see :func:`mocosfl_priv.inversion.build_decoder`.

    Args:
        architecture: for example ``unet_N2C32``.

    Returns:
        Kind, number of blocks, and channels.

    Raises:
        ConfigurationError: the name is not in the grammar.

    >>> check_grammar("unet_N2C32")
    ('unet', 2, 32)
    """
    match = GRAMMAR.fullmatch(architecture)
    if match is None or int(match[3] or match[6]) < 1:
        raise ConfigurationError(
            f"decoder architecture {architecture!r} is not of the form res_normN<blocks>C<channels>, conv_norm..., "
            "unet_N<blocks>C<channels>, edsr_... or ressfl_..., nor a function of your own, file.py:function"
        )
    kind, blocks, channels = (group for group in match.groups() if group is not None)
    return kind, int(blocks), int(channels)
