"""`metrics` against a real Prometheus that scrapes itself."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_world import alertmedic, process

pytest.importorskip("prometheus_api_client", reason="extra alertmedic[explore]")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, program: Callable[..., str]) -> Iterator[str]:
    """Its URL, once it has samples of itself."""
    directory: Path = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    (directory / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms}\n"
        f"scrape_configs: [{{job_name: self, static_configs: [{{targets: ['{address}']}}]}}]\n"
    )
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://{address}"
        deadline = time.monotonic() + 60.0
        while b'"up"' not in _names(url):
            assert server.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, "no samples within 60 s"
            time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _names(url: str) -> bytes:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/label/__name__/values", timeout=5) as answer:
            body: bytes = answer.read()
            return body
    except OSError:
        return b""


def test_names_labels_and_samples(prometheus: str) -> None:
    listed = process("metrics", "names", "prometheus_http", "--url", prometheus)
    assert listed.code == 0, listed.err
    assert "prometheus_http_requests_total" in listed.out.splitlines()
    assert "up" not in listed.out.splitlines()
    configured = {"ALERTMEDIC_PROMETHEUS_URL": prometheus}
    names = alertmedic("metrics", "names", "--json", "--limit", "3", **configured).json
    assert len(names["names"]) == 3 < names["total"]
    labels = alertmedic("metrics", "labels", "up", "--json", **configured).json["labels"]
    assert labels["job"] == ["self"]
    assert "self" in alertmedic("metrics", "labels", "up", **configured).out
    (sample,) = alertmedic("metrics", "samples", "up", "--json", **configured).json["samples"]
    assert sample["value"][1] == 1.0
    assert 'up{instance="' in alertmedic("metrics", "samples", "up", **configured).out
    assert "NaN" in alertmedic("metrics", "samples", "up * NaN", **configured).out
    refused = alertmedic("metrics", "samples", "up{", **configured)
    assert refused.code == 3
    assert "up{" in refused.err
