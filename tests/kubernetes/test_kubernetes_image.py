"""The image: its own Dockerfile, built on a Debian made here, started as it is meant to run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from chart import CHART, ROOT, TOOLS
from cluster import free_port

MOST_MIB = 400


def test_the_dockerfile_is_what_the_chart_expects() -> None:
    text = (ROOT / "Dockerfile").read_text()
    values = (CHART / "values.yaml").read_text()
    assert re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE) == [("10001", "10001")]
    assert "runAsUser: 10001" in values
    assert text.count("FROM ${BASE}") == 2, "what builds stays behind"
    assert "--require-hashes -r requirements.lock" in text
    assert 'ENTRYPOINT ["alertmedic"]' in text


@pytest.mark.full
def test_it_is_built_and_runs_as_any_user_with_a_read_only_root(program: Callable[..., str], tmp_path: Path) -> None:
    for name in ("mmdebstrap", "buildah"):
        program(name)
    bwrap = program("bwrap", "bubblewrap")
    if os.geteuid() != 0:
        pytest.skip("only root can build a root file system")
    built = TOOLS / "image"
    built.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([ROOT / "tools" / "build-image", built], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    size = int((built / "size").read_text())
    print(f"image: {size} MiB, of which the agent {(built / 'size-agent').read_text().strip()} MiB")
    assert size < MOST_MIB
    bill = json.loads((built / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert {"aiohttp", "numpy", "alertmedic"} <= {c["name"] for c in bill["components"]}
    root = tmp_path / "root"
    with tarfile.open(built / "root.tar") as archive:
        archive.extractall(root, filter="tar")
    assert not list((root / "opt/alertmedic").glob("lib/python3*/site-packages/pip")), "no installer in the image"
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 10001, 10001)
    for directory in (tmp_path, *tmp_path.parents):  # pytest's are private, and this is another user
        if directory.stat().st_uid == 0 and str(directory).startswith("/tmp/"):
            directory.chmod(directory.stat().st_mode | 0o711)
    port = free_port()
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [program("setpriv", "util-linux"), "--reuid=10001", "--regid=10001", "--clear-groups", "--no-new-privs",
         bwrap, "--unshare-pid", "--die-with-parent", "--ro-bind", root, "/", "--tmpfs", "/tmp", "--proc", "/proc",
         "--dev", "/dev", "--bind", state, "/var/lib/alertmedic", "--clearenv",
         "--setenv", "PATH", "/opt/alertmedic/bin:/usr/bin:/bin", "--setenv", "HOME", "/var/lib/alertmedic",
         "--setenv", "ALERTMEDIC_STATE_DIR", "/var/lib/alertmedic",
         "alertmedic", "serve", "--listen", f"127.0.0.1:{port}"],
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer,
            ):
                assert json.load(answer)["ready"] is True
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        child = int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0])
        assert "Uid:\t10001\t10001" in Path(f"/proc/{child}/status").read_text()
        assert any(state.iterdir()), "the journal is on the volume"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        log.close()
