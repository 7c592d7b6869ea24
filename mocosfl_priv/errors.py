"""Errors a user can act on. Each ends the command with one line and a documented exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MocosflPrivError(Exception):
    """Base class of all errors that this package raises on purpose."""

    exit_code = 3


class ConfigurationError(MocosflPrivError):
    """The request cannot be run as written: unknown name, impossible value, unusable data. Exit code 2."""

    exit_code = 2


class ThreatModelError(ConfigurationError):
    """An attack asked for something that the threat model does not grant. Exit code 2."""


class RunFailedError(MocosflPrivError):
    """A valid request failed while running: diverged training, unwritable results. Exit code 3."""

    exit_code = 3


class StorageError(RunFailedError):
    """Results cannot be written to or read from disk, so further computation would be lost. Exit code 3."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt `name`: the closest of the `known` names, or all of them if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigurationError:
    """Return the error for a `name` that is not among the `known` names of this `kind` (such as "attack")."""
    return ConfigurationError(f"unknown {kind} {name!r}; {did_you_mean(name, known)}")
