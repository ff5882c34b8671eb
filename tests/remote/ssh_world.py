"""A real sshd on the loopback as "another host": own port, own host key, one key that may do one thing."""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from agent.config import RemoteHost

ROOT = Path(__file__).parents[2]


@dataclass
class Sshd:
    directory: Path
    program: str
    port: int
    forced: bool = True
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        d = self.directory
        for name in ("host", "client", "stranger"):
            if not (d / name).exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(d / name)], check=True)
        command = d / "alertmedic"
        command.write_text(
            f'#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)} -m agent "$@"\n'
        )
        command.chmod(0o755)
        options = f'restrict,command="{command} sandbox run" ' if self.forced else ""
        (d / "authorized_keys").write_text(options + (d / "client.pub").read_text())
        address = f"[127.0.0.1]:{self.port}"
        (d / "known_hosts").write_text(f"{address} {(d / 'host.pub').read_text()}")
        lines = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {d / 'host'}",
            f"AuthorizedKeysFile {d / 'authorized_keys'}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",  # the test's directory lies under a world-writable one
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "LogLevel VERBOSE",
        ]
        (d / "sshd_config").write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # Debian's sshd wants it for privilege separation
        log = (d / "sshd.log").open("ab")
        self.process = subprocess.Popen(
            [self.program, "-D", "-e", "-f", str(d / "sshd_config")], stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (d / "sshd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def host(self, **changes: object) -> RemoteHost:
        settings: dict[str, object] = {
            "address": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "identity_file": self.directory / "client",
            "known_hosts": self.directory / "known_hosts",
            "command": f"{self.directory / 'alertmedic'} sandbox run",
        }
        return RemoteHost(**{**settings, **changes})

    def cut(self) -> None:
        """Ends every connection: what sshd has forked per connection; the listener stays."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
