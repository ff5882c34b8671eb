"""Has nginx serve a new certificate. Action `certificate.reload`.

Runs as `python -I -m actions.builtin.certificate resolve|run|check`. The files are looked at first: the key belongs to
the certificate, which is valid now and for the next minutes at least; then nginx tests its configuration and reloads.
What is served is asked over TLS afterwards. The files are never written: whoever renews certificates has put them
there. There is no undo: the old certificate is in no file any more.
"""

from __future__ import annotations

import argparse
import hashlib
import socket
import ssl
import sys
from pathlib import Path

from actions.builtin import DONE, FAILED, nginx
from actions.builtin.program import (
    Refused,
    Trouble,
    execute,
    find,
    identity_of,
    nothing_to_do,
    options,
    same_server,
    say,
    server_of,
    target,
    tool,
    wait_for,
)

TLS_SECONDS = 5.0
END = "-----END CERTIFICATE-----"
VALID_SECONDS = 600
MAX_BYTES = 256 * 1024


def on_disk(path: str) -> str:
    """SHA-256 of the first certificate of the file."""
    with Path(path).open() as file:
        text = file.read(MAX_BYTES)
    first, end, _ = text.partition(END)
    begin = first.find("-----BEGIN CERTIFICATE-----")
    if begin < 0 or not end:
        raise Refused(f"{path} has no certificate")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first[begin:] + end)).hexdigest()


def served(address: str, name: str) -> str:
    """SHA-256 of the certificate that is served. Who signed it does not matter: it is compared, not trusted."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection((host.strip("[]"), int(port)), TLS_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=name or None) as tls,
    ):
        found = tls.getpeercert(binary_form=True)
    if not found:
        raise Trouble(f"{address} serves no certificate")
    return hashlib.sha256(found).hexdigest()


def inspect(args: argparse.Namespace) -> None:
    """Raises Refused unless key and certificate belong together and are valid."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.certificate, args.key)
    except (ssl.SSLError, OSError) as error:
        raise Refused(f"{args.certificate} and its key do not belong together: {error}") from error
    openssl = find("openssl")
    try:
        tool([openssl, "x509", "-noout", "-checkend", str(VALID_SECONDS), "-in", args.certificate])
    except Trouble as error:
        raise Refused(f"{args.certificate} is no longer valid, or not for long") from error
    import time

    start = tool([openssl, "x509", "-noout", "-startdate", "-in", args.certificate]).partition("=")[2].strip()
    if ssl.cert_time_to_seconds(start) > time.time():
        raise Refused(f"{args.certificate} is valid only from {start}")


def resolve(args: argparse.Namespace) -> int:
    new, old = on_disk(args.certificate), served(args.address, args.name)
    if new == old:
        return nothing_to_do()
    inspect(args)
    master = server_of(args.pid_file, nginx.NAMES)
    note = f"{args.address} serves {old[:16]}, {args.certificate} is {new[:16]}"
    return target(f"certificate={args.certificate}", note, server=identity_of(master), digest=new)


def run(args: argparse.Namespace) -> int:
    same_server(args.pid_file, nginx.NAMES, args.server)
    if on_disk(args.certificate) != args.digest:
        raise Refused(f"{args.certificate} is another one than when the plan was made")
    inspect(args)
    try:
        nginx.test(args.conf)
    except Trouble as error:
        raise Refused(str(error)) from error
    anew = nginx.reload(args)
    fresh = wait_for(lambda: served(args.address, args.name) == args.digest, 5.0)
    say({"reloaded": anew, "served": fresh})
    return DONE if fresh else FAILED


def check(args: argparse.Namespace) -> int:
    """It has happened when the planned certificate is served."""
    now = served(args.address, args.name)
    say({"served": now[:16]})
    return DONE if now == args.digest else FAILED


def main() -> int:
    parser = options("resolve", "run", "check")
    parser.add_argument("--conf", required=True)
    parser.add_argument("--pid-file", required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--server", default="")
    parser.add_argument("--digest", default="")
    parser.add_argument("--seconds", type=float, default=10.0)
    return execute(parser, {"resolve": resolve, "run": run, "check": check})


if __name__ == "__main__":
    sys.exit(main())
