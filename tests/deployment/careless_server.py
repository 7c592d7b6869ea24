"""A server that forgets: ``python -m tests.deployment.careless_server serve ...``, for the endurance test to notice.

A device that comes back without its state gets an untrained client, where it should get what the server has of it. And
a server that is started again goes on at the right step, but with networks of its own that are as untrained.
"""

from __future__ import annotations

import torch

from mocosfl_priv.cli import main
from mocosfl_priv.deployment.reception import Member
from mocosfl_priv.deployment.remote_clients import KEY, ONLINE, VELOCITY, RemoteClients
from mocosfl_priv.training.server import MocoServer
from mocosfl_priv.training.state import State

bring_up_to_date = RemoteClients._bring_up_to_date


def forget_the_client(self: RemoteClients, member: Member) -> bool:
    if not member.has_state:
        untrained = self._reception.terms.program.parameters
        for kind in (ONLINE, KEY, VELOCITY):
            for name, stack in self._rows(kind):
                stack[member.client] = 0 if kind == VELOCITY else torch.from_numpy(untrained[name].copy())
        self._rewritten.add(member.client)
    return bring_up_to_date(self, member)


def forget_the_server(self: MocoServer, state: State) -> None:
    """Instead of load_state()."""


if __name__ == "__main__":
    RemoteClients._bring_up_to_date = forget_the_client  # type: ignore[method-assign]
    MocoServer.load_state = forget_the_server  # type: ignore[method-assign]
    main()
