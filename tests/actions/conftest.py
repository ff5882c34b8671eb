"""Real servers for the tests of remediation: PostgreSQL, supervisord, and processes that are ended afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actions_started import Cluster, Supervised, wait_until


@pytest.fixture(scope="session")
def cluster(program: Callable[..., str]) -> Iterator[Cluster]:
    """PostgreSQL with the roles `app` (plain), `medic` (pg_monitor, pg_signal_backend) and `postgres` (superuser)."""
    initdb = Path(program("initdb", "postgresql")).resolve()  # its neighbours are not all on PATH
    program("psql", "postgresql-client")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if os.geteuid() == 0 else []
    home = Path(tempfile.mkdtemp(prefix="am-pg-", dir="/tmp"))
    if as_user:
        shutil.chown(home, user, user)
    data = home / "data"
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(home)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": home}
    init = [initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions"]
    subprocess.run([*as_user, *map(str, init)], check=True, timeout=120, **quiet)
    options = [
        "-c",
        "listen_addresses=",
        "-c",
        f"unix_socket_directories={home}",
        "-c",
        "fsync=off",
        "-c",
        "max_connections=30",
    ]
    server = subprocess.Popen([*as_user, str(initdb.parent / "postgres"), "-D", str(data), *options], **quiet)
    made = Cluster(initdb.parent, str(home), user)
    try:
        ready = [str(initdb.parent / "pg_isready"), "-q", "-h", str(home)]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, 60)
        made.query(
            "CREATE ROLE app LOGIN; CREATE ROLE medic LOGIN; GRANT pg_monitor, pg_signal_backend TO medic;"
            "CREATE TABLE things (id int PRIMARY KEY, n int); INSERT INTO things VALUES (1, 0), (2, 0);"
            "GRANT ALL ON things TO app"
        )
        yield made
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(30)
        shutil.rmtree(home, ignore_errors=True)


SUPERVISORD = """
[supervisord]
logfile={dir}/supervisord.log
pidfile={dir}/supervisord.pid
childlogdir={dir}
nodaemon=true
minfds=128
minprocs=20
[unix_http_server]
file={dir}/sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{dir}/sock
[program:sleeper]
command=/bin/sleep 600
startsecs=0
stopwaitsecs=2
autorestart=false
[program:stuck]
command={python} -c "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
startsecs=0
stopwaitsecs=1
autorestart=false
[program:broken]
command=/bin/false
autostart=false
startsecs=1
startretries=0
autorestart=false
[group:shop]
programs=sleeper,stuck
"""


@pytest.fixture(scope="module")
def supervisor_server() -> Iterator[Supervised]:
    """A real supervisord with a program that stops, one that ignores SIGTERM, and one that cannot start."""
    bin_dir = Path(sys.executable).parent
    directory = Path(tempfile.mkdtemp(prefix="am-sv-", dir="/tmp"))  # a unix socket's path must be short
    config = directory / "supervisord.conf"
    config.write_text(SUPERVISORD.format(dir=directory, python=sys.executable))
    server = subprocess.Popen(
        [bin_dir / "supervisord", "-n", "-c", config],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=directory,
    )
    made = Supervised(f"unix://{directory}/sock", directory, [str(bin_dir / "supervisorctl"), "-c", str(config)])
    try:
        wait_until(lambda: made.ctl("status", "shop:sleeper").split()[1:2] == ["RUNNING"], 30)
        yield made
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def supervised(supervisor_server: Supervised) -> Supervised:
    """With its programs running."""
    supervisor_server.ctl("start", "shop:*")
    return supervisor_server


@pytest.fixture
def group() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`group(source)` starts Python source as the leader of a process group of its own; all are killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
