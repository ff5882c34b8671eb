"""Cleaning, rotating and looking at real files, and profiles of real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actions_servers import (
    carry_out,
    checked,
    do,
    free_port,
    listens,
    one_step,
    plan_for,
    refused,
    until,
    with_option,
)  # fmt: skip
from actions_started import wait_until

from actions.builtin.logs import masked
from actions.model import Plan, Refusal

OLD = time.time() - 30 * 86400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path.resolve() / "files"
    made.mkdir()
    return made


def old(path: Path, text: str = "x" * 5000, when: float = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (when, when))
    return path


async def test_old_files_of_the_declared_kind_go_and_nothing_else(root: Path, tmp_path: Path) -> None:
    outside = old(tmp_path / "outside.tmp")
    gone = [old(root / "a.tmp"), old(root / "sub" / "b.tmp")]
    kept = [old(root / "a.db"), old(root / "young.tmp", when=time.time()), old(root / "twice.tmp")]
    os.link(root / "twice.tmp", root / "other-name")
    (root / "link.tmp").symlink_to(outside)
    (root / "away").symlink_to(tmp_path)
    entry = {"clean_root": str(root), "clean_pattern": "*.tmp"}
    made = await plan_for("disk.clean_by_age", entry)
    assert isinstance(made, Plan), made
    assert made.autonomy == "approve"
    assert await checked(made.steps[0]) == 1
    with (root / "busy.tmp").open("a") as busy:
        busy.write("x")
        busy.flush()
        os.utime(root / "busy.tmp", (OLD, OLD))
        assert await carry_out(made) == "verified"
        assert (root / "busy.tmp").exists()  # somebody writes to it
    (root / "busy.tmp").unlink()
    assert not any(p.exists() for p in gone)
    assert all(p.exists() for p in (*kept, outside, root / "link.tmp"))
    assert await checked(made.steps[0]) == 0
    assert (await do(made.steps[0].argv, made.steps[0])).exit_code == 93
    assert (await refused("disk.clean_by_age", entry)).reason is Refusal.EMPTY_TARGET


@pytest.mark.parametrize("where", ["/etc", "/var", "/tmp/../etc", "//tmp", "link"])
async def test_roots_that_are_none(root: Path, where: str) -> None:
    if where == "link":
        (root / "link").symlink_to("/usr/share")
        where = str(root / "link")
    answer = await refused("disk.clean_by_age", {"clean_root": where, "clean_pattern": "*.tmp"})
    assert answer.reason in (Refusal.PROTECTED_TARGET, Refusal.RESOLVE_FAILED)


async def test_another_directory_in_the_place_of_the_root_is_refused(root: Path) -> None:
    old(root / "a.tmp")
    step = await one_step("disk.clean_by_age", {"clean_root": str(root), "clean_pattern": "*.tmp"})
    root.rename(root.with_name("before"))
    root.mkdir()
    kept = old(root / "a.tmp")
    assert (await do(step.argv, step)).exit_code == 93
    assert await checked(step) == 94
    assert kept.exists()


WRITER = """
import os, signal, sys, time
path = sys.argv[1]
log = open(path, "a", buffering=1)
def reopen(*_):
    global log
    log.close()
    log = open(path, "a", buffering=1)
if sys.argv[2] == "reopens":
    signal.signal(signal.SIGUSR1, reopen)
else:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
print("ready", flush=True)
n = 0
while True:
    log.write(f"line {n}\\n")
    n += 1
    time.sleep(0.005)
"""


@pytest.fixture
def writer(root: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root / "app.log"), how], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (root / "pid").write_text(f"{process.pid}\n")
        wait_until(lambda: (root / "app.log").stat().st_size > 100)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def log_entry(root: Path) -> dict[str, str]:
    return {"log_root": str(root), "log_file": "app.log", "log_pid_file": f"{root}/pid", "log_signal": "USR1"}


async def test_a_log_is_rotated_without_losing_a_line(
    root: Path, writer: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = writer("reopens")
    made = await plan_for("disk.rotate_log", log_entry(root), min_bytes=10)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    assert await carry_out(made) == "verified"
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93  # it is another file now
    wait_until(lambda: (root / "app.log").stat().st_size > 0)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    rotated = next(root.glob("app.log.*"))
    lines = [*rotated.read_text().splitlines(), *(root / "app.log").read_text().splitlines()]
    assert lines == [f"line {n}" for n in range(len(lines))]


async def test_a_writer_that_does_not_reopen_is_a_failure_and_loses_nothing(
    root: Path, writer: Callable[[str], subprocess.Popen[str]]
) -> None:
    writer("ignores")
    step = await one_step("disk.rotate_log", log_entry(root), min_bytes=10)
    assert (await do((*step.argv, "--seconds=0.3"), step)).exit_code == 1
    assert await checked(step) == 94
    rotated = next(root.glob("app.log.*"))
    size = rotated.stat().st_size
    wait_until(lambda: rotated.stat().st_size > size)  # it goes on writing to the old file


async def test_who_does_not_write_the_log_is_not_signalled(
    root: Path, writer: Callable[[str], subprocess.Popen[str]]
) -> None:
    writer("reopens")
    with subprocess.Popen(["sleep", "60"]) as other:
        step = await one_step("disk.rotate_log", log_entry(root), min_bytes=10)
        (root / "pid").write_text(f"{other.pid}\n")
        answer = await refused("disk.rotate_log", log_entry(root), min_bytes=10)
        assert answer.reason is Refusal.PROTECTED_TARGET
        assert (await do(step.argv, step)).exit_code == 93
        assert other.poll() is None
        other.kill()
    small = await refused("disk.rotate_log", log_entry(root))
    assert small.reason is Refusal.EMPTY_TARGET


async def test_logs_are_shown_masked_and_bounded(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.log").write_text("outside\n")
    (root / "link.log").symlink_to(tmp_path / "secret.log")
    lines = [f"line {n}" for n in range(5000)] + ["password=hunter2 user=ann@example.org", "x" * 9000, "\x1b[2Jend"]
    (root / "app.log").write_text("\n".join(lines))
    step = await one_step("diagnostic.log_capture", {"log_root": str(root)}, lines=100)
    assert step.read_only
    result = await do(step.argv, step)
    assert result.ok, result
    shown = json.loads(result.stdout)["lines"]
    assert list(shown) == ["app.log"]
    assert shown["app.log"][-1].endswith("end")
    assert "hunter2" not in result.stdout
    assert "ann@" not in result.stdout
    assert "\\u001b" not in result.stdout
    assert len(result.stdout) < 60_000
    for where in ("/etc", "/"):
        assert (await do(with_option(step.argv, root=where), step)).exit_code == 93


@pytest.mark.parametrize(
    "line",
    [
        "Authorization: Bearer SECRETsecret123", "password: SECRETsecret123", '{"api_key": "SECRETsecret123"}',
        "DB_PASSWORD='SECRETsecret123'", "postgres://shop:SECRETsecret123@db/x", "token=SECRETsecret123&x=1",
        "sent to SECRETsecret123@example.org", "set-cookie: SECRETsecret123", "key AKIASECRETsecret123AB",
        "eyJhbGciOiJI.SECRETsecret123.SflKxwRJSM",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_masked(line: str) -> None:
    assert "SECRETsecret123" not in masked(line)


def test_what_is_none_stays() -> None:
    line = "2026-01-02T03:04:05Z ERROR order 4711 of service worker timed out after 30 s at 10.0.0.7:5432"
    assert masked(line) == line


BUSY = """
import http.server, sys, threading
def burn_in_a_loop():
    while True:
        sum(i * i for i in range(2000))
leak = []
def keep_growing():
    import time
    while True:
        leak.append(bytearray(200_000))
        time.sleep(0.02)
threading.Thread(target=burn_in_a_loop, daemon=True).start()
threading.Thread(target=keep_growing, daemon=True).start()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.BaseHTTPRequestHandler).serve_forever()
"""


@pytest.fixture
def busy() -> Iterator[int]:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", BUSY, str(port)], stderr=subprocess.DEVNULL) as process:
        until(lambda: listens(port))
        yield port
        process.kill()


async def test_a_profile_names_the_function_that_burns_and_memory_that_grows(busy: int) -> None:
    entry = {"listen_port": str(busy)}
    cpu = await one_step("diagnostic.cpu_profile", entry, profile_seconds=1)
    assert cpu.read_only
    result = await do(cpu.argv, cpu)
    assert result.ok, result
    profile = json.loads(result.stdout)
    assert "burn_in_a_loop" in next(iter(profile["stacks"]))
    heap = await one_step("diagnostic.heap_profile", entry, profile_seconds=1)
    result = await do(heap.argv, heap)
    assert result.ok, result
    (process,) = json.loads(result.stdout)["processes"]
    assert process["grown_bytes"] > 1_000_000
    assert process["kinds"]["anonymous"]["grown"] + process["kinds"].get("heap", {"grown": 0})["grown"] > 1_000_000


async def test_a_port_without_a_process_has_no_profile() -> None:
    for action in ("diagnostic.cpu_profile", "diagnostic.heap_profile"):
        step = await one_step(action, {"listen_port": str(free_port())}, profile_seconds=1)
        result = await do(step.argv, step)
        assert result.exit_code == 1
        assert "listens on port" in result.stderr
