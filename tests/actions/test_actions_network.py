"""Routes, resolvers and registries: real BIRD, FRR, unbound and dnsmasq; a registry with Consul's API."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from actions_servers import (
    carry_out,
    checked,
    directory,
    do,
    free_port,
    one_step,
    plan_for,
    refused,
    running,
    until,
    with_option,
)  # fmt: skip
from aiohttp import web
from aiohttp.test_utils import TestServer

from actions.model import Plan, Refusal

SPEAKER = """
router id 10.0.0.{n};
protocol device {{ }}
{announced}
protocol bgp peer {{
    local 127.0.0.{n} port {mine} as 6500{n};
    neighbor 127.0.0.{m} port {theirs} as 6500{m};
    multihop; strict bind yes;
    connect delay time 1; connect retry time 1; error wait time 1, 2; startup hold time 10;
    ipv4 {{ import all; export filter {{ bgp_next_hop = 198.51.100.{n}; accept; }}; }};  # a loopback is no next hop
}}
"""
ANNOUNCED = "protocol static anycast { ipv4; route 192.0.2.0/24 blackhole; }"


@dataclass
class Bird:
    birdc: str
    ours: Path
    theirs: Path

    @property
    def entry(self) -> dict[str, str]:
        return {"bird_socket": str(self.ours), "bird_protocol": "anycast"}

    def heard(self) -> bool:
        """Whether the neighbour hears our announcement."""
        argv = [self.birdc, "-s", str(self.theirs), "show", "route", "protocol", "peer"]
        return "192.0.2.0/24" in subprocess.run(argv, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def bird(program: Callable[..., str]) -> Iterator[Bird]:
    """Two real speakers of BGP on the loopback; the first announces a prefix to the second."""
    binary, birdc = program("bird", "bird2"), program("birdc", "bird2")
    a, b = free_port(), free_port()
    with directory("bird") as home, ExitStack() as stack:
        made = Bird(birdc, home / "s1", home / "s2")
        for n, m, mine, theirs in ((1, 2, a, b), (2, 1, b, a)):
            conf = home / f"{n}.conf"
            announced = ANNOUNCED if n == 1 else ""
            conf.write_text(SPEAKER.format(n=n, m=m, mine=mine, theirs=theirs, announced=announced))
            argv = [binary, "-f", "-c", conf, "-s", home / f"s{n}", "-P", home / f"pid{n}"]
            stack.enter_context(running(argv, lambda n=n: (home / f"s{n}").exists(), log=home / f"log{n}"))
        until(made.heard)
        yield made


@pytest.mark.parametrize("protocol", ["anycast", "peer"])
async def test_an_announcement_is_withdrawn_and_made_again(bird: Bird, protocol: str) -> None:
    until(bird.heard)
    made = await plan_for("route.withdraw", bird.entry | {"bird_protocol": protocol})
    assert isinstance(made, Plan), made
    assert made.autonomy == "approve"
    step = made.steps[0]
    assert step.action == "route.withdraw.bird"
    assert await checked(step) == 1
    assert (await do(step.undo, step)).exit_code == 93  # it announces already
    assert await carry_out(made) == "verified"
    until(lambda: not bird.heard())
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93  # it is withdrawn already
    assert (await refused("route.withdraw", bird.entry | {"bird_protocol": protocol})).reason is Refusal.EMPTY_TARGET
    assert (await do(step.undo, step)).ok
    until(bird.heard)
    assert await checked(step) == 1


async def test_the_routes_of_the_host_itself_are_refused(bird: Bird) -> None:
    answer = await refused("route.withdraw", bird.entry | {"bird_protocol": "device1"})
    assert answer.reason is Refusal.PROTECTED_TARGET
    step = await one_step("route.withdraw", bird.entry)
    assert (await do(with_option(step.argv, name="device1"), step)).exit_code == 93
    unknown = await refused("route.withdraw", bird.entry | {"bird_protocol": "absent"})
    assert unknown.reason is Refusal.RESOLVE_FAILED


@dataclass
class Frr:
    vtysh: str
    dir: Path

    @property
    def entry(self) -> dict[str, str]:
        return {"frr_asn": "65010", "frr_neighbor": "127.0.0.9", "frr_socket_dir": str(self.dir)}

    def ask(self, *commands: str) -> str:
        argv = [self.vtysh, "--vty_socket", str(self.dir), *(x for c in commands for x in ("-c", c))]
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False).stdout


@pytest.fixture(scope="module")
def frr(program: Callable[..., str]) -> Iterator[Frr]:
    """A real bgpd of FRR without zebra: it speaks BGP and touches no route of the host."""
    vtysh = program("vtysh", "frr")
    daemon = Path("/usr/lib/frr/bgpd")
    if os.geteuid() != 0:
        pytest.skip("bgpd wants to change its user: it starts as root only")
    with directory("frr") as home:
        made = Frr(vtysh, home)
        (home / "bgpd.conf").write_text(
            "router bgp 65010\n bgp router-id 10.0.0.10\n no bgp ebgp-requires-policy\n"
            " neighbor 127.0.0.9 remote-as 65011\n"
        )
        argv = [daemon, "-S", "-Z", "-n", "-p", free_port(), "-P", 0, "-u", "root", "-g", "root", "--vty_socket", home,
                "-i", home / "pid", "-f", home / "bgpd.conf", "-l", "127.0.0.1"]  # fmt: skip
        with running(argv, lambda: "127.0.0.9" in made.ask("show bgp summary"), log=home / "log"):
            yield made


async def test_a_neighbour_of_frr_is_shut_down_and_brought_up(frr: Frr) -> None:
    made = await plan_for("route.withdraw", frr.entry)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert step.action == "route.withdraw.frr"
    assert await checked(step) == 1
    assert await carry_out(made) == "verified"
    assert "neighbor 127.0.0.9 shutdown" in frr.ask("show running-config")
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93
    assert (await do(step.undo, step)).ok
    assert "shutdown" not in frr.ask("show running-config")
    assert (await do(step.undo, step)).exit_code == 93
    unknown = await refused("route.withdraw", frr.entry | {"frr_neighbor": "127.0.0.77"})
    assert unknown.reason in (Refusal.PROTECTED_TARGET, Refusal.RESOLVE_FAILED)
    assert (await do(with_option(step.argv, name="127.0.0.77"), step)).exit_code in (1, 93)
    assert "127.0.0.77" not in frr.ask("show running-config")


def lookup(port: int, name: str) -> str:
    """The address that the resolver answers with, "" for none (RFC 1035)."""
    labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    question = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        s.sendto(question, ("127.0.0.1", port))
        answer = s.recv(4096)
    return socket.inet_ntoa(answer[-4:]) if struct.unpack(">H", answer[6:8])[0] else ""


@dataclass
class Resolvers:
    """unbound asks a dnsmasq that stands for the zone, and another dnsmasq asks an unbound that does."""

    unbound: int
    dnsmasq: int
    conf: Path
    pid: Path
    dir: Path
    control: str
    authority: Path
    hosts_pid: Path

    def move(self, address: str) -> None:
        """The zone's own servers answer with another address from now on."""
        for name, conf in (("local_data_remove", self.authority), ("local_data", self.authority)):
            words = ["www.shop.test"] if name.endswith("remove") else ["www.shop.test", "300", "IN", "A", address]
            subprocess.run([self.control, "-c", conf, name, *words], check=True, capture_output=True, timeout=10)


UNBOUND = """
server:
    username: ""
    chroot: ""
    directory: "{dir}"
    pidfile: "{dir}/{name}.pid"
    use-syslog: no
    interface: 127.0.0.1
    port: {port}
    do-ip6: no
    do-not-query-localhost: no
    module-config: "iterator"
    num-threads: 1
    msg-cache-size: 1m
    rrset-cache-size: 1m
    outgoing-range: 32
    so-rcvbuf: 0
    local-zone: "test." {kind}
{more}
remote-control:
    control-enable: yes
    control-interface: {dir}/{name}.s
    control-use-cert: no
"""


@pytest.fixture(scope="module")
def resolvers(program: Callable[..., str]) -> Iterator[Resolvers]:
    unbound, control = program("unbound"), program("unbound-control", "unbound")
    dnsmasq = program("dnsmasq", "dnsmasq-base")
    ports = {name: free_port() for name in ("authority", "cache", "mask")}
    with directory("dns") as home, ExitStack() as stack:
        texts = {
            "authority": ("static", '    local-data: "www.shop.test. 300 IN A 192.0.2.1"'),
            "cache": ("nodefault", f'forward-zone:\n    name: "."\n    forward-addr: 127.0.0.1@{ports["authority"]}'),
        }
        for name, (kind, more) in texts.items():
            conf = home / f"{name}.conf"
            conf.write_text(UNBOUND.format(dir=home, name=name, port=ports[name], kind=kind, more=more))
            ready = [control, "-c", conf, "status"]
            stack.enter_context(
                running(
                    [unbound, "-d", "-c", conf],
                    lambda ready=ready: subprocess.run(ready, capture_output=True, check=False).returncode == 0,
                    log=home / f"{name}.log",
                )
            )
        argv = [dnsmasq, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
                "--bind-interfaces",
                "--listen-address=127.0.0.1", f"--port={ports['mask']}", f"--pid-file={home}/mask.pid", "--user=root",
                f"--server=127.0.0.1#{ports['authority']}", "--cache-size=100"]  # fmt: skip
        stack.enter_context(running(argv, lambda: lookup(ports["mask"], "www.shop.test"), log=home / "mask.log"))
        yield Resolvers(
            ports["cache"], ports["mask"], home / "cache.conf", home / "mask.pid", home, control,
            home / "authority.conf", home / "mask.pid",
        )  # fmt: skip


@pytest.mark.parametrize("zone", [".", "shop.test"])
async def test_unbound_forgets_a_zone(resolvers: Resolvers, zone: str) -> None:
    resolvers.move("192.0.2.1")
    entry = {"unbound_conf": str(resolvers.conf)}
    step = await one_step("dns.flush", entry, zone=zone)
    assert step.action == "dns.flush.unbound"
    assert (await do(step.argv, step)).ok
    assert lookup(resolvers.unbound, "www.shop.test") == "192.0.2.1"
    resolvers.move("192.0.2.2")
    assert lookup(resolvers.unbound, "www.shop.test") == "192.0.2.1"  # from the cache
    other = await one_step("dns.flush", entry, zone="other.test")
    assert (await do(other.argv, other)).ok
    assert lookup(resolvers.unbound, "www.shop.test") == "192.0.2.1"
    assert await carry_out(await plan_for("dns.flush", entry, zone=zone)) == "verified"
    assert lookup(resolvers.unbound, "www.shop.test") == "192.0.2.2"


async def test_dnsmasq_forgets_everything(resolvers: Resolvers) -> None:
    entry = {"dnsmasq_pid_file": str(resolvers.pid)}
    step = await one_step("dns.flush", entry)
    assert step.action == "dns.flush.dnsmasq"
    before = lookup(resolvers.dnsmasq, "www.shop.test")
    resolvers.move("192.0.2.9")
    assert lookup(resolvers.dnsmasq, "www.shop.test") == before
    assert (await do(step.argv, step)).ok
    until(lambda: lookup(resolvers.dnsmasq, "www.shop.test") == "192.0.2.9")
    assert (await do(with_option(step.argv, server="1:2"), step)).exit_code == 93


async def test_resolvers_that_are_gone_or_are_somebody_else(resolvers: Resolvers, tmp_path: Path) -> None:
    gone = await refused("dns.flush", {"unbound_conf": f"{tmp_path}/none.conf"})
    assert gone.reason is Refusal.RESOLVE_FAILED
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    assert (await refused("dns.flush", {"dnsmasq_pid_file": f"{tmp_path}/pid"})).reason is Refusal.PROTECTED_TARGET
    bad = await refused("dns.flush", {"unbound_conf": str(resolvers.conf)}, zone="-h")
    assert bad.reason is Refusal.BAD_PARAMETERS


@dataclass
class Registry:
    """The part of Consul's agent API that the action speaks, since Debian packages no Consul."""

    services: dict[str, str] = field(default_factory=lambda: {"shop-1": "shop", "shop-2": "shop", "solo-1": "solo"})
    maintenance: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    base: str = ""

    async def list_services(self, request: web.Request) -> web.Response:
        self.tokens.add(request.headers.get("X-Consul-Token", ""))
        return web.json_response({i: {"ID": i, "Service": s} for i, s in self.services.items()})

    async def checks(self, _: web.Request) -> web.Response:
        return web.json_response({f"_service_maintenance:{i}": {"Status": "critical"} for i in self.maintenance})

    async def health(self, request: web.Request) -> web.Response:
        passing = request.query.get("passing") == "true"
        ids = [i for i, s in self.services.items() if s == request.match_info["name"]]
        shown = [i for i in ids if not (passing and i in self.maintenance)]
        return web.json_response([{"Service": {"ID": i}} for i in shown])

    async def maintain(self, request: web.Request) -> web.Response:
        (self.maintenance.add if request.query["enable"] == "true" else self.maintenance.discard)(
            request.match_info["id"]
        )
        return web.Response()


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    made, app = Registry(), web.Application()
    app.router.add_get("/v1/agent/services", made.list_services)
    app.router.add_get("/v1/agent/checks", made.checks)
    app.router.add_get("/v1/health/service/{name}", made.health)
    app.router.add_put("/v1/agent/service/maintenance/{id}", made.maintain)
    async with TestServer(app, host="127.0.0.1") as server:
        made.base = str(server.make_url("")).rstrip("/")
        yield made


async def test_an_instance_is_put_into_maintenance_and_taken_out(registry: Registry) -> None:
    entry = {"registry_url": registry.base, "registry_service_id": "shop-1"}
    secrets = {"CONSUL_HTTP_TOKEN": "t0ken"}
    made = await plan_for("registry.drain_instance", entry, secrets)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    assert (await do(step.undo, step)).exit_code == 93
    assert await carry_out(made, secrets=secrets) == "verified"
    assert registry.maintenance == {"shop-1"}
    assert "t0ken" in registry.tokens
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93
    last = await refused("registry.drain_instance", entry | {"registry_service_id": "shop-2"})
    assert last.reason is Refusal.PROTECTED_TARGET
    assert (await do(step.undo, step)).ok
    assert registry.maintenance == set()
    assert await carry_out(made, verdict=False, secrets=secrets) == "undone"
    for name in ("solo-1", "absent"):
        answer = await refused("registry.drain_instance", entry | {"registry_service_id": name})
        assert answer.reason is Refusal.PROTECTED_TARGET
    assert json.dumps(sorted(registry.maintenance)) == "[]"
