"""A real nginx and a real HAProxy: reloads, backlogs, drains, certificates; each undone and each refused."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from actions_servers import (
    carry_out,
    checked,
    directory,
    do,
    free_port,
    listens,
    one_step,
    plan_for,
    refused,
    running,
    until,
    with_option,
)  # fmt: skip

from actions.model import Plan, Refusal
from agent.packs import load_packs

NGINX = """
{user}pid {dir}/pid;
error_log {dir}/error.log;
worker_processes 2;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;
    uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
    upstream shop {{
        server 127.0.0.1:{a};
        server 127.0.0.1:{b} weight=2;
        server 127.0.0.1:{c} down;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "first\\n"; }}
        location /shop {{ proxy_pass http://shop/; }}
    }}
    server {{
        listen 127.0.0.1:{tls} ssl;
        ssl_certificate {dir}/cert.pem;
        ssl_certificate_key {dir}/key.pem;
    }}
    server {{ listen 127.0.0.1:{a}; location / {{ return 200 "a"; }} }}
    server {{ listen 127.0.0.1:{b}; location / {{ return 200 "b"; }} }}
}}
"""


def certificate(directory: Path, name: str, days: int = 30) -> None:
    """A self-signed pair in `NAME-cert.pem` and `NAME-key.pem`; with days -1 it ended yesterday."""
    key, request, cert = (directory / f"{name}-{kind}.pem" for kind in ("key", "request", "cert"))
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}"]
    sign = ["x509", "-req", "-in", request, "-signkey", key, "-days", str(days), "-out", cert]
    for argv in ([*new, "-keyout", key, "-out", request], sign):
        subprocess.run(["openssl", *argv], check=True, capture_output=True)


def install(directory: Path, cert: str, key: str) -> None:
    for kind, name in (("cert", cert), ("key", key)):
        (directory / f"{kind}.pem").write_bytes((directory / f"{name}-{kind}.pem").read_bytes())


@dataclass
class Nginx:
    dir: Path
    port: int
    tls: int
    a: int
    b: int

    @property
    def conf(self) -> Path:
        return self.dir / "nginx.conf"

    @property
    def entry(self) -> dict[str, str]:
        return {
            "nginx_conf": str(self.conf), "nginx_pid_file": f"{self.dir}/pid", "listen_port": str(self.port),
            "upstream": "shop", "certificate": f"{self.dir}/cert.pem", "certificate_key": f"{self.dir}/key.pem",
            "tls_address": f"127.0.0.1:{self.tls}",
        }  # fmt: skip

    def get(self, path: str = "/") -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def served(self) -> str:
        der = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", self.tls), timeout=5))
        return hashlib.sha256(der).hexdigest()


def backlog(port: int) -> int:
    """What the kernel allows of connections that wait to be accepted (ss shows it as Send-Q)."""
    rows = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout.splitlines()
    return next(int(r.split()[2]) for r in rows if r.split()[3].endswith(f":{port}"))


@pytest.fixture(scope="module")
def nginx_server(program: Callable[..., str]) -> Iterator[Nginx]:
    binary = program("nginx", "nginx-light")
    program("openssl"), program("ss", "iproute2")
    with directory("nginx") as home:
        made = Nginx(home, free_port(), free_port(), free_port(), free_port())
        user = "user root;\n" if home.stat().st_uid == 0 else ""
        for name in ("old", "new"):
            certificate(home, name)
        install(home, "old", "old")
        text = NGINX.format(dir=home, user=user, port=made.port, tls=made.tls, a=made.a, b=made.b, c=free_port())
        made.conf.write_text(text)
        argv = [binary, "-c", made.conf, "-g", "daemon off;"]
        with running(argv, lambda: listens(made.port) and (home / "pid").exists(), log=home / "log"):
            yield made


@pytest.fixture
def nginx(nginx_server: Nginx) -> Iterator[Nginx]:
    text = nginx_server.conf.read_text()
    yield nginx_server
    nginx_server.conf.write_text(text)


async def test_nginx_is_reloaded_once_its_configuration_is_sound(nginx: Nginx) -> None:
    assert nginx.get() == "first\n"
    nginx.conf.write_text(nginx.conf.read_text().replace("first", "second"))
    step = await one_step("nginx.reload", nginx.entry)
    assert await checked(step) == 1
    assert (await do(step.argv, step)).ok
    assert nginx.get() == "second\n"
    assert await checked(step) == 0
    nginx.conf.write_text(nginx.conf.read_text().replace("second", "third").replace("http {", "htttp {"))
    result = await do(step.argv, step)
    assert result.exit_code == 93
    assert "htttp" in result.stdout
    assert nginx.get() == "second\n"


async def test_another_process_behind_the_pid_file_is_refused(nginx: Nginx) -> None:
    step = await one_step("nginx.reload", nginx.entry)
    assert (await do(with_option(step.argv, server="1:2"), step)).exit_code == 93
    other = nginx.dir / "other"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        other.write_text(f"{sleeper.pid}\n")
        answer = await refused("nginx.reload", nginx.entry | {"nginx_pid_file": str(other)})
        assert answer.reason is Refusal.PROTECTED_TARGET
        assert (await do(with_option(step.argv, pid_file=other), step)).exit_code == 93
        assert sleeper.poll() is None
        sleeper.kill()


async def test_the_backlog_is_raised_and_put_back(nginx: Nginx) -> None:
    before = nginx.conf.read_bytes()
    assert backlog(nginx.port) == 511
    made = await plan_for("nginx.raise_backlog", nginx.entry)
    assert isinstance(made, Plan), made
    assert made.autonomy == "approve"
    step = made.steps[0]
    assert await checked(step) == 1
    assert await carry_out(made) == "verified"
    assert backlog(nginx.port) == 2048
    assert b"backlog=2048" in nginx.conf.read_bytes()
    assert await checked(step) == 0
    assert (await refused("nginx.raise_backlog", nginx.entry)).reason is Refusal.EMPTY_TARGET
    assert (await do(step.argv, step)).exit_code == 93  # the file is another one now
    assert (await do(step.undo, step)).ok
    assert nginx.conf.read_bytes() == before
    assert backlog(nginx.port) == 511
    assert await carry_out(await plan_for("nginx.raise_backlog", nginx.entry), verdict=False) == "undone"
    assert nginx.conf.read_bytes() == before


async def test_a_file_that_somebody_edits_meanwhile_is_left_alone(nginx: Nginx) -> None:
    step = await one_step("nginx.raise_backlog", nginx.entry)
    assert (await do(step.argv, step)).ok
    theirs = nginx.conf.read_text() + "# somebody's note\n"
    nginx.conf.write_text(theirs)
    assert (await do(step.undo, step)).exit_code == 93
    assert await checked(step) == 94
    assert nginx.conf.read_text() == theirs


async def test_a_configuration_that_fails_the_test_is_put_back(nginx: Nginx) -> None:
    """Somebody broke it before us: nginx would refuse it, so nothing is signalled and nothing stays changed."""
    nginx.conf.write_text(nginx.conf.read_text().replace("access_log off;", "acces_log off;"))
    broken = nginx.conf.read_bytes()
    step = await one_step("nginx.raise_backlog", nginx.entry)
    result = await do(step.argv, step)
    assert result.exit_code == 93
    assert "put back" in result.stdout
    assert nginx.conf.read_bytes() == broken


async def test_a_link_in_the_place_of_the_configuration_is_refused(nginx: Nginx) -> None:
    link = nginx.dir / "link.conf"
    link.symlink_to(nginx.conf)
    answer = await refused("nginx.raise_backlog", nginx.entry | {"nginx_conf": str(link)})
    assert answer.reason is Refusal.RESOLVE_FAILED
    link.unlink()


async def test_a_server_of_an_upstream_is_drained_and_put_back(nginx: Nginx) -> None:
    before = nginx.conf.read_bytes()
    params = {"member": f"127.0.0.1:{nginx.a}", "keep_percent": 25}
    assert {nginx.get("/shop") for _ in range(12)} == {"a", "b"}
    made = await plan_for("nginx.drain_upstream", nginx.entry, **params)
    assert await carry_out(made) == "verified"
    assert {nginx.get("/shop") for _ in range(12)} == {"b"}
    assert (await refused("nginx.drain_upstream", nginx.entry, **params)).reason is Refusal.EMPTY_TARGET
    last = await refused("nginx.drain_upstream", nginx.entry, member=f"127.0.0.1:{nginx.b}", keep_percent=25)
    assert last.reason is Refusal.PROTECTED_TARGET
    assert "would be left" in last.detail
    step = made.steps[0]
    assert (await do(step.undo, step)).ok
    assert nginx.conf.read_bytes() == before
    assert {nginx.get("/shop") for _ in range(12)} == {"a", "b"}
    few = await refused("nginx.drain_upstream", nginx.entry, member=f"127.0.0.1:{nginx.a}", keep_percent=50)
    assert few.reason is Refusal.PROTECTED_TARGET


@pytest.mark.parametrize("member", ["127.0.0.1:1", "backup"])
async def test_a_server_that_the_upstream_lacks(nginx: Nginx, member: str) -> None:
    assert (await refused("nginx.drain_upstream", nginx.entry, member=member)).reason is Refusal.PROTECTED_TARGET


async def test_a_new_certificate_is_served_after_it_was_looked_at(nginx: Nginx) -> None:
    assert (await refused("certificate.reload", nginx.entry)).reason is Refusal.EMPTY_TARGET  # served already
    old = nginx.served()
    install(nginx.dir, "new", "old")
    assert (await refused("certificate.reload", nginx.entry)).reason is Refusal.PROTECTED_TARGET  # not its key
    install(nginx.dir, "new", "new")
    step = await one_step("certificate.reload", nginx.entry)
    assert await checked(step) == 1
    install(nginx.dir, "old", "old")  # the file has changed since
    assert (await do(step.argv, step)).exit_code == 93
    install(nginx.dir, "new", "new")
    assert (await do(step.argv, step)).ok
    assert nginx.served() != old
    assert await checked(step) == 0
    certificate(nginx.dir, "ended", days=-1)
    install(nginx.dir, "ended", "ended")
    assert "no longer valid" in (await refused("certificate.reload", nginx.entry)).detail
    install(nginx.dir, "old", "old")
    assert await carry_out(await plan_for("certificate.reload", nginx.entry)) == "verified"
    assert nginx.served() == old


HAPROXY = """
global
    stats socket {dir}/s mode 600 level admin
    nbthread 1
defaults
    mode http
    maxconn 200
    timeout connect 2s
    timeout client 5s
    timeout server 5s
frontend web
    bind 127.0.0.1:{port}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    default_backend shop
backend shop
    server one 127.0.0.1:{a}
    server two 127.0.0.1:{b}
backend alone
    server only 127.0.0.1:{a}
"""


@dataclass
class Haproxy:
    dir: Path
    port: int

    @property
    def conf(self) -> Path:
        return self.dir / "haproxy.cfg"

    @property
    def entry(self) -> dict[str, str]:
        return {
            "haproxy_socket": f"{self.dir}/s", "haproxy_backend": "shop", "haproxy_conf": str(self.conf),
            "haproxy_pid_file": f"{self.dir}/pid", "haproxy_frontend": "web", "haproxy_maxconn_max": "1000",
        }  # fmt: skip

    def frontend_limit(self) -> int:
        match = re.search(r"(?m)^web,FRONTEND,(?:[^,]*,){4}([0-9]+),", self.ask("show stat"))
        assert match
        return int(match[1])

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(f"{self.dir}/s")
            s.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: s.recv(65536), b"")).decode()

    def state(self, server: str) -> str:
        match = re.search(rf"(?m)^shop,{server},(?:[^,]*,){{15}}([^,]*),", self.ask("show stat"))
        assert match
        return match[1]


@pytest.fixture(scope="module")
def haproxy(program: Callable[..., str], nginx_server: Nginx) -> Iterator[Haproxy]:
    binary = program("haproxy")
    with directory("haproxy") as home:
        made = Haproxy(home, free_port())
        made.conf.write_text(HAPROXY.format(dir=home, port=made.port, a=nginx_server.a, b=nginx_server.b))
        argv = [binary, "-W", "-f", made.conf, "-p", home / "pid"]
        with running(argv, lambda: (home / "pid").exists() and listens(made.port), log=home / "log"):
            yield made


def test_what_the_packs_read_is_what_haproxy_says(haproxy: Haproxy) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{haproxy.port}/metrics", timeout=10) as answer:
        names = set(re.findall(r"(?m)^(haproxy_[a-z_]+)", answer.read().decode()))
    pack = next(pack for pack in load_packs().packs if pack.pack == "web-server")
    read = {name for query in pack.queries.values() for name in re.findall(r"haproxy_[a-z_]+(?={)", query)}
    assert len(read) >= 6
    assert read | set(pack.alerts["proxy"].reached_by) <= names


async def test_a_server_is_drained_and_made_ready_again(haproxy: Haproxy) -> None:
    made = await plan_for("haproxy.drain_server", haproxy.entry, member="one")
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    assert (await do(step.undo, step)).exit_code == 93  # it is not drained
    assert await carry_out(made) == "verified"
    assert haproxy.state("one") == "DRAIN"
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93
    assert (await refused("haproxy.drain_server", haproxy.entry, member="one")).reason is Refusal.EMPTY_TARGET
    last = await refused("haproxy.drain_server", haproxy.entry, member="two")
    assert last.reason is Refusal.PROTECTED_TARGET
    assert "would be left" in last.detail
    assert (await do(step.undo, step)).ok
    assert haproxy.state("one") == "no check"
    assert (
        await carry_out(await plan_for("haproxy.drain_server", haproxy.entry, member="one"), verdict=False) == "undone"
    )
    assert haproxy.state("one") == "no check"


async def test_the_only_server_and_an_unknown_one_are_refused(haproxy: Haproxy) -> None:
    alone = haproxy.entry | {"haproxy_backend": "alone"}
    assert (await refused("haproxy.drain_server", alone, member="only")).reason is Refusal.PROTECTED_TARGET
    assert (await refused("haproxy.drain_server", haproxy.entry, member="three")).reason is Refusal.PROTECTED_TARGET


async def test_a_frontend_takes_more_and_then_as_many_as_before(haproxy: Haproxy) -> None:
    old = haproxy.frontend_limit()
    made = await plan_for("haproxy.raise_maxconn", haproxy.entry)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    assert await carry_out(made, verdict=False) == "undone"
    assert haproxy.frontend_limit() == old
    assert await carry_out(made) == "verified"
    assert haproxy.frontend_limit() == 2 * old
    assert await checked(step) == 0
    haproxy.ask("set maxconn frontend web 77")  # somebody else decides otherwise
    assert await checked(step) == 94
    assert (await do(step.argv, step)).exit_code == 93
    assert (await do(step.undo, step)).exit_code == 93
    assert haproxy.frontend_limit() == 77
    full = await refused("haproxy.raise_maxconn", haproxy.entry | {"haproxy_maxconn_max": "77"})
    assert full.reason is Refusal.EMPTY_TARGET
    absent = await refused("haproxy.raise_maxconn", haproxy.entry | {"haproxy_frontend": "absent"})
    assert absent.reason is Refusal.PROTECTED_TARGET
    haproxy.ask(f"set maxconn frontend web {old}")


async def test_haproxy_is_reloaded_once_its_configuration_is_sound(haproxy: Haproxy) -> None:
    text = haproxy.conf.read_text()
    step = await one_step("haproxy.reload", haproxy.entry)
    assert await checked(step) == 1
    assert (await do(with_option(step.argv, server="1:2"), step)).exit_code == 93
    haproxy.conf.write_text(text.replace("mode http", "mode htttp"))
    result = await do(step.argv, step)
    assert result.exit_code == 93
    assert "htttp" in result.stdout
    assert await checked(step) == 1
    haproxy.conf.write_text(text.replace("backend alone", "backend fresh"))
    assert (await do(step.argv, step)).ok
    assert await checked(step) == 0
    until(lambda: "fresh" in haproxy.ask("show stat"))
    haproxy.conf.write_text(text)
