"""What is sent over the wire: forms, credentials, tenants, TLS; and how much at once."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web
from sources_world import NOTHING, Fake, Query, one, port, request_of

from agent.config import Alertmanager, ClientTls
from agent.reconcile import ReconcileError, _held
from agent.sources import gather
from agent.sources.prometheus import Prometheus, PrometheusSource


async def test_what_is_sent(fake: Fake) -> None:
    config = Prometheus(url=f"{fake.url}/prom/", rate="10s", parameters={"dedup": "true"})
    async with PrometheusSource(config) as source:
        await one(source, "rate(x{$scope}[$rate])", start=1000.5, end=2000.2, step=30, services=("a+b &=", "é"))
    (seen,) = fake.seen
    assert (seen.path, seen.method) == ("/prom/api/v1/query_range", "POST")
    assert seen.form.pop("timeout")
    assert seen.form == {
        "query": 'rate(x{service=~"a\\\\+b &=|é"}[10s])',
        "start": "990.000",
        "end": "1980.000",
        "step": "30.000",
        "dedup": "true",
    }
    assert "Authorization" not in seen.headers


async def test_the_server_is_told_to_give_up_earlier_than_we_do(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        await one(source, deadline=8.0)
    assert 5.0 < float(fake.seen[0].form["timeout"]) <= 7.5


async def test_bearer_token_is_read_each_time(fake: Fake) -> None:
    tokens = iter(["one", "two"])
    async with PrometheusSource(Prometheus(url=fake.url, bearer=lambda: next(tokens))) as source:
        await one(source)
        await one(source)
    assert [s.headers["Authorization"] for s in fake.seen] == ["Bearer one", "Bearer two"]


async def test_a_token_that_cannot_be_read_is_missing(fake: Fake) -> None:
    def unreadable() -> str:
        raise PermissionError(13, "Permission denied", "/run/token")

    async with PrometheusSource(Prometheus(url=fake.url, bearer=unreadable)) as source:
        evidence = await one(source)
    assert evidence.missing is not None
    assert "Permission denied" in evidence.missing
    assert fake.seen == []


async def test_basic_auth(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url, username="médic", password="pä:ss")) as source:
        await one(source)
    assert fake.seen[0].headers["Authorization"] == "Basic bcOpZGljOnDDpDpzcw=="


async def test_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(Prometheus(url="http://x", bearer="hunter2", password="hunter2"))
    with pytest.raises(ValueError, match="credentials do not belong there") as refused:
        PrometheusSource(Prometheus(url="http://user:hunter2@x"))
    assert "hunter2" not in str(refused.value)


TENANTS = [("", "team-a", "team-a"), ("fixed", "team-a", "fixed"), ("", "", None)]


@pytest.mark.parametrize(("configured", "asked", "sent"), TENANTS)
async def test_tenant_header(fake: Fake, configured: str, asked: str, sent: str | None) -> None:
    config = Prometheus(url=fake.url, tenant_header="X-Scope-OrgID", tenant=configured)
    async with PrometheusSource(config) as source:
        await one(source, tenant=asked)
    assert fake.seen[0].headers.get("X-Scope-OrgID") == sent


async def test_without_a_tenant_header_the_tenant_is_not_sent(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        await one(source, tenant="team-a")
    assert "team-a" not in fake.seen[0].headers.values()


@pytest.mark.parametrize("tenant", ["a|b", "a\r\nX: y", "a b", "é", "a" * 151, "a/b"])
async def test_a_tenant_that_could_mean_more_is_not_sent(fake: Fake, tenant: str) -> None:
    async with PrometheusSource(Prometheus(url=fake.url, tenant_header="X-Scope-OrgID")) as source:
        evidence = await one(source, tenant=tenant)
    assert evidence.missing is not None
    assert "cannot be sent" in evidence.missing
    assert fake.seen == []


@pytest.mark.parametrize("url", ["", "prometheus:9090", "ftp://x", "http://", "http://x/?a=b", "http://x#y"])
def test_an_url_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="prometheus url"):
        PrometheusSource(Prometheus(url=url))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory, program: Callable[[str], str]) -> Path:
    """A CA, a server's certificate for 127.0.0.1 and prometheus.test, and a client's."""
    where = tmp_path_factory.mktemp("tls")
    openssl = program("openssl")

    def run(*argv: str) -> None:
        done = subprocess.run([openssl, *argv], cwd=where, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2")
    for name, names in (
        ("server", "IP:127.0.0.1,DNS:prometheus.test"),
        ("client", "DNS:client"),
        ("other", "DNS:other"),
    ):
        (where / "ext").write_text(f"subjectAltName={names}\n")
        run("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run(
            *["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"],
            *["-out", f"{name}.pem", "-days", "2", "-extfile", "ext"],
        )
    return where


@contextlib.asynccontextmanager
async def tls_server(certificates: Path, name: str = "server", client: bool = False) -> AsyncIterator[str]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates / "ca.pem")
    app = web.Application()

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(NOTHING)

    app.router.add_post("/api/v1/query_range", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listen = port()
    await web.TCPSite(runner, "127.0.0.1", listen, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{listen}"
    finally:
        await runner.cleanup()


async def test_tls_with_a_private_ca(certificates: Path) -> None:
    async with tls_server(certificates) as url:
        async with PrometheusSource(Prometheus(url=url, ca_file=certificates / "ca.pem")) as source:
            assert (await one(source)).missing is None
        async with PrometheusSource(Prometheus(url=url)) as source:
            missing = (await one(source)).missing
            assert missing is not None
            assert missing.startswith("TLS with 127.0.0.1:")
        async with PrometheusSource(Prometheus(url=url, insecure_skip_verify=True)) as source:
            assert (await one(source)).missing is None


async def test_tls_names_must_fit(certificates: Path) -> None:
    ca = certificates / "ca.pem"
    async with tls_server(certificates) as url:
        async with PrometheusSource(Prometheus(url=url, ca_file=ca, server_name="prometheus.test")) as source:
            assert (await one(source)).missing is None
        async with PrometheusSource(Prometheus(url=url, ca_file=ca, server_name="elsewhere.test")) as source:
            missing = (await one(source)).missing
            assert missing is not None
            assert "ismatch" in missing
    async with tls_server(certificates, "other") as url, PrometheusSource(Prometheus(url=url, ca_file=ca)) as source:
        assert (await one(source)).missing is not None


async def test_alertmanager_is_asked_under_the_name_that_is_configured(certificates: Path) -> None:
    """The server speaks TLS and knows no alerts: an answer of any status means that the names fitted."""
    async with tls_server(certificates) as url:
        for name, said in (("prometheus.test", r"HTTP 4"), ("elsewhere.test", "no answer.*ismatch")):
            tls = ClientTls(ca_file=certificates / "ca.pem", server_name=name)
            with pytest.raises(ReconcileError, match=said):
                await _held(Alertmanager(url=url, tls=tls))


async def test_client_certificate(certificates: Path) -> None:
    ca = certificates / "ca.pem"
    async with tls_server(certificates, client=True) as url:
        own = {"cert_file": certificates / "client.pem", "key_file": certificates / "client.key"}
        async with PrometheusSource(Prometheus(url=url, ca_file=ca, **own)) as source:
            assert (await one(source)).missing is None
        async with PrometheusSource(Prometheus(url=url, ca_file=ca)) as source:
            assert (await one(source)).missing is not None


async def test_at_most_so_many_requests_are_under_way(fake: Fake) -> None:
    now, most = 0, 0
    full = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            full.set()
        async with asyncio.timeout(20):
            await full.wait()
        await asyncio.sleep(0.005)  # room for a fourth, were there one
        now -= 1
        return web.json_response(NOTHING)

    fake.answer = slow
    queries = tuple(Query(f"q{i}", "up") for i in range(12))
    async with PrometheusSource(Prometheus(url=fake.url, concurrency=3)) as source:
        answers = await source.fetch(request_of(*queries), 20.0)
    assert most == 3
    assert [e.missing for e in answers] == [None] * 12


async def test_a_closed_source_answers_nothing_and_leaks_nothing(fake: Fake) -> None:
    source = PrometheusSource(Prometheus(url=fake.url))
    await source.close()
    assert (await one(source)).missing == "the source prometheus is closed"
    await source.close()


async def test_answers_that_arrived_before_the_deadline_are_kept(fake: Fake) -> None:
    async def some(asked: web.Request) -> web.StreamResponse:
        if (await asked.post())["query"] == "slow":
            await asyncio.sleep(30)
        return web.json_response(NOTHING)

    fake.answer = some
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        quick, slow = await gather([source], request_of(Query("a", "quick"), Query("b", "slow")), 1.0)
    assert quick.missing is None
    assert slow.missing is not None
    assert slow.missing.startswith("timeout after")
