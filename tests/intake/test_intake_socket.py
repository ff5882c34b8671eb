"""The Unix socket that trusts who can open it, TLS, and addresses that cannot be had."""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from intake_world import JSON, Decisions, HeldStore, Port, body, payload_bodies

from agent.http.auth import Credential, Guard
from agent.http.server import Options, build_app, serve
from agent.intake import Intake
from agent.store import Store

GUARD = Guard([Credential("admin", "admin-token", scopes=("webhook", "read", "approve"))])


async def decidable(port: Port) -> str:
    """The id of the only incident, which came by TCP."""
    await port.post(body(), headers={**JSON, "Authorization": "Bearer admin-token"})
    (id,) = port.store.state.incidents
    return str(id)


async def test_the_unix_socket_trusts_who_can_open_it(start: Any, held: HeldStore, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    port: Port = await start(held, Options(guard=GUARD), socket=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    id = await decidable(port)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        async with session.get("http://localhost/api/v1/incidents") as answer:
            assert (answer.status, len((await answer.json())["incidents"])) == (200, 1)
        decide = f"http://localhost/api/v1/incidents/{id}/approve"
        async with session.post(decide, data=b'{"digest":"d","who":"ann"}') as answer:
            assert answer.status == 200
        async with session.post("http://localhost/webhook", data=body(), headers=JSON) as answer:
            assert answer.status == 200
    uid = os.geteuid()
    assert port.decisions.asked == [("approve", id, "d", f"ann (uid={uid})", f"cli uid={uid}", "")]
    await port.serving.close()
    assert not path.exists()


async def test_another_user_on_the_socket_is_refused(start: Any, held: HeldStore, monkeypatch: Any) -> None:
    port: Port = await start(held, socket=True)
    monkeypatch.setattr("agent.http.auth.peer_uid", lambda request: 4711)
    connector = aiohttp.UnixConnector(str(port.serving.socket_path))
    async with aiohttp.ClientSession(connector=connector) as session:
        answer = await session.post("http://localhost/api/v1/pause")
        assert (answer.status, (await answer.json())["error"]["path"]) == (403, "")
    assert port.decisions.asked == []


async def test_a_stale_socket_is_replaced_and_a_file_is_not(start: Any, held: HeldStore, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    port: Port = await start(held, socket=True)
    os.link(path, tmp_path / "kept")
    await port.serving.close()
    (tmp_path / "kept").rename(path)
    again: Port = await start(held, socket=True)
    assert again.serving.socket_path == path
    await again.serving.close()
    path.write_text("not a socket")
    with pytest.raises(OSError, match="control socket"):
        await start(held, socket=True)
    assert path.read_text() == "not a socket"


async def test_tls(tmp_path: Path, held: HeldStore, program: Callable[[str], str]) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    store: Any = held
    app = build_app(Intake(store), store, Decisions(), health=dict, metrics=lambda: (b"", ""))
    serving = await serve(app, "127.0.0.1", 0, tls=context)
    trusting = ssl.create_default_context(cafile=str(certificate))
    try:
        async with aiohttp.ClientSession() as session:
            url = f"https://127.0.0.1:{serving.addresses[0][1]}/webhook"
            async with session.post(
                url, data=body(), headers=JSON, ssl=trusting, server_hostname="localhost"
            ) as answer:
                assert answer.status == 200
    finally:
        await serving.close()


async def test_a_port_that_is_taken_is_an_error_and_nothing_listens(start: Any, held: HeldStore) -> None:
    port: Port = await start(held)
    store: Any = held
    app = build_app(Intake(store), store, Decisions(), health=dict, metrics=lambda: (b"", ""))
    with pytest.raises(OSError, match="address already in use"):
        await serve(app, *port.address)


async def test_the_real_store_serves_the_api(start: Any, open_store: Callable[[], Store]) -> None:
    port: Port = await start(open_store())
    await port.post(payload_bodies()["ten_alerts"])
    _, answer = await port.get("/api/v1/incidents")
    assert [len(i["alerts"]) for i in answer["incidents"]] == [10]


async def test_connections_are_bounded_and_the_oldest_gives_way(held: HeldStore, tmp_path: Path) -> None:
    """Heads that never end must not keep out Alertmanager, nor the operator on the Unix socket."""
    app = build_app(
        Intake(cast(Store, held)),
        cast(Store, held),
        Decisions(),
        health=lambda: {"ready": True},
        metrics=lambda: (b"", "text/plain"),
    )
    serving = await serve(app, "127.0.0.1", 0, socket_path=tmp_path / "s.sock", max_connections=8)
    host, port = serving.addresses[0]
    try:
        streams = []
        for _ in range(24):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"POST /webhook HTTP/1.1\r\nHost: x\r\n")
            streams.append((reader, writer))
        async with asyncio.timeout(20):
            for reader, _ in streams[:16]:
                with suppress(ConnectionError):
                    assert await reader.read() == b""
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.post(f"http://{host}:{port}/webhook", data=body(), headers=JSON) as answer:
                    assert answer.status == 200
        local = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "s.sock")))
        async with local, local.get("http://localhost/api/v1/incidents") as answer:
            assert answer.status == 200
        assert not streams[-1][0].at_eof()  # the youngest is still there
        for _, writer in streams:
            writer.close()
    finally:
        await serving.close()
