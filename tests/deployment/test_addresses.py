"""Hosts and ports as people write them: checked before anything is trained, and found as the system finds them."""

from __future__ import annotations

import datetime
import socket
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("grpc")
pytest.importorskip("onnxruntime")
pytest.importorskip("cryptography")

from packaging.requirements import Requirement

from mocosfl_priv.cli import main
from mocosfl_priv.deployment import certificates
from mocosfl_priv.deployment.certificates import LOOPBACK, make_certificates, require_usable, server_names
from mocosfl_priv.deployment.loopback import free_port
from mocosfl_priv.deployment.reception import Reception
from mocosfl_priv.device.address import HeldPort, parse
from mocosfl_priv.device.client import main as device_main
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.grpc_transport import Certificates, GrpcServer, connect
from mocosfl_priv.device.participant import Device, ShardViews
from mocosfl_priv.device.shard import Shard
from mocosfl_priv.device.transport import ClosedError
from mocosfl_priv.errors import ConfigurationError
from tests.awkward_inputs import case

WRONG = {
    "pc.local": "the port is missing: write HOST:PORT, as in pc.local:7443",
    "": "the port is missing",
    "::1:7443": "the port is missing: .* in brackets",
    "pc.local:99999": "a port is a number from 1 to 65535, not 99999",
    "pc.local:0": "a port is a number",
    "pc.local:-1": "a port is a number",
    "pc.local:http": "a port is a number",
    "pc.local:٣": "a port is a number",
    "https://pc.local:7443": "without https://",
    "pc.local:7443/": "without a path",
    "büro.local:7443": "use xn--bro-hoa.local, or the IP address",
    "my pc:7443": "is neither a host name nor an IP address",
    ":7443": "is neither",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_client_with_a_wrong_address_ends_at_once(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device_main(["--server", text, "--certs", str(tmp_path), "--data", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(DeviceError, match=WRONG[text]):
        parse(text, "--server")
    assert line.startswith(f"mocosfl-priv-client: --server {text}: ")


@given(
    host=st.one_of(st.from_regex(r"[a-z]([a-z0-9]{0,9})(\.[a-z0-9]{1,9}){0,3}", fullmatch=True),
                   st.ip_addresses().map(lambda ip: f"[{ip}]" if ip.version == 6 else str(ip))),
    port=st.integers(-3, 70000),
)  # fmt: skip
def test_every_host_and_port_is_taken_apart_or_refused_in_one_line(host: str, port: int) -> None:
    try:
        found = parse(f"{host}:{port}", "--server")
    except DeviceError as error:
        assert not 1 <= port <= 65535 and "\n" not in str(error)
    else:
        assert (found.host, found.port) == (host.strip("[]"), port) and str(found) == f"{host}:{port}"


@given(st.text(max_size=30))
def test_whatever_is_written_is_an_address_or_one_line(text: str) -> None:
    try:
        found = parse(text, "--listen", listening=True)
    except DeviceError as error:
        assert str(error).startswith(f"--listen {text}: ")
    else:
        assert 0 <= found.port <= 65535


def test_a_busy_port_is_found_at_once_and_a_free_one_held() -> None:
    port = free_port()
    place = parse(f"127.0.0.1:{port}", "--listen", listening=True)
    held = HeldPort(place, "--listen")
    with pytest.raises(DeviceError, match=f"--listen 127.0.0.1:{port}: cannot listen there: Address already in use"):
        HeldPort(place, "--listen")
    with pytest.raises(DeviceError, match="cannot listen"):
        GrpcServer(str(place), None, lambda _: None, most=1, largest_frame=1000)
    held.release()
    server = GrpcServer(str(place), None, lambda _: None, most=1, largest_frame=1000)
    server.start()
    assert server.port == port
    server.stop(0)
    with pytest.raises(DeviceError, match="cannot listen there"):
        HeldPort(parse("192.0.2.1:7443", "--listen", listening=True), "--listen")


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1", "busy"])
def test_serve_refuses_its_port_before_it_trains(
    listen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.setattr("mocosfl_priv.deployment.server.run_plan", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.chdir(tmp_path)
    document = case("photos")
    document["data"] |= {"train_limit": 300, "test_limit": 60}  # type: ignore[operator]
    Path("serve.yaml").write_text(yaml.safe_dump(document))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        if listen == "busy":
            listen = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SystemExit) as ended:
            main(["serve", "serve.yaml", "--out", "out", "--listen", listen, "--plain"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mocosfl-priv:")]
    assert ended.value.code == 2 and len(said) == 1 and f"--listen {listen}" in said[0]
    assert not Path("out").exists()


def test_the_systems_resolver_finds_the_server_and_its_name_is_still_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``--server pc.local:7443``: a name that mDNS knows, and DNS does not."""
    make_certificates(tmp_path, 1, ["pc.local"])
    heard: list[bytes] = []

    def attend(conversation: Any) -> None:
        heard.append(conversation.receive(20))
        conversation.send(b"welcome", 5)

    own = Certificates.read(tmp_path, "server")
    server = GrpcServer("127.0.0.1:0", own, attend, most=2, largest_frame=10_000)
    server.start()
    asked: list[str] = []

    def resolver(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        if not host.endswith(".local"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    device = Certificates.read(tmp_path / "client-0000", "device")
    conversation = connect(f"pc.local:{server.port}", device)
    conversation.send(b"hello", 20)
    assert conversation.receive(20) == b"welcome" and heard == [b"hello"] and asked == ["pc.local"]
    conversation.close()
    other = connect(f"other.local:{server.port}", device)  # leads there as well, but the certificate is not for it
    with pytest.raises(ClosedError, match="unavailable"):
        other.receive(20)
    other.close()
    server.stop(0)
    with pytest.raises(ClosedError, match="host nowhere not found: Name or service not known"):
        connect("nowhere:7443", device)


def test_certificates_are_issued_again_for_another_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def certs(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["certs", "--out", str(tmp_path / "certs"), "--devices", "2", *words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    def names() -> set[str]:
        return set(server_names(tmp_path / "certs")) - set(LOOPBACK)

    assert "for pc.local;" in certs("--host", "pc.local") and names() == {"pc.local"}
    first = (tmp_path / "certs" / "server.pem").read_bytes()
    device = (tmp_path / "certs" / "client-0001" / "device.pem").read_bytes()
    certs("--host", "pc.local")
    assert (tmp_path / "certs" / "server.pem").read_bytes() == first
    said = certs("--host", "192.168.1.10", "--host", "lab.example.org")
    assert names() == {"pc.local", "192.168.1.10", "lab.example.org"}
    assert all(name in said for name in names())
    assert (tmp_path / "certs" / "client-0001" / "device.pem").read_bytes() == device
    require_usable(tmp_path / "certs")


@pytest.mark.parametrize("host", ["https://pc.local", "büro.local", "pc.local:7443", "", "-pc", "a" * 64, "p c"])
def test_what_is_no_host_is_refused_in_one_line(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["certs", "--out", str(tmp_path / "certs"), "--devices", "1", "--host", host])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"mocosfl-priv: certs: --host {host}".rstrip())
    assert not (tmp_path / "certs").exists()


def test_certificates_that_devices_would_refuse_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        make_certificates(tmp_path / name, 1, [])
    require_usable(tmp_path / "one")
    (tmp_path / "one" / "server.key").write_bytes((tmp_path / "two" / "server.key").read_bytes())
    with pytest.raises(ConfigurationError, match=r"server\.key is not the key of server\.pem"):
        require_usable(tmp_path / "one")
    (tmp_path / "two" / "ca.pem").write_bytes((tmp_path / "one" / "ca.pem").read_bytes())
    with pytest.raises(ConfigurationError, match="issued by another authority"):
        require_usable(tmp_path / "two")

    class Clock:
        @staticmethod
        def now(zone: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(zone) - datetime.timedelta(days=900)

    past = types.SimpleNamespace(datetime=Clock, UTC=datetime.UTC, timedelta=datetime.timedelta)
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "datetime", past)
        make_certificates(tmp_path / "old", 1, [])
    with pytest.raises(ConfigurationError, match=r"ca\.pem|server\.pem.* is valid from .* and today is"):
        require_usable(tmp_path / "old")


def test_onnxruntime_is_held_to_what_ran_on_aarch64() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    device = tomllib.loads((root / "mocosfl_priv/device/pyproject.toml").read_text())["project"]["dependencies"]
    server = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["device"]
    for wanted in (device, server):
        mine = [Requirement(text) for text in wanted if text.startswith("onnxruntime")]
        for machine, fits, does_not in (("aarch64", "1.22.1", "1.31.1"), ("x86_64", "1.31.1", "2.0.0")):
            (one,) = [found for found in mine if found.marker and found.marker.evaluate({"platform_machine": machine})]
            assert one.specifier.contains(fits) and not one.specifier.contains(does_not)


def test_a_device_that_comes_back_with_fewer_images_is_named(caplog: pytest.LogCaptureFixture, compute: Any) -> None:
    from mocosfl_priv.deployment.deployment import device_name
    from tests.deployment.devices import deployment, engine, shard_of, training_of

    training = training_of(clients=2)

    def views(client: int, program: Any, welcome: Any) -> ShardViews:
        return ShardViews(shard_of(client, 2), program.settings, welcome.seed, welcome.client, welcome.drop_partial)

    remote = deployment([0, 1], views)
    run = engine(training, compute, remote)
    reception: Reception = remote.reception  # type: ignore[assignment]
    threads: Any = remote._transport
    assert reception.wait_for_idle([0, 1], 2, 20)
    kept = shard_of(1, 2)
    fewer = Shard(kept.images[:5], kept.ids[:5], kept.name)
    again = Device(
        device_name(1), len(fewer),
        lambda program, welcome: ShardViews(fewer, program.settings, welcome.seed, 1, welcome.drop_partial),
    )  # fmt: skip
    import threading

    with caplog.at_level("WARNING"):
        returned = threading.Thread(target=_attend, args=(again, threads.connect(1)), daemon=True)
        returned.start()
        deadline = 200
        while "reconnected" not in caplog.text and deadline:
            threading.Event().wait(0.05)
            deadline -= 1
    ledger = reception.ledger()
    reception.finish()
    remote.close()
    returned.join(20)
    assert f"{device_name(1)} reconnected with 5 images, and had 12 before" in caplog.text
    assert ledger[:, -1].tolist() == [12, 5]
    assert run is not None


def _attend(device: Device, conversation: Any) -> None:
    try:
        device.attend(conversation)
    except ClosedError:
        return


def test_more_devices_than_there_are_are_not_waited_for(tmp_path: Path) -> None:
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.deployment.server import ServeOptions, require_servable

    document = case("photos")
    document["data"] |= {"train_limit": 300, "test_limit": 60}  # type: ignore[operator]
    plan = Experiment.from_dict(document).plan()
    clients = plan.config.training.clients
    for devices, most in ((None, clients), ([0, 2], 2), ([1, 1], 1)):
        require_servable(plan, ServeOptions("127.0.0.1:0", None, devices, least=most))
        with pytest.raises(ConfigurationError, match=f"--least {most + 1} waits for more devices than there are"):
            require_servable(plan, ServeOptions("127.0.0.1:0", None, devices, least=most + 1))


@pytest.mark.parametrize("words", [["--idle", "nan"], ["--idle", "-1"], ["--patience", "nan"], ["--image-size", "0"]])
def test_a_clients_numbers_are_numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert device_main(["--server", "127.0.0.1:9", "--plain", "--data", "x", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mocosfl-priv-client: {words[0]} must ")
