"""Certificate authorities for tests, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CONFIG = """
[ca]
default_ca = it
[it]
dir = {here}
database = {here}/index.txt
serial = {here}/serial
new_certs_dir = {here}
certificate = {here}/ca-cert.pem
private_key = {here}/ca-key.pem
default_md = sha256
default_crl_days = 30
policy = any
unique_subject = no
[any]
commonName = supplied
"""
BOTH = "serverAuth,clientAuth"


class Authority:
    """An authority whose files are in a directory, for which it issues certificates."""

    def __init__(self, here: Path) -> None:
        here.mkdir()
        self.here = here
        self._config = here / "ca.cnf"
        self._config.write_text(_CONFIG.format(here=here))
        (here / "index.txt").touch()
        _key(here / "ca-key.pem")
        _openssl(
            *("req", "-x509", "-new", "-key", here / "ca-key.pem", "-subj", f"/CN={here.name}"),
            *("-days", "30", "-out", here / "ca-cert.pem"),
        )

    def issue(
        self,
        directory: Path,
        role: str,
        names: str = "DNS:localhost,IP:127.0.0.1",
        *,
        purpose: str = BOTH,
        until: str = "20991231235959Z",
    ) -> Path:
        """Put a certificate for a role, its key and the authority's into the directory."""
        directory.mkdir(exist_ok=True)
        key, request = directory / f"{role}-key.pem", directory / f"{role}.csr"
        extensions = directory / f"{role}.ext"
        _key(key)
        _openssl("req", "-new", "-key", key, "-subj", f"/CN={role}", "-out", request)
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage={purpose}\n")
        made = directory / f"{role}-cert.pem"
        _openssl(
            *("ca", "-config", self._config, "-batch", "-notext", "-rand_serial"),
            *("-startdate", "20200101000000Z", "-enddate", until),
            *("-extfile", extensions, "-in", request, "-out", made),
        )
        (directory / "ca-cert.pem").write_bytes((self.here / "ca-cert.pem").read_bytes())
        return directory

    def revoke(self, certificate: Path, directory: Path) -> None:
        """Revoke a certificate, and put the list of those revoked into a directory."""
        _openssl("ca", "-config", self._config, "-revoke", certificate)
        _openssl("ca", "-config", self._config, "-gencrl", "-out", directory / "ca-crl.pem")


def _key(path: Path) -> None:
    curve = "ec_paramgen_curve:P-256"
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", curve, "-out", path)
    path.chmod(0o600)


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
