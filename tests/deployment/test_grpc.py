"""The same conversations over gRPC and mutual TLS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mocosfl_priv.compute import Compute
from mocosfl_priv.deployment.certificates import make_certificates
from mocosfl_priv.device.grpc_transport import Certificates, GrpcServer, connect
from mocosfl_priv.device.transport import Conversation
from tests.deployment.devices import Threads, deployment, engine, shard_views, training_of


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_certificates(folder, 4, [])
    return folder


class OverGrpc(Threads):
    """Devices in threads of this process whose conversations are real connections."""

    folder: Path

    def start(self) -> None:
        own = Certificates.read(self.folder, "server")
        self.server = GrpcServer(
            "127.0.0.1:0", own, self._reception.attend, most=4, largest_frame=self._reception.largest_frame
        )
        self.server.start()
        super().start()

    def connect(self, client: int) -> Conversation:
        folder = self.folder / f"client-{client:04d}"
        return self._spoil(client, connect(f"127.0.0.1:{self.server.port}", Certificates.read(folder, "device")))

    def stop(self) -> None:
        super().stop()
        self.server.stop()


def losses_of(remote, compute: Compute, steps: int = 5) -> list[float]:
    run = engine(training_of(), compute, remote)
    losses = [float(run.step()) for _ in range(steps)]
    run.participants.finish()
    remote.close()
    return losses


def test_losses_over_the_network_are_those_in_process(certificates: Path, compute: Compute) -> None:
    inside = deployment(range(3), shard_views(3))
    expected = losses_of(inside, compute)
    outside = deployment(range(3), shard_views(3), transport=type("T", (OverGrpc,), {"folder": certificates}))
    np.testing.assert_allclose(losses_of(outside, compute), expected, rtol=1e-6)
    assert inside.reception is not None and outside.reception is not None
    for client in range(3):
        mine, theirs = (r.accounts[client].traffic for r in (inside.reception, outside.reception))
        print(mine, theirs)
        assert (mine.payload_sent, mine.payload_received) == (theirs.payload_sent, theirs.payload_received)
