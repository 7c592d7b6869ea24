"""A private certificate authority that issues a certificate for the server and one for each device.

A device is identified by the name in its certificate alone; there are no passwords. With the authority's key new
devices can be admitted, so it must stay on the machine that made the certificates.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mocosfl_priv.deployment.deployment import device_name
from mocosfl_priv.device.address import require_host
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.errors import ConfigurationError

SERVER, DEVICE, AUTHORITY = "server", "device", "ca"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
VALID_DAYS = 825  # some TLS libraries reject server certificates that are valid for longer
CLOCK_SKEW = datetime.timedelta(days=1)  # the clock of a Raspberry Pi is wrong until it has a network connection


def make_certificates(folder: Path, devices: int, hosts: Sequence[str]) -> list[Path]:
    """Write a certificate authority, a certificate for the server, and one for each device.

    Writes ``ca.pem``, ``ca.key``, ``server.pem`` and ``server.key`` into `folder`, and per device a folder such as
    ``client-0000`` with ``ca.pem``, ``device.pem`` and ``device.key``, which is all that a device needs.

    An existing authority and existing certificates are kept, so that devices can be added. Only a server certificate
    that lacks one of `hosts` is issued again, for its old and new names; devices need nothing new then.

    Args:
        folder: Where to write; made if needed.
        devices: Number of devices.
        hosts: Host names and IP addresses of the server, besides loopback.

    Returns:
        The folders of the devices.

    Raises:
        ConfigurationError: The folder cannot be used, or a host is neither a valid name nor an IP address.

    """
    try:
        for host in hosts:
            require_host(host, f"certs: --host {host}")
    except DeviceError as error:
        raise ConfigurationError(str(error)) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        authority, key = _authority(folder)
        known = server_names(folder)
        if not known or {_host(host) for host in hosts} - {_host(name) for name in known}:
            names = [*hosts, *(name for name in known if name not in LOOPBACK), *LOOPBACK]
            _write(folder, SERVER, *_signed(authority, key, SERVER, names))
        made = []
        for client in range(devices):
            place = folder / device_name(client)
            made.append(place)
            if not (place / f"{DEVICE}.pem").exists():
                place.mkdir(exist_ok=True)
                _write(place, DEVICE, *_signed(authority, key, device_name(client)))
                (place / f"{AUTHORITY}.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise ConfigurationError(f"certificates: {error.filename} cannot be written: {error.strerror}") from error
    return made


def server_names(folder: Path) -> list[str]:
    """Return the host names and addresses in the server's certificate in `folder`; none if there is no certificate.

    Raises ConfigurationError if the file is not a certificate.
    """
    path = folder / f"{SERVER}.pem"
    if not path.exists():
        return []
    names = _read(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def require_usable(folder: Path) -> None:
    """Raise ConfigurationError unless the server's certificate in `folder` is valid now and fits key and authority."""
    certificate, authority = _read(folder / f"{SERVER}.pem"), _read(folder / f"{AUTHORITY}.pem")
    try:
        key = serialization.load_pem_private_key((folder / f"{SERVER}.key").read_bytes(), None)
        certificate.verify_directly_issued_by(authority)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        reason = "it was issued by another authority" if isinstance(error, InvalidSignature) else error
        raise ConfigurationError(
            f"certificates: the server's certificate in {folder} cannot be used: {reason}"
        ) from error
    if key.public_key() != certificate.public_key():
        raise ConfigurationError(f"certificates: {folder / f'{SERVER}.key'} is not the key of {SERVER}.pem")
    now = datetime.datetime.now(datetime.UTC)
    for name, one in ((SERVER, certificate), (AUTHORITY, authority)):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            raise ConfigurationError(
                f"certificates: {folder / f'{name}.pem'} is valid from {one.not_valid_before_utc:%Y-%m-%d} to "
                f"{one.not_valid_after_utc:%Y-%m-%d}, and today is {now:%Y-%m-%d}: make new ones in another folder"
            )


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"certificates: {path} cannot be read: {getattr(error, 'strerror', error)}") from error


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_file, key_file = folder / f"{AUTHORITY}.pem", folder / f"{AUTHORITY}.key"
    if certificate_file.exists():
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"certificates: the authority in {folder} cannot be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(f"certificates: the authority in {folder} was not made by this command")
        return certificate, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("mocosfl-priv devices")
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder, AUTHORITY, certificate, key)
    return certificate, key


def _signed(
    authority: x509.Certificate, authority_key: ec.EllipticCurvePrivateKey, name: str, hosts: Sequence[str] = ()
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new certificate and key: for the server if hosts are given, or else for a device."""
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_name(name), authority.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    names = [_host(host) for host in dict.fromkeys(hosts)] or [x509.DNSName(name)]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority_key, hashes.SHA256()), key


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs, crl_sign=signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Write certificate and key. The key file is created with permissions for its owner only."""
    block = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(folder / f"{name}.key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(block)
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
