"""A channel through TLS, with certificates on both sides, and TLS's failures in words.

The ssl module's own sockets know no half-closed connection, and asyncio's transports have more
buffers than a relay wants. An SSLObject on two memory BIOs is TLS without any input or output.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

from mtetool.errors import RelayLostError, TlsError
from mtetool.relay.channel import READ_BYTES, Channel, Data, PlainChannel

_STEP_BYTES = 256 << 10  # is encrypted, or fetched, at once
HANDSHAKE_SECONDS = 10.0

_OURS = "the certificate of {who} is refused: {what}"
_THEIRS = "{who} refuses our certificate: {what}"
_REASONS: dict[str, tuple[str, str]] = {
    "TLSV1_ALERT_UNKNOWN_CA": (
        _THEIRS.replace("{what}", "it does not know the authority that signed it"),
        "use certificates of one authority on both hosts: compare ca-cert.pem",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        _THEIRS.replace("{what}", "it has expired, or the clocks differ"),
        "check the dates: openssl x509 -noout -dates -in …-cert.pem; and: timedatectl",
    ),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": (
        _THEIRS.replace("{what}", "it was revoked"),
        "issue a new certificate for this host",
    ),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": (
        _THEIRS.replace("{what}", "it was issued for another purpose"),
        "give this host a client-cert.pem, or a server-cert.pem that is for clients too",
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        _THEIRS.replace("{what}", "it is not valid for this host"),
        "read what the other end reports",
    ),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": (
        "{who} wants a certificate, and we have presented none",
        "give this host client-cert.pem and client-key.pem: --tls-creds",
    ),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "{who} presented no certificate",
        "give that host client-cert.pem and client-key.pem: --tls-creds",
    ),
    "TLSV1_ALERT_PROTOCOL_VERSION": (
        "{who} and this end have no version of TLS in common",
        "allow TLS 1.2 or 1.3 on both hosts: openssl.cnf, MinProtocol",
    ),
    "UNSUPPORTED_PROTOCOL": (
        "{who} and this end have no version of TLS in common",
        "allow TLS 1.2 or 1.3 on both hosts: openssl.cnf, MinProtocol",
    ),
}
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "RECORD_LAYER_FAILURE")
# X509_V_ERR_…, from openssl/x509_vfy.h
_VERDICTS: dict[int, tuple[str, str]] = {
    9: ("it is not valid yet", "compare the clocks of both hosts: timedatectl"),
    10: ("it has expired", "issue a new one for that host; compare the clocks: timedatectl"),
    18: ("no authority signed it", "use certificates of one authority on both hosts"),
    23: ("it was revoked", "issue a new one for that host"),
    26: (
        "it was issued for another purpose",
        "give that host a client-cert.pem, or a server-cert.pem that is for clients too",
    ),
}
_UNKNOWN_AUTHORITY = (2, 7, 19, 20, 21)
_WRONG_NAME = (62, 64)


class TlsChannel(Channel):
    """A channel whose bytes go through TLS over another, which it owns."""

    def __init__(
        self, inner: PlainChannel, context: ssl.SSLContext, *, listen: bool, hostname: str | None
    ) -> None:
        super().__init__(inner.name)
        self.peer_socket = inner.peer_socket
        self._inner = inner
        self._hostname = hostname
        self._listen = listen
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, listen, hostname)
        self._early = b""
        self._failed: TlsError | RelayLostError | None = None

    async def handshake(self, seconds: float = HANDSHAKE_SECONDS) -> None:
        """Prove both sides to each other. Raises TlsError, RelayLostError; then it is closed."""
        try:
            async with asyncio.timeout(seconds):
                await self._shake_hands()
                if not self._listen:
                    await self._wait_for_a_word()
        except TimeoutError as error:
            self.abort()
            raise TlsError(
                f"{self.name} began no TLS within {seconds:g} seconds",
                hint="check that a relay with tls: is at the other end",
            ) from error
        except TlsError:
            # The other end is to read why.
            with suppress(RelayLostError):
                await self._flush()
            await self._inner.close()
            raise
        except BaseException:
            self.abort()
            raise

    async def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                return await self._flush()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fetch()
            except ssl.SSLError as error:
                raise self._explained(error, in_handshake=True) from error

    async def _wait_for_a_word(self) -> None:
        """Wait until the other end has accepted our certificate.

        In TLS 1.3 the side that connects is done first. What the other end sends next is an alert,
        or the session tickets that follow on success.
        """
        if self._tls.version() != "TLSv1.3":
            return
        await self._fetch()
        try:
            self._early = self._tls.read(READ_BYTES)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise self._explained(error, in_handshake=True) from error

    async def read(self, n: int = READ_BYTES) -> bytes:
        buffer = bytearray(min(n, _STEP_BYTES))
        size = await self.read_into(buffer)
        return bytes(memoryview(buffer)[:size])

    async def read_into(self, buffer: Data) -> int:
        view = memoryview(buffer)
        while not self._early:
            got = self._decrypt(view)
            if got is not None:
                return got
            await self._answer()
            await self._fetch()
        n = min(len(view), len(self._early))
        view[:n], self._early = self._early[:n], self._early[n:]
        return n

    def _decrypt(self, view: memoryview) -> int | None:
        """Read what has arrived; None if that is not a whole record."""
        if self._failed is not None:
            raise self._failed
        n = 0
        try:
            while n < len(view):
                got: int = self._tls.read(len(view) - n, view[n:])  # type: ignore[assignment]
                if not got:
                    return n
                n += got
        except ssl.SSLWantReadError:
            return n or None
        except ssl.SSLZeroReturnError:
            return n
        except ssl.SSLError as error:
            self._failed = self._explained(error)
            if not n:
                raise self._failed from error
        return n

    async def _send_some(self) -> None:
        written = 0
        while self._parts and written < _STEP_BYTES:
            try:
                n = self._tls.write(self._parts[0][:_STEP_BYTES])
            except ssl.SSLError as error:
                raise self._explained(error) from error
            self._sent(n)
            written += n
        await self._flush()

    async def _flush(self) -> None:
        if self._leaving.pending:
            self._inner.write(self._leaving.read())
        await self._inner.drain()

    async def _answer(self) -> None:
        """Send what reading made TLS say, an alert for example.

        A task that is sending sends this as well. To wait for it would mean to read nothing until
        the other end has read all of ours; if it waits in the same way, both wait for ever.
        """
        if self._leaving.pending:
            self._inner.write(self._leaving.read())
            if not self._inner.is_sending:
                await self._inner.drain()

    async def _fetch(self) -> None:
        data = await self._inner.read(_STEP_BYTES)
        if data:
            self._arrived.write(data)
        else:
            self._arrived.write_eof()

    async def half_close(self) -> None:
        await self.drain()
        self._set_aside()
        # It says goodbye first, and then fails because the other end has not said it.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        await self._inner.half_close()

    async def _linger(self) -> None:
        await self._inner._linger()

    def _set_aside(self) -> None:
        """Decrypt all that has arrived: SSL_shutdown would throw it away."""
        parts = [self._early]
        try:
            while data := self._tls.read(_STEP_BYTES):
                parts.append(data)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        except ssl.SSLError as error:
            self._failed = self._explained(error)
        self._early = b"".join(parts)

    def _shut(self, *, abort: bool) -> None:
        self._parts.clear()
        self._inner._shut(abort=abort)

    def _explained(
        self, error: ssl.SSLError, *, in_handshake: bool = False
    ) -> TlsError | RelayLostError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return _verdict(error, self.name, self._hostname)
        if isinstance(error, ssl.SSLEOFError) and in_handshake:
            return TlsError(
                f"{self.name} closed the connection during the TLS handshake",
                hint="read what the other end reports",
            )
        if isinstance(error, ssl.SSLEOFError):
            return RelayLostError(
                f"the connection to {self.name} was cut: it ended without TLS's goodbye",
                hint="look at what the other end reports",
            )
        reason = error.reason or str(error)
        if reason in _NOT_TLS and in_handshake:
            return TlsError(
                f"{self.name} does not speak TLS", hint="use tls: on both sides, or on none"
            )
        text, hint = _REASONS.get(
            reason, ("TLS with {who} failed: " + reason, "read what the other end reports")
        )
        return TlsError(text.format(who=self.name), hint=hint)


def _verdict(error: ssl.SSLCertVerificationError, who: str, hostname: str | None) -> TlsError:
    code = error.verify_code
    if code in _WRONG_NAME:
        what = f"it is not for the name {hostname}"
        hint = "connect by a name or address that it has, or say which: --tls-hostname NAME"
    elif code in _UNKNOWN_AUTHORITY:
        what = "our ca-cert.pem did not sign it"
        hint = "use certificates of one authority on both hosts: compare ca-cert.pem"
    else:
        reason = error.verify_message or str(error)
        what, hint = _VERDICTS.get(code, (reason, "check it: openssl verify -CAfile ca-cert.pem"))
    return TlsError(_OURS.format(who=who, what=what), hint=hint)
