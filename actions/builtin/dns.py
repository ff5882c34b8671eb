"""Flushes the cache of a local resolver. Actions `dns.flush.unbound` and `dns.flush.dnsmasq`.

Runs as `python -I -m actions.builtin.dns resolve|run --resolver unbound|dnsmasq`. unbound: one zone and all below it,
or everything, through unbound-control. dnsmasq: SIGHUP, which clears its cache and reads its hosts files anew; its
process is identified by pid file, pid and start. Flushing twice does no more than flushing once.
"""

from __future__ import annotations

import argparse
import signal
import sys

from actions.builtin import DONE
from actions.builtin.program import (
    execute,
    find,
    identity_of,
    options,
    same_server,
    say,
    server_of,
    shorten,
    signal_process,
    target,
    tool,
)

NAMES = ("dnsmasq",)


def unbound(args: argparse.Namespace, *words: str) -> str:
    return tool([find("unbound-control"), "-c", args.conf, *words])


def resolve(args: argparse.Namespace) -> int:
    if args.resolver == "unbound":
        unbound(args, "status")
        return target(f"unbound={args.conf}", f"the cache of unbound, zone {args.zone}", server="unbound")
    server = server_of(args.pid_file, NAMES)
    return target(f"dnsmasq={args.pid_file}", f"the cache of dnsmasq, pid {server.pid}", server=identity_of(server))


def run(args: argparse.Namespace) -> int:
    if args.resolver == "unbound":
        said = unbound(args, "flush_zone", args.zone)
        unbound(args, "flush_negative")
        say({"flushed": args.zone, "unbound": shorten(said)})
    else:
        signal_process(same_server(args.pid_file, NAMES, args.server), signal.SIGHUP)
        say({"flushed": "."})
    return DONE


def main() -> int:
    parser = options("resolve", "run")
    parser.add_argument("--resolver", choices=("unbound", "dnsmasq"), required=True)
    parser.add_argument("--conf", default="")
    parser.add_argument("--zone", default=".")
    parser.add_argument("--pid-file", default="")
    parser.add_argument("--server", default="")
    return execute(parser, {"resolve": resolve, "run": run})


if __name__ == "__main__":
    sys.exit(main())
