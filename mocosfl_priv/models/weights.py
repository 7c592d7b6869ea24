"""Trained weights from files that others wrote: read without unpickling, and fitted to a network by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.serialization import get_unsafe_globals_in_checkpoint

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import one_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "client", "net", "network", "weights")
# prefixes that DataParallel, torch.compile, MoCo and users' own modules put before every parameter name; of MoCo's two
# encoders, the query encoder is read
PREFIXES = (
    "module.",
    "_orig_mod.",
    "encoder_q.",
    "base_encoder.",
    "backbone.",
    "encoder.",
    "client.",
    "model.",
    "net.",
)
DEEPEST_WRAPPER = 3  # most nested wrappers
KNOWN_PREFIX = re.compile(f"(?:(?:{'|'.join(sorted({p.removesuffix('.') for p in (*PREFIXES, *WRAPPERS)}))})\\.)*")
UNUSED = "num_batches_tracked"  # of BatchNorm, in eval mode; old files do not have it
SHOWN = 3  # most names of one kind in a message


def read_weights_only(path: Path) -> object:
    """Load what torch saved in `path`, onto the CPU: tensors and plain containers of tensors.

    Other objects are never unpickled, since that could run code. Raises ConfigurationError for a file that is missing
    or holds anything else.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # torch raises many kinds of errors for other files
        raise ConfigurationError(
            f"{path}: not a torch file with weights only ({type(error).__name__}{_other_classes(path)}). Pickled "
            "models are not loaded, as that could run code; save the state dict instead: "
            "torch.save(model.state_dict(), file)"
        ) from error


def _other_classes(path: Path) -> str:
    """What a file holds besides weights, such as a model or the options of its training; nothing is unpickled."""
    try:
        found = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file, or one of an older format
        return ""
    return f": it holds {_some(found)}" if found else ""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read the named tensors in a file of torch (``.pt``, ``.pth``, ``.tar``) or of safetensors (``.safetensors``).

    Nothing but tensors and plain containers is unpickled. A wrapper such as ``{"state_dict": ...}`` is removed if it
    has the only state dict in the file. Of several, all are returned, with the key of each and a full stop before its
    names, such as ``client.`` and ``server.``. Other values, such as an epoch or an optimiser's state, are left out.

    Args:
        path: The file. Its ending decides how it is read.

    Returns:
        Tensors on the CPU, of any shape and dtype, by their dotted names.

    Raises:
        ConfigurationError: The file cannot be read, holds a pickled model or no weights, or a tensor is sparse,
            quantised, or without numbers.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            with path.open("rb"):  # the system says best why it cannot be read
                stored: object = load_file(path)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise ConfigurationError(f"{path}: not a safetensors file: {one_line(error)}") from error
    else:
        stored = read_weights_only(path)
    return _named_tensors(stored, str(path))


def load_weights(module: nn.Module, weights: Path | str | Mapping[str, Tensor], *, prefix: str | None = None) -> str:
    """Load trained weights into `module`, in place, as the module's own dtypes; it is unchanged if they do not fit.

    Names must be those of ``module.state_dict()``. Prefixes such as ``module.``, ``_orig_mod.`` and ``encoder_q.``, and
    keys of containers such as ``state_dict.``, are removed if the names then fit; tensors without that prefix are left
    out. Prefixes are added where all names of `module` have them, as those of a compiled or parallel module.
    ``num_batches_tracked`` may be missing.

    Args:
        module: Any module.
        weights: A file for :func:`read_weights`, or a state dict.
        prefix: Load the tensors whose names begin with it, without it, and try no other.

    Returns:
        The prefix that was removed.

    Raises:
        ConfigurationError: In one line: names that are missing or too many, with the prefix that would make them fit;
            shapes that differ; a tensor that is not finite in the module's dtype, or not of floating-point numbers; or
            see :func:`read_weights`.

    >>> from torch import nn
    >>> trained = {f"module.{name}": value for name, value in nn.Linear(2, 2).state_dict().items()}
    >>> load_weights(nn.Linear(2, 2), {"state_dict": trained})
    'module.'
    """
    lazy = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if is_lazy(value)]
    if lazy:
        raise ConfigurationError(f"{lazy[0]} has no shape before the first batch: run the module once, then load")
    if isinstance(weights, Mapping):
        where, state = "the state dict", _named_tensors(weights, "the state dict")
    else:
        where, state = str(weights), read_weights(weights)
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    removed, added = _fitting_prefix(expected.keys(), state.keys(), prefix, where)
    mine = {added + name: value for name, value in without_prefix(state, removed).items()}
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict(_converted(mine, expected, parameters, where), strict=False)  # the names were compared above
    return removed


def require_plain(state: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise ConfigurationError, which names the tensor, unless all are plain: not sparse, not quantised, with numbers.

    where: the file, for the message.
    """
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_quantized:
            raise ConfigurationError(f"{where}: {name} is quantised or sparse: save it as plain float32")
        if value.is_meta:
            raise ConfigurationError(f"{where}: {name} holds no numbers: it was saved from the meta device")


def _named_tensors(stored: object, where: str) -> dict[str, Tensor]:
    """All tensors with names in `stored`, without its wrappers."""
    for _ in range(DEEPEST_WRAPPER):
        if not isinstance(stored, Mapping) or any(isinstance(value, Tensor) for value in stored.values()):
            break
        holders = [key for key, value in stored.items() if any(_flattened(value))]
        if len(holders) != 1 or holders[0] not in WRAPPERS:
            break
        stored = stored[holders[0]]
    state = dict(_flattened(stored))
    if not state:
        raise ConfigurationError(f"{where}: not a state dict of tensors, but a {type(stored).__name__} without any")
    require_plain(state, where)
    return state


def _flattened(stored: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in mappings whose keys are all names; an optimiser's state has numbers as keys."""
    if not isinstance(stored, Mapping) or not all(isinstance(key, str) for key in stored):
        return
    for key, value in stored.items():
        if isinstance(value, Tensor):
            yield prefix + key, value
        else:
            yield from _flattened(value, f"{prefix}{key}.")


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _fitting_prefix(
    expected: Collection[str], names: Collection[str], asked: str | None, where: str
) -> tuple[str, str]:
    """The prefix to remove from `names`, and the one to add, so that they are the `expected` ones."""
    if asked is not None:
        if not any(name.startswith(asked) for name in names):
            raise ConfigurationError(f"{where}: no name begins with {asked!r}; they are {_some(names)}")
        if not _fits(expected, names, asked):
            raise ConfigurationError(f"{where}: {_misfit(expected, names, asked)}")
        return asked, ""
    found = _prefixes(expected, names)
    fitting = [prefix for prefix in found if _fits(expected, names, prefix)]
    known = [prefix for prefix in fitting if KNOWN_PREFIX.fullmatch(prefix)]
    if len(known) > 1:
        raise ConfigurationError(
            f"{where}: several sets of weights fit: say which by prefix={' or '.join(map(repr, known))}"
        )
    if known:
        return known[0], ""
    for added in _common_prefixes(expected):
        inner = [name.removeprefix(added) for name in expected]
        removed = [p for p in _prefixes(inner, names) if KNOWN_PREFIX.fullmatch(p) and _fits(inner, names, p)]
        if len(removed) == 1 and KNOWN_PREFIX.fullmatch(added):
            return removed[0], added
        if len(removed) == 1:
            raise ConfigurationError(
                f"{where}: these are the weights of the module's part {added[:-1]}: load them into that part"
            )
    if fitting:
        hint = f"; it would fit with prefix={' or '.join(map(repr, fitting))}"
        raise ConfigurationError(f"{where}: {_misfit(expected, names, '')}{hint}")
    best = max(found, key=lambda prefix: found[prefix], default="")  # of equally good ones the first
    if best and not KNOWN_PREFIX.fullmatch(best):
        hint = f"; with prefix={best!r}, {found[best]} of {len(expected)} would match"
        raise ConfigurationError(f"{where}: {_misfit(expected, names, '')}{hint}")
    raise ConfigurationError(f"{where}: {_misfit(expected, names, best)}")


def _prefixes(expected: Collection[str], names: Collection[str]) -> Counter[str]:
    """Every prefix without which some of `names` are `expected` ones, and how many of them."""
    found: Counter[str] = Counter()
    wanted = set(expected)
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                found["".join(f"{part}." for part in parts[:start])] += 1
    return found


def _common_prefixes(names: Collection[str]) -> list[str]:
    """The prefixes, each ending in a full stop, that all `names` have."""
    parts = next(iter(names), "").split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(1, len(parts) + 1)]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def _difference(expected: Collection[str], names: Collection[str], prefix: str) -> tuple[list[str], list[str]]:
    """The `expected` names that are missing, and those that are too many, among names with `prefix`."""
    mine = {name.removeprefix(prefix): None for name in names if name.startswith(prefix)}
    missing = [name for name in expected if name not in mine and not name.endswith(UNUSED)]
    return missing, [name for name in mine if name not in expected]


def _fits(expected: Collection[str], names: Collection[str], prefix: str) -> bool:
    return not any(_difference(expected, names, prefix))


def _misfit(expected: Collection[str], names: Collection[str], prefix: str) -> str:
    missing, extra = _difference(expected, names, prefix)
    without = f" without its prefix {prefix!r}" if prefix else ""
    return f"does not fit the module{without}: missing {_some(missing)}; too many {_some(extra)}"


def _some(names: Collection[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more


def _converted(
    mine: Mapping[str, Tensor], expected: Mapping[str, Tensor], parameters: Collection[str], where: str
) -> dict[str, Tensor]:
    """`mine` in the dtypes of `expected`; refused if shapes or kinds of numbers differ or values are not finite."""
    differing = [name for name, value in mine.items() if value.shape != expected[name].shape]
    if differing:
        shapes = [f"{name} is {tuple(mine[name].shape)}, not {tuple(expected[name].shape)}" for name in differing]
        raise ConfigurationError(f"{where}: shapes differ from the module's: {_some(shapes)}")
    converted = {}
    for name, value in mine.items():
        if expected[name].is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ConfigurationError(f"{where}: {name} holds {kind} numbers: save weights as plain float32")
        converted[name] = value.to(expected[name].dtype)
        if not expected[name].is_floating_point():
            continue
        # a buffer may have infinities, as attention masks do; float64 reaches further than float32
        finite = converted[name].isfinite() if name in parameters else ~converted[name].isnan()
        if not bool(finite.all()):
            raise ConfigurationError(f"{where}: weights are not finite: {name}")
    return converted
