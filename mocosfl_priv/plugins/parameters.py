"""The parameters of a plugin: its constructor's arguments, as a model that checks values, and what they mean."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

_NAMES = r"`?[a-z]\w*`?(?:(?:, and |, | and )`?[a-z]\w*`?)*"


def parameter_model(cls: type) -> type[BaseModel]:
    """Return a pydantic model with a field for each argument of a plugin's constructor, typed as annotated.

    Args:
        cls: the class of an attack or a defense.

    Returns:
        A model that checks and converts values.

    Raises:
        NameError, TypeError: The annotations cannot be read.

    >>> class Mine:
    ...     def __init__(self, rate: float = 0.5) -> None: ...
    >>> parameter_model(Mine)(rate="0.25").rate
    0.25
    """
    signature = inspect.signature(cls)
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    fields: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    return create_model(cls.__name__, __config__=config, **fields)


def parameter_descriptions(cls: type) -> dict[str, str]:
    """Return what the docstring of a plugin, or of a class that it extends, says of each argument of its constructor.

    The docstring has sentences of the form ``rate, keep: what both are. clip: what that is.``, in a paragraph or in an
    ``Args:`` block.

    Args:
        cls: the class of an attack or a defense.

    Returns:
        A text for each argument that is described.

    >>> class Mine:
    ...     '''Drop numbers.
    ...
    ...     rate: share of the numbers.
    ...     '''
    ...     def __init__(self, rate: float = 0.5) -> None: ...
    >>> parameter_descriptions(Mine)
    {'rate': 'share of the numbers.'}
    """
    known = set(inspect.signature(cls).parameters)
    found: dict[str, str] = {}
    for ancestor in cls.__mro__:
        for name, text in _described(inspect.cleandoc(ancestor.__doc__ or ""), known).items():
            found.setdefault(name, text)
    return found


def _described(text: str, known: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split()).removeprefix("Args: ")
        starts = []
        for match in re.finditer(rf"(?:^|(?<=[.;,] ))({_NAMES}): ", line):
            names = re.findall(r"\w+", re.sub(r"\band\b", " ", match[1]))
            if known.issuperset(names):
                starts.append((match, names))
        ends = [*(match.start() for match, _ in starts[1:]), len(line)]
        for (match, names), end in zip(starts, ends, strict=False):  # an end more than starts, where there are none
            for name in names:
                of_several = f"{match[1]}: " if len(names) > 1 else ""
                found.setdefault(name, of_several + line[match.end() : end].strip(" ;,"))
    return found
