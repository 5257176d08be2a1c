"""Certificates for TLS: the PEM files that QEMU and libvirt have on a host.

Both sides present a certificate of the same authority. The side that listens is not told whom to
expect: it accepts every host to which that authority gave a certificate, as QEMU does.
"""

from __future__ import annotations

import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from mtetool.errors import TlsError, file_error

_QEMU_NAMES = ("{role}-cert.pem", "{role}-key.pem", "ca-cert.pem")
_HINT = "name the directory that has ca-cert.pem, server-cert.pem and server-key.pem: --tls-creds"


@dataclass(frozen=True, slots=True)
class Store:
    """A place of PEM files; `{role}` in their names stands for `server` or `client`."""

    certificate: str
    key: str
    authority: str
    revoked: str

    @classmethod
    def of(cls, directory: Path) -> Store:
        """The files of a directory with the names of QEMU's tls-creds-x509."""
        certificate, key, authority = (str(directory / name) for name in _QEMU_NAMES)
        return cls(certificate, key, authority, str(directory / "ca-crl.pem"))


DEFAULT_STORES = (
    Store.of(Path("/etc/pki/libvirt-migrate")),
    Store.of(Path("/etc/pki/qemu")),
    Store(
        "/etc/pki/libvirt/{role}cert.pem",
        "/etc/pki/libvirt/private/{role}key.pem",
        "/etc/pki/CA/cacert.pem",
        "/etc/pki/CA/cacrl.pem",
    ),
)
"""Where hosts have certificates for migrations, in libvirt's order."""


def context(directory: Path | None, *, listen: bool) -> ssl.SSLContext:
    """Return the context of one side, from the files in a directory or in the first default.

    The side that connects uses the server's certificate if there is none for clients, because
    every host is both. Raises TlsError, PermissionRefusedError, HostError.
    """
    store = _first_store(listen=listen) if directory is None else Store.of(directory)
    role = _role(store, listen=listen) or "server"
    certificate, key = (name.format(role=role) for name in (store.certificate, store.key))
    for path in (store.authority, certificate, key):
        _check(path)
    _check_secret(key)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listen else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    made.verify_mode = ssl.CERT_REQUIRED
    _load(made, certificate, key)
    _trust(made, store.authority)
    if Path(store.revoked).exists():
        _trust(made, store.revoked)
        made.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return made


def _first_store(*, listen: bool) -> Store:
    for store in DEFAULT_STORES:
        if Path(store.authority).exists() and _role(store, listen=listen):
            return store
    places = ", ".join(str(Path(store.certificate).parent) for store in DEFAULT_STORES)
    raise TlsError(f"this host has no certificates in {places}", hint=_HINT)


def _role(store: Store, *, listen: bool) -> str:
    """The certificate to use, `server` or `client`; empty if there is none."""
    roles = ("server",) if listen else ("client", "server")
    found = [role for role in roles if Path(store.certificate.format(role=role)).exists()]
    return found[0] if found else ""


def _check(path: str) -> None:
    """Open a file, so that an error names it: those of OpenSSL do not."""
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except FileNotFoundError as error:
        raise TlsError(f"TLS needs {path}, which does not exist", hint=_HINT, path=path) from error
    except OSError as error:
        raise file_error(error, path) from error


def _check_secret(path: str) -> None:
    if Path(path).stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise TlsError(
            f"everybody on this host may read or change the private key {path}",
            hint=f"take that right away: chmod o= {path}; and consider a new key",
            path=path,
        )


def _load(made: ssl.SSLContext, certificate: str, key: str) -> None:
    def no_password() -> str:
        raise TlsError(
            f"the private key {key} is encrypted", hint="store it decrypted: openssl pkey", path=key
        )

    try:
        made.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        raise TlsError(
            f"{certificate} and {key} cannot be used: {error.reason or error}",
            hint="check that both are PEM files, and that the key is the certificate's",
            path=certificate,
        ) from error


def _trust(made: ssl.SSLContext, path: str) -> None:
    try:
        made.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsError(
            f"{path} cannot be used: {error.reason or error}",
            hint=f"check that it is a PEM file: openssl x509 -noout -text -in {path}",
            path=path,
        ) from error
