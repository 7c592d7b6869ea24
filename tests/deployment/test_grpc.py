"""Conversations over gRPC and mutual TLS: with devices in threads, and as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.deployment.certificates import make_certificates
from mocosfl_priv.deployment.deployment import Deployment, device_name
from mocosfl_priv.deployment.loopback import start_client
from mocosfl_priv.deployment.reception import Reception
from mocosfl_priv.deployment.remote_clients import Patience
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.grpc_transport import METHOD, SERVICE, Certificates, GrpcServer, connect
from mocosfl_priv.device.messages import Header, Reason, Register, pack
from mocosfl_priv.device.participant import Device
from mocosfl_priv.device.transport import ClosedError, Conversation
from mocosfl_priv.plugins import DEFENSES, Defense
from mocosfl_priv.runtime.compute import Compute
from tests.deployment.devices import Threads, deployment, engine, shard_of, shard_views, training_of
from tests.deployment.proxy import Proxy

PATIENCE = Patience(answers=20.0, anybody=60.0)
NOISE_SEED = 5


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_certificates(folder, 3, [])
    return folder


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    folder = tmp_path_factory.mktemp("strangers")
    make_certificates(folder, 3, [])
    return folder


def listen(reception: Reception, folder: Path, port: int = 0) -> GrpcServer:
    own = Certificates.read(folder, "server")
    return GrpcServer(f"127.0.0.1:{port}", own, reception.attend, most=4, largest_frame=reception.largest_frame)


class OverGrpc(Threads):
    """Devices in threads of this process whose conversations are real connections, through a proxy that counts."""

    folder: Path

    def start(self) -> None:
        self.server = listen(self._reception, self.folder)
        self.server.start()
        self.proxy = Proxy(self.server.port)
        super().start()

    def connect(self, client: int) -> Conversation:
        own = Certificates.read(self.folder / device_name(client), "device")
        return self._spoil(client, connect(f"127.0.0.1:{self.proxy.port}", own))

    def stop(self) -> None:
        super().stop()
        self.server.stop()
        self.proxy.close()


def over_grpc(folder: Path) -> type[Threads]:
    return type("OverGrpcHere", (OverGrpc,), {"folder": folder})


def losses_of(remote: Deployment, compute: Compute, steps: int = 4) -> list[float]:
    run = engine(training_of(), compute, remote, hooks=noisy())
    losses = [float(run.step()) for _ in range(steps)]
    run.participants.finish()
    remote.close()
    return losses


def noisy() -> Defense:
    """What devices send is clipped and noisy: they must draw the same in threads, over a network, and as processes."""
    return DEFENSES.create(PluginSpec(name="gaussian")).plugin


def reception_of(remote: Deployment) -> Reception:
    assert remote.reception is not None
    return remote.reception


@pytest.fixture(scope="module")
def in_process(compute: Compute) -> tuple[list[float], Reception]:
    """Losses and accounts of the training without any network."""
    remote = deployment(range(3), shard_views(3), patience=PATIENCE, noise_seed=NOISE_SEED)
    return losses_of(remote, compute), reception_of(remote)


def test_losses_over_the_network_are_those_in_process(
    certificates: Path, compute: Compute, in_process: tuple[list[float], Reception]
) -> None:
    transport = over_grpc(certificates)
    remote = deployment(range(3), shard_views(3), transport=transport, patience=PATIENCE, noise_seed=NOISE_SEED)
    np.testing.assert_allclose(losses_of(remote, compute), in_process[0], rtol=1e-6)
    for client, account in reception_of(remote).accounts.items():
        there = in_process[1].accounts[client].traffic
        assert account.traffic.payload_received == there.payload_received
        assert account.traffic.payload_sent == there.payload_sent


def test_the_kernel_counts_what_passes_and_little_of_it_is_overhead(certificates: Path, compute: Compute) -> None:
    """Micro-batches of eight through a bottleneck: one device, so that a proxy counts its bytes alone."""
    remote = deployment([0], shard_views(2), transport=over_grpc(certificates), patience=PATIENCE)
    run = engine(training_of(clients=2, server_batch=16, sync_period=10), compute, remote)
    transport, received = remote._transport, reception_of(remote)
    assert isinstance(transport, OverGrpc)
    counted = []
    for steps in (2, 20):
        for _ in range(steps):
            run.step()
        received.wait_for_idle([0], 1, 10)
        time.sleep(0.3)  # the last gradient is on its way
        traffic = received.idle()[0].dialogue.traffic
        counted.append([transport.proxy.sent, traffic.payload_received, transport.proxy.received, traffic.payload_sent])
    sent, payload_sent, back, payload_back = (after - before for before, after in zip(*counted, strict=True))
    assert payload_sent < sent <= 1.02 * payload_sent
    assert payload_back < back <= 1.02 * payload_back
    run.participants.finish()
    remote.close()
    whole = received.accounts[0].traffic
    assert whole.wire_received is not None and whole.wire_sent is not None
    assert 0 <= transport.proxy.sent - whole.wire_received < 200  # TLS says goodbye after the server has counted
    assert 0 <= transport.proxy.received - whole.wire_sent < 200


@pytest.fixture
def reception(certificates: Path) -> Iterator[tuple[Reception, GrpcServer]]:
    """A server that nobody trains at."""
    from mocosfl_priv.deployment.export import client_settings, export_client
    from mocosfl_priv.deployment.reception import Terms
    from tests.deployment.devices import split_model

    model = split_model()
    program = export_client(model.client, model.image_shape, client_settings(training_of(), True))
    received = Reception(Terms("test", program, 0), {device_name(c): c for c in range(2)}, rows=4)
    server = listen(received, certificates)
    server.start()
    yield received, server
    server.stop(0)


def attempt(conversation: Conversation, name: str) -> ClosedError:
    """Register as `name`; the conversation must end."""
    with pytest.raises(ClosedError) as caught:
        Device(name, 1, shard_views(1)).attend(conversation)  # type: ignore[arg-type] # views are never made
    return caught.value


def test_who_has_no_certificate_of_this_authority_is_not_heard(
    reception: tuple[Reception, GrpcServer], certificates: Path, strangers: Path
) -> None:
    received, server = reception
    address = f"127.0.0.1:{server.port}"
    stranger = Certificates.read(strangers / device_name(0), "device")
    authority = (certificates / "ca.pem").read_bytes()
    believing = Certificates(authority, stranger.certificate, stranger.key)
    for own in (stranger, believing):
        assert "unavailable" in str(attempt(connect(address, own), ""))
    without = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority))
    with pytest.raises(grpc.RpcError) as caught:
        list(without.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b""])))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    without.close()
    assert "unavailable" in str(attempt(connect(address, None), ""))
    assert received.idle() == {}
    assert all(account.conversations == 0 for account in received.accounts.values())


@pytest.mark.parametrize(("own", "claimed"), [(0, "client-0001"), (2, ""), (2, "client-0001"), (0, "nobody")])
def test_a_device_is_who_its_certificate_says(
    own: int, claimed: str, reception: tuple[Reception, GrpcServer], certificates: Path
) -> None:
    received, server = reception
    conversation = connect(f"127.0.0.1:{server.port}", Certificates.read(certificates / device_name(own), "device"))
    assert attempt(conversation, claimed).reason is Reason.WRONG_IDENTITY
    assert received.idle() == {}


@pytest.mark.parametrize(
    ("frame", "status", "reason"),
    [
        (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED"),
        (b"\x08\x07", grpc.StatusCode.FAILED_PRECONDITION, "OTHER_VERSION"),
        (pack(Header("another", "", 0), Register("", 1)), grpc.StatusCode.FAILED_PRECONDITION, "OTHER_RUN"),
        (pack(Header("", "", 3), Register("", 1)), grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_ORDER"),
        (bytes(10**5), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERSIZE"),
        (bytes(10**7), grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
        (pack(Header("", "", 0), Register("client-0001", 1)), grpc.StatusCode.PERMISSION_DENIED, "WRONG_IDENTITY"),
    ],
)
def test_a_refusal_is_a_typed_status(
    frame: bytes, status: grpc.StatusCode, reason: str, reception: tuple[Reception, GrpcServer], certificates: Path
) -> None:
    _, server = reception
    own = Certificates.read(certificates / device_name(0), "device")
    credentials = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
    with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([frame])))
        assert caught.value.code() is status
        assert (caught.value.details() or "").startswith(reason)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "192.168.1.2:1", "example.org:1", ":1", "[::]:1"])
def test_plain_text_stays_on_this_machine(address: str) -> None:
    with pytest.raises(DeviceError, match="loopback addresses only"):
        connect(address, None)
    with pytest.raises(DeviceError, match="loopback addresses only"):
        GrpcServer(address, None, lambda _: None, most=1, largest_frame=1000)


class Processes:
    """Devices as they are: processes that know server, certificate and shard."""

    def __init__(self, reception: Reception, clients: range, folder: Path, certificates: Path) -> None:
        self._reception = reception
        self._clients = clients
        self._folder = folder
        self._certificates = certificates
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self.server = listen(self._reception, self._certificates)
        self.server.start()
        for client in self._clients:
            shard_of(client, len(self._clients)).write(self._folder / f"{client}.shard")
            self.launch(client)

    def launch(self, client: int) -> None:
        self.processes[client] = start_client(
            f"127.0.0.1:{self.server.port}", self._certificates, self._folder / f"{client}.shard", client, self._folder,
            ["--noise-seed", str(NOISE_SEED)],
        )  # fmt: skip

    def stop(self) -> None:
        try:
            for process in self.processes.values():
                assert process.wait(20) == 0
        finally:
            self.server.stop()
            for process in self.processes.values():
                process.kill()
                process.wait()


def test_client_processes_train_as_devices_in_process_and_a_killed_one_comes_back(
    certificates: Path, compute: Compute, in_process: tuple[list[float], Reception], tmp_path: Path
) -> None:
    def open_transport(reception: Reception) -> Processes:
        return Processes(reception, range(3), tmp_path, certificates)

    remote = Deployment("test", 0, range(3), open_transport, patience=PATIENCE, heartbeat_seconds=0.5)
    run = engine(training_of(), compute, remote, hooks=noisy())
    transport = remote._transport
    assert isinstance(transport, Processes)
    losses = [float(run.step()) for _ in range(4)]
    np.testing.assert_allclose(losses, in_process[0], rtol=1e-6)

    os.kill(transport.processes[2].pid, signal.SIGKILL)
    transport.processes[2].wait()
    run.step()
    assert run._pool.tolist() == [0, 1]
    transport.launch(2)
    received = reception_of(remote)
    assert received.wait_for_idle(range(3), 3, 20)
    for _ in range(3):
        assert np.isfinite(float(run.step()))
    assert run._pool.tolist() == [0, 1, 2]
    run.participants.finish()
    remote.close()
    assert received.accounts[2].conversations == 2
    assert received.accounts[0].report.cpu_seconds > 0
    assert 20e6 < received.accounts[0].report.peak_bytes < 200e6
