"""A server that forgets: ``python -m tests.deployment.careless_server serve ...``, for the endurance test to notice.

A device that comes back without its state gets an untrained client, where it should get what the server has of it.
"""

from __future__ import annotations

import torch

from mocosfl_priv.cli import main
from mocosfl_priv.deployment.reception import Member
from mocosfl_priv.deployment.remote_clients import KEY, ONLINE, VELOCITY, RemoteClients

bring_up_to_date = RemoteClients._bring_up_to_date


def forget(self: RemoteClients, member: Member) -> bool:
    if not member.has_state:
        untrained = self._reception.terms.program.parameters
        for kind in (ONLINE, KEY, VELOCITY):
            for name, stack in self._rows(kind):
                stack[member.client] = 0 if kind == VELOCITY else torch.from_numpy(untrained[name].copy())
        self._rewritten.add(member.client)
    return bring_up_to_date(self, member)


if __name__ == "__main__":
    RemoteClients._bring_up_to_date = forget  # type: ignore[method-assign]
    main()
