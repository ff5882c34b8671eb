"""Acts on a Redis server through redis-cli. Actions `redis.*`.

Runs as `python -I -m actions.builtin.redis resolve|run|check|undo --mode clients|maxclients|prefix`. The password comes
from REDISCLI_AUTH, never from the address. A server's identity is its run id, new with each start; a client's is its
connection id (never given twice within a run) with its address.

clients: closes connections of normal clients that have been idle for long, and are still so when each is closed. Never
replicas, masters, subscribers, monitors, blocked or transactional clients, nor ourselves.
maxclients: raises the number of clients, at run time only; undoing sets the old number if ours still stands.
prefix: unlinks the keys that begin with a declared prefix, in small batches, each one atomic (a Lua script that SCANs).
"""

from __future__ import annotations

import argparse
import sys
from urllib.parse import urlsplit

from actions.builtin import CANNOT_TELL, DONE, FAILED
from actions.builtin.program import (
    Refused,
    Trouble,
    execute,
    find,
    nothing_to_do,
    options,
    say,
    shorten,
    target,
    tool,
)

# N: no flag, a plain client; U: one through a unix socket. Everything else is a replica (S), master (M), monitor (O),
# subscriber (P), blocked (b), in a transaction (x), tracking (t) or being closed.
PLAIN = ("N", "U")
PROTECTED_NAMES = ("alertmedic", "sentinel")
UNLINK = """
local answer = redis.call('SCAN', ARGV[2], 'MATCH', ARGV[1], 'COUNT', 500)
local removed = 0
if ARGV[3] == 'unlink' then
  for i = 1, #answer[2] do removed = removed + redis.call('UNLINK', answer[2][i]) end
else
  removed = #answer[2]
end
return answer[1] .. ' ' .. removed
"""
MAX_ROUNDS = 20_000


def ask(url: str, *words: str) -> str:
    """What the server answers. Raises Trouble: also for an error of the server (-e)."""
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path.startswith("/"):
        where = ["-s", parts.path]
    elif parts.scheme == "redis" and parts.hostname and parts.password is None:
        where = ["-h", parts.hostname, "-p", str(parts.port or 6379)]
        where += ["--user", parts.username] if parts.username else []
    else:
        raise ValueError(f"{url} is neither redis://host:port nor unix:///path")
    database = parts.path.strip("/") if parts.scheme == "redis" else ""
    where += ["-n", database] if database else []
    argv = [find("redis-cli", "valkey-cli"), *where, "--no-auth-warning", "-e", "--raw", *words]
    return tool(argv, keep=("REDISCLI_AUTH",), seconds=10.0).rstrip("\n")


def run_id(url: str) -> str:
    for line in ask(url, "INFO", "server").splitlines():
        if line.startswith("run_id:"):
            return line.strip().partition(":")[2]
    raise Trouble("the server names no run_id")


def same_server(args: argparse.Namespace) -> None:
    if run_id(args.url) != args.server:
        raise Refused("the server has been started anew since the plan was made")


def clients(url: str) -> dict[str, dict[str, str]]:
    """Normal clients by connection id."""
    found = {}
    for line in ask(url, "CLIENT", "LIST", "TYPE", "normal").splitlines():
        fields = dict(item.split("=", 1) for item in line.split(" ") if "=" in item)
        if "id" in fields:
            found[fields["id"]] = fields
    return found


def closable(client: dict[str, str], idle_seconds: float) -> bool:
    """Whether a client does nothing and has done so for long."""
    name = client.get("name", "").lower()
    waiting = client.get("multi", "-1") != "-1" or client.get("sub", "0") != "0" or client.get("psub", "0") != "0"
    return (
        client.get("flags") in PLAIN
        and not waiting
        and not name.startswith(PROTECTED_NAMES)
        and float(client.get("idle", "0")) >= idle_seconds
    )


def resolve_clients(args: argparse.Namespace) -> int:
    everyone = clients(args.url)
    idle = [c for c in everyone.values() if closable(c, args.idle_seconds)]
    idle.sort(key=lambda c: -float(c["idle"]))
    if not idle:
        return nothing_to_do()
    chosen = idle[: args.most]
    note = f"{len(chosen)} of {len(everyone)} clients have been idle for {args.idle_seconds:g} s or longer"
    ids = ",".join(f"{c['id']}@{c['addr']}" for c in chosen)
    return target(f"redis={args.url},clients={len(chosen)}", note, clients=ids, server=run_id(args.url))


def planned_clients(args: argparse.Namespace) -> dict[str, str]:
    return dict(item.split("@", 1) for item in args.clients.split(",") if "@" in item)


def run_clients(args: argparse.Namespace) -> int:
    same_server(args)
    planned, now = planned_clients(args), clients(args.url)
    closed, kept = 0, 0
    for number, address in planned.items():
        client = now.get(number)
        if client is None or client["addr"] != address or not closable(client, args.idle_seconds):
            kept += 1
            continue
        closed += ask(args.url, "CLIENT", "KILL", "ID", number, "ADDR", address, "SKIPME", "yes") == "1"
    if not closed:
        raise Refused("none of the planned clients is idle any more")
    say({"closed": closed, "kept": kept})
    return DONE


def check_clients(args: argparse.Namespace) -> int:
    """It has happened when none of the planned clients is there as it was."""
    same_server(args)
    now = clients(args.url)
    left = [n for n, a in planned_clients(args).items() if n in now and closable(now[n], args.idle_seconds)]
    say({"left": len(left)})
    return FAILED if left else DONE


def maxclients(url: str) -> int:
    return int(ask(url, "CONFIG", "GET", "maxclients").splitlines()[1])


def resolve_maxclients(args: argparse.Namespace) -> int:
    now = maxclients(args.url)
    wanted = min(args.max, int(now * args.factor))
    if wanted <= now:
        return nothing_to_do()
    note = f"at most {now} clients are taken, wanted are {wanted}"
    return target(f"redis={args.url}", note, previous=now, wanted=wanted, server=run_id(args.url))


def set_maxclients(args: argparse.Namespace) -> int:
    same_server(args)
    now = maxclients(args.url)
    if now != args.previous:
        raise Refused(f"maxclients is {now} now, planned was {args.previous}")
    ask(args.url, "CONFIG", "SET", "maxclients", str(args.wanted))
    after = maxclients(args.url)
    say({"before": now, "after": after})
    return DONE if after == args.wanted else FAILED


def check_maxclients(args: argparse.Namespace) -> int:
    same_server(args)
    now = maxclients(args.url)
    say({"now": now})
    return {args.wanted: DONE, args.previous: FAILED}.get(now, CANNOT_TELL)


def glob_of(prefix: str) -> str:
    """The pattern that matches exactly what begins with the prefix."""
    return "".join("\\" + c if c in "*?[]\\" else c for c in prefix) + "*"


def sweep(args: argparse.Namespace, how: str, *, first: bool = False) -> int:
    """Keys removed (or, with `count`, found). `first`: stops at the first batch that has any."""
    cursor, keys = "0", 0
    for _ in range(MAX_ROUNDS):
        cursor, _, number = ask(args.url, "EVAL", UNLINK, "0", glob_of(args.prefix), cursor, how).partition(" ")
        keys += int(number)
        if cursor == "0" or (first and keys) or keys >= args.most:
            break
    return keys


def resolve_prefix(args: argparse.Namespace) -> int:
    if not sweep(args, "count", first=True):
        return nothing_to_do()
    note = f"the keys that begin with {shorten(args.prefix, 60)}, at most {args.most}"
    return target(f"redis={args.url},prefix={args.prefix}", note, server=run_id(args.url))


def run_prefix(args: argparse.Namespace) -> int:
    same_server(args)
    say({"removed": sweep(args, "unlink")})
    return DONE


def check_prefix(args: argparse.Namespace) -> int:
    same_server(args)
    left = sweep(args, "count", first=True)
    say({"left": left > 0})
    return FAILED if left else DONE


MODES = {
    "clients": {"resolve": resolve_clients, "run": run_clients, "check": check_clients},
    "maxclients": {"resolve": resolve_maxclients, "run": set_maxclients, "check": check_maxclients},
    "prefix": {"resolve": resolve_prefix, "run": run_prefix, "check": check_prefix},
}


def main() -> int:
    parser = options("resolve", "run", "check")
    parser.add_argument("--mode", choices=tuple(MODES), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--server", default="", help="run_id")
    parser.add_argument("--idle-seconds", type=float, default=300.0)
    parser.add_argument("--most", type=int, default=50)
    parser.add_argument("--clients", default="", help="id@address,...")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--max", type=int, default=0)
    parser.add_argument("--previous", type=int, default=-1)
    parser.add_argument("--wanted", type=int, default=-1)
    parser.add_argument("--prefix", default="")

    def act(args: argparse.Namespace) -> int:
        return MODES[args.mode][args.operation](args)

    return execute(parser, dict.fromkeys(("resolve", "run", "check"), act))


if __name__ == "__main__":
    sys.exit(main())
