"""A user's own split network, or whole network to be cut, as a function returns it.

``my_model.py:split`` refers to a function without arguments. It returns a client, a client and its server, or a whole
network, which is then cut after the modules that the user names.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.client_check import (
    ImageShape,
    check_client,
    copy_in_eval_mode,
    probe_images,
    run,
)
from mocosfl_priv.models.custom_backbone import is_own
from mocosfl_priv.models.cutting import cut_model
from mocosfl_priv.models.initialisation import reinitialised
from mocosfl_priv.runtime.imports import load_function, one_line
from mocosfl_priv.runtime.seeding import global_seed


@dataclass(frozen=True)
class OwnSplit:
    """A user's client, with its server if there is one; both are copies in eval mode.

    Args:
        client: Images (n, c, h, w) in [0, 1], float32, to smashed data (n, *smashed_shape).
        server: Smashed data to the model's output; None if there is none.
        cut: Name of the module after which the model is cut; empty where the user's function returned a client.
        smashed_shape: Shape of one image's smashed data, without the batch axis.
        randomised: Whether the client adds noise of its own.
        image_shape: Channels, height and width of one image.
        source: The network that the client's parameters are from, with the user's own modules.
    """

    client: nn.Module
    server: nn.Module | None
    cut: str
    smashed_shape: tuple[int, ...]
    randomised: bool
    image_shape: ImageShape
    source: nn.Module = field(repr=False)

    def untrained(self, seed: int) -> OwnSplit:
        """Return a split of the same client with new weights, without the server, that holds no trained weights.

        Args:
            seed: Seed of the new weights.

        Raises:
            ConfigurationError: See :meth:`build_untrained`.
        """
        source = self._new_source(seed)
        return replace(self, client=self._with_weights_of(source), server=None, source=source)

    def build_untrained(self, seed: int) -> nn.Module:
        """Build the client with newly initialised weights; the user's function is not called, as it may load weights.

        Args:
            seed: Seed of the new weights.

        Returns:
            A copy of `client` in eval mode. Constants in its buffers are kept.

        Raises:
            ConfigurationError: A parameter of the client would keep its trained values, since no module resets it, or
                its module's ``reset_parameters`` gives these values back.
        """
        return self._with_weights_of(self._new_source(seed))

    def _new_source(self, seed: int) -> nn.Module:
        """`source` with new weights for all parameters of the client."""
        needed = {name for name, _ in self.client.named_parameters(remove_duplicate=False)}
        return reinitialised(self.source, seed, needed)

    def _with_weights_of(self, source: nn.Module) -> nn.Module:
        """A copy of the client with the weights of `source`, which must be others than the trained ones."""
        fresh, client = source.state_dict(), copy.deepcopy(self.client)
        client.load_state_dict({name: fresh.get(name, value) for name, value in client.state_dict().items()})
        for name, trained in self.client.named_parameters():
            varies = trained.numel() > 1 and bool((trained != trained.flatten()[0]).any())
            if varies and torch.equal(client.get_parameter(name), trained):
                raise ConfigurationError(f"no untrained copy: reset_parameters() gives {name} its trained values back")
        return client


def load_own_splits(reference: str, image_shape: ImageShape, cuts: Sequence[str] = ()) -> list[OwnSplit]:
    """Call the user's function, and check and cut what it returns.

    Args:
        reference: ``file.py:function`` or ``package.module:function``; the function takes no arguments. It may also
            name a module that is there.
        image_shape: Channels, height and width of one image.
        cuts: Names of the modules after which a whole network is cut. Without them, what the function returns is a
            client, or a client and a server.

    Returns:
        One split per cut, in the order of `cuts`; one if there are none.

    Raises:
        ConfigurationError: In one line: the function cannot be imported, fails, or returns something else; see
            :func:`cut_model` and :func:`check_client` for what can be wrong with a network.
    """
    return own_splits(_returned(reference), image_shape, cuts, reference)


def own_splits(
    returned: object, image_shape: ImageShape, cuts: Sequence[str] = (), where: str = "the model"
) -> list[OwnSplit]:
    """Check a client, a client and its server, or a whole network, and cut the latter; see :func:`load_own_splits`.

    where: what messages call it.
    """
    twice = [cut for place, cut in enumerate(cuts) if cut in cuts[:place]]
    if twice:
        raise ConfigurationError(f"--cut {twice[0]} stands twice")
    client, server = _pair(returned, where)
    if not cuts:
        checked = check_client(client, image_shape, f"{where}: the client")
        if server is not None:
            server = _checked_server(server, checked.client, image_shape, where)
        return [
            OwnSplit(checked.client, server, "", checked.smashed_shape, checked.randomised, image_shape, checked.client)
        ]
    if isinstance(returned, tuple | list):
        raise ConfigurationError(f"--cut {cuts[0]}: {where} is a client and a server; --cut cuts a whole network")
    whole = copy_in_eval_mode(client, f"{where}: the model")
    return [_cut(whole, cut, image_shape, where) for cut in cuts]


def _cut(model: nn.Module, cut: str, image_shape: ImageShape, reference: str) -> OwnSplit:
    client, server = cut_model(model, cut, image_shape)
    checked = check_client(client, image_shape, f"{reference}: the client cut after {cut}")
    # a traced client has lost the user's own modules, and with them their ways to initialise themselves
    source = checked.client if server is None else model
    return OwnSplit(checked.client, server, cut, checked.smashed_shape, checked.randomised, image_shape, source)


def _returned(reference: str) -> object:
    if not is_own(reference):
        raise ConfigurationError(f"{reference}: name a function as file.py:function or package.module:function")
    function = load_function(reference)
    if isinstance(function, nn.Module):
        return function
    try:
        with global_seed(0, "a user's model"):  # so that weights that it draws are the same in every run
            return function()
    except Exception as error:  # a user's function can fail in any way
        raise ConfigurationError(f"{reference}() failed: {one_line(error)}") from error


def _pair(returned: object, reference: str) -> tuple[nn.Module, object]:
    if isinstance(returned, nn.Module):
        return returned, None
    if isinstance(returned, tuple | list) and len(returned) == 2 and isinstance(returned[0], nn.Module):
        return returned[0], returned[1]
    what = f"a {type(returned).__name__}"
    if isinstance(returned, tuple | list):
        what += f" of {', '.join(type(part).__name__ for part in returned) or 'nothing'}"
    raise ConfigurationError(
        f"{reference} must return a torch module, the client or a whole network, or a client and a server, not {what}"
    )


def _checked_server(server: object, client: nn.Module, image_shape: ImageShape, reference: str) -> nn.Module:
    what = f"{reference}: the server"
    copied = copy_in_eval_mode(server, what)
    smashed = run(client, probe_images(client, image_shape, 2))
    assert isinstance(smashed, Tensor)
    try:
        run(copied, smashed)
    except Exception as error:  # a user's module can fail in any way
        raise ConfigurationError(
            f"{what} fails on the client's smashed data of shape {tuple(smashed.shape)}: {one_line(error)}"
        ) from error
    return copied
