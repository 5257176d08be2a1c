"""TLS between relays: both sides prove who they are, and every refusal is a sentence."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest

from mtetool.errors import MtetoolError, RelayLostError, TlsError
from mtetool.relay import certificates
from mtetool.relay.address import Side
from mtetool.relay.certificates import Store
from mtetool.relay.channel import Channel
from mtetool.relay.channels import Opening
from tests.relay.authority import Authority
from tests.relay.opening import Waiting, all_of, opened, run

_LISTEN = "listen:tls:127.0.0.1:0"
_MUCH = bytes(range(256)) * (8 << 12)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca") / "ours")


@pytest.fixture(scope="module")
def good(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a host, with one certificate for both roles."""
    return authority.issue(tmp_path_factory.mktemp("creds") / "good", "server")


async def _pair(server: Path, client: Path, name: str | None = None) -> list[object]:
    """Open both ends; for each, its channel or its error."""
    waiting = Waiting(_LISTEN, Side.RELAY, tls_creds=server)
    opening = Opening(tls_creds=client, tls_hostname=name)
    connecting = opened(await waiting.where, Side.RELAY, opening)
    return list(await asyncio.gather(waiting.task, connecting, return_exceptions=True))


def _refused(server: Path, client: Path, name: str | None = None) -> tuple[TlsError, TlsError]:
    """What both ends say of a handshake that must fail."""
    here, there = run(_pair(server, client, name))
    assert isinstance(here, TlsError)
    assert isinstance(there, TlsError)
    for error in (here, there):
        assert error.hint
        assert "{" not in error.message
    return here, there


async def _good_pair(good: Path) -> tuple[Channel, Channel]:
    here, there = await _pair(good, good)
    assert isinstance(here, Channel)
    assert isinstance(there, Channel)
    return here, there


def test_bytes_go_both_ways_and_each_way_ends(good: Path) -> None:
    async def test() -> None:
        here, there = await _good_pair(good)
        assert here.peer_socket is not None
        here.write(_MUCH[:100], memoryview(_MUCH)[100:])
        there.write(b"back" * 10)
        await there.drain()
        _, data = await asyncio.gather(here.half_close(), all_of(there))
        assert data == _MUCH
        there.write(_MUCH)
        buffer = bytearray(7)
        assert await here.read_into(buffer) == 7
        assert buffer == b"backbac"
        assert await here.read(33) == b"k" + b"back" * 8
        _, data = await asyncio.gather(there.half_close(), all_of(here))
        assert data == _MUCH
        await asyncio.gather(here.close(), there.close())

    run(test())


def test_both_directions_at_once(good: Path) -> None:
    async def test() -> None:
        here, there = await _good_pair(good)
        more = 4 * _MUCH  # than all buffers between them hold
        here.write(more)
        there.write(more)
        _, _, one, other = await asyncio.gather(
            here.half_close(), there.half_close(), all_of(here), all_of(there)
        )
        assert one == other == more
        here.abort()
        there.abort()

    run(test())


def test_our_goodbye_loses_nothing_that_has_arrived(good: Path) -> None:
    """Whole records wait unread, of which one was begun, when we send the end of our direction."""

    async def test() -> None:
        here, there = await _good_pair(good)
        there.write(_MUCH[:100_000])
        await there.drain()
        data = await here.read(10)
        await here.half_close()
        there.write(_MUCH[100_000:])
        _, rest = await asyncio.gather(there.half_close(), all_of(here))
        assert data + rest == _MUCH
        assert await there.read() == b""
        here.abort()
        there.abort()

    run(test())


def test_a_channel_may_be_closed_while_a_task_reads(good: Path) -> None:
    async def test() -> None:
        here, there = await _good_pair(good)
        reading = asyncio.create_task(here.read())
        await asyncio.sleep(0.01)
        here.write(b"last words")
        closing = asyncio.create_task(here.close())
        assert await all_of(there) == b"last words"
        with pytest.raises(RelayLostError, match="it was closed at this end"):
            await reading
        await asyncio.gather(there.close(), closing)

    run(test())


def test_nothing_is_in_clear_text_and_tls_is_new(good: Path) -> None:
    async def test() -> None:
        waiting = Waiting(_LISTEN, Side.RELAY, tls_creds=good)
        port = int((await waiting.where).rpartition(":")[2])
        context = certificates.context(good, listen=False)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="localhost"
        )
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        here = await waiting.task
        here.write(b"x")
        await here.drain()
        assert await reader.read(1) == b"x"
        here.abort()
        writer.close()

    run(test())


def test_a_cut_connection_is_no_clean_end(good: Path) -> None:
    async def test() -> None:
        here, there = await _good_pair(good)
        there.write(b"all there is")
        await there.drain()
        assert there.peer_socket is not None
        there.peer_socket.shutdown(socket.SHUT_WR)
        assert await here.read() == b"all there is"
        with pytest.raises(RelayLostError, match="without TLS's goodbye"):
            await here.read()
        here.abort()
        there.abort()

    run(test())


def test_a_record_that_was_changed_on_the_way(good: Path) -> None:
    async def test() -> None:
        here, there = await _good_pair(good)
        assert there.peer_socket is not None
        there.peer_socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(TlsError, match=r"TLS with .* failed"):
            await here.read()
        here.abort()
        there.abort()

    run(test())


# --- refusals


def test_another_authority(good: Path, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").issue(tmp_path / "creds", "server")
    here, there = _refused(good, other)
    assert "is refused: our ca-cert.pem did not sign it" in there.message
    assert "refuses our certificate: it does not know the authority" in here.message


def test_a_client_of_another_authority(good: Path, tmp_path: Path) -> None:
    """It believes the server, but is not believed."""
    other = Authority(tmp_path / "other").issue(tmp_path / "creds", "server")
    (other / "ca-cert.pem").write_bytes((good / "ca-cert.pem").read_bytes())
    here, there = _refused(good, other)
    assert "the peer of listen:tls:" in here.message
    assert "is refused: our ca-cert.pem did not sign it" in here.message
    assert "refuses our certificate" in there.message


def test_the_name_is_checked_or_said(authority: Authority, good: Path, tmp_path: Path) -> None:
    named = authority.issue(tmp_path / "named", "server", "DNS:far.example")
    here, there = _refused(named, good)
    assert "it is not for the name 127.0.0.1" in there.message
    assert "--tls-hostname" in (there.hint or "")
    assert "refuses our certificate" in here.message
    _, there = _refused(named, good, "near.example")
    assert "it is not for the name near.example" in there.message
    for end in run(_pair(named, good, "far.example")):
        assert isinstance(end, Channel)


def test_expired(authority: Authority, good: Path, tmp_path: Path) -> None:
    old = authority.issue(tmp_path / "old", "server", until="20210101000000Z")
    here, there = _refused(old, good)
    assert "is refused: it has expired" in there.message
    assert "refuses our certificate: it has expired" in here.message
    here, there = _refused(good, old)
    assert "is refused: it has expired" in here.message
    assert "refuses our certificate: it has expired" in there.message


def test_the_wrong_purpose(authority: Authority, good: Path, tmp_path: Path) -> None:
    creds = authority.issue(tmp_path / "creds", "server", purpose="serverAuth")
    here, there = _refused(good, creds)
    assert "it was issued for another purpose" in here.message
    assert "it was issued for another purpose" in there.message
    authority.issue(creds, "client", purpose="clientAuth")
    for end in run(_pair(creds, creds)):
        assert isinstance(end, Channel)


def test_revoked(authority: Authority, good: Path, tmp_path: Path) -> None:
    bad = authority.issue(tmp_path / "bad", "server")
    lists = authority.issue(tmp_path / "lists", "server")
    authority.revoke(bad / "server-cert.pem", lists)
    here, there = _refused(lists, bad)
    assert "is refused: it was revoked" in here.message
    assert "refuses our certificate: it was revoked" in there.message
    for end in run(_pair(lists, good)):
        assert isinstance(end, Channel)


def test_a_client_without_a_certificate(good: Path) -> None:
    async def test() -> None:
        waiting = Waiting(_LISTEN, Side.RELAY, tls_creds=good)
        port = int((await waiting.where).rpartition(":")[2])
        context = ssl.create_default_context(cafile=str(good / "ca-cert.pem"))
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="localhost"
        )
        with pytest.raises(TlsError, match="presented no certificate"):
            await waiting.task
        writer.close()

    run(test())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"mterelay plain text", "does not speak TLS"),
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak TLS"),
        (b"", r"began no TLS within 0\.5 seconds"),
        (None, "closed the connection during the TLS handshake"),
    ],
)
@pytest.mark.parametrize("we_listen", [True, False])
def test_one_who_does_not_speak_tls(
    good: Path, said: bytes | None, message: str, we_listen: bool
) -> None:
    async def test() -> None:
        if we_listen:
            waiting = Waiting(_LISTEN, Side.RELAY, tls_creds=good, handshake_seconds=0.5)
            port = int((await waiting.where).rpartition(":")[2])
            other, task = socket.create_connection(("127.0.0.1", port)), waiting.task
        else:
            with socket.create_server(("127.0.0.1", 0)) as server:
                opening = Opening(tls_creds=good, handshake_seconds=0.5)
                where = f"tls:127.0.0.1:{server.getsockname()[1]}"
                task = asyncio.create_task(opened(where, Side.RELAY, opening))
                other = (await asyncio.to_thread(server.accept))[0]
        with other:
            other.sendall(said or b"")
            if said is None:
                other.shutdown(socket.SHUT_WR)
            with pytest.raises(TlsError, match=message) as caught:
                await task
        assert caught.value.hint

    run(test())


def test_a_stranger_does_not_end_the_wait(good: Path) -> None:
    async def test() -> None:
        refused: list[MtetoolError] = []
        waiting = Waiting(_LISTEN, Side.RELAY, tls_creds=good, on_refused=refused.append)
        where = await waiting.where
        with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.shutdown(socket.SHUT_WR)
            there = await opened(where, Side.RELAY, Opening(tls_creds=good))
        here = await waiting.task
        assert ["does not speak TLS" in error.message for error in refused] == [True]
        here.abort()
        there.abort()

    run(test())


# --- the files


@pytest.fixture
def creds(authority: Authority, tmp_path: Path) -> Path:
    return authority.issue(tmp_path / "creds", "server")


def test_a_key_that_others_may_read(creds: Path) -> None:
    (creds / "server-key.pem").chmod(0o640)
    certificates.context(creds, listen=True)
    (creds / "server-key.pem").chmod(0o604)
    with pytest.raises(TlsError, match="everybody on this host may read") as caught:
        certificates.context(creds, listen=True)
    assert f"chmod o= {creds}/server-key.pem" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize("listen", [True, False])
def test_a_file_that_is_missing_or_no_certificate(creds: Path, name: str, listen: bool) -> None:
    (creds / name).write_text("nonsense")
    with pytest.raises(TlsError, match=f"{name}.* cannot be used"):
        certificates.context(creds, listen=listen)
    (creds / name).unlink()
    with pytest.raises(TlsError, match=f"TLS needs {creds}/{name}, which does not exist"):
        certificates.context(creds, listen=listen)


def test_a_key_of_another_certificate(authority: Authority, creds: Path) -> None:
    authority.issue(creds, "client")
    (creds / "client-key.pem").write_bytes((creds / "server-key.pem").read_bytes())
    with pytest.raises(TlsError, match="KEY_VALUES_MISMATCH"):
        certificates.context(creds, listen=False)


def test_the_places_of_hosts(creds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libvirt = tmp_path / "libvirt"
    (libvirt / "private").mkdir(parents=True)
    store = Store(
        f"{libvirt}/{{role}}cert.pem",
        f"{libvirt}/private/{{role}}key.pem",
        f"{libvirt}/cacert.pem",
        f"{libvirt}/none",
    )
    stores = (Store.of(tmp_path / "none"), store)
    monkeypatch.setattr(certificates, "DEFAULT_STORES", stores)
    with pytest.raises(TlsError, match=r"this host has no certificates in .*/none, .*/libvirt"):
        certificates.context(None, listen=True)
    (creds / "server-cert.pem").rename(libvirt / "servercert.pem")
    (creds / "server-key.pem").rename(libvirt / "private" / "serverkey.pem")
    (creds / "ca-cert.pem").rename(libvirt / "cacert.pem")
    for listen in (True, False):
        assert certificates.context(None, listen=listen).verify_mode is ssl.CERT_REQUIRED


def test_a_host_with_a_client_s_certificate_alone_connects(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    creds = authority.issue(tmp_path / "client", "client")
    monkeypatch.setattr(certificates, "DEFAULT_STORES", (Store.of(creds),))
    assert certificates.context(None, listen=False).verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(TlsError, match="this host has no certificates"):
        certificates.context(None, listen=True)
