"""`alertmedic diagnose --alert`, as a process, on a real Prometheus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from anyalert_world import ANY, AnyCase, Server


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def payload(case: AnyCase, at: float) -> dict[str, Any]:
    alert = case.alert(at)
    one = {
        "status": "firing",
        "labels": alert.labels,
        "annotations": {"runbook_url": "https://runbooks.example/odd"},
        "startsAt": rfc3339(at),
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": alert.generator_url,
        "fingerprint": "0123456789abcdef",
    }
    return {
        "version": "4",
        "groupKey": "{}:{}",
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "alertmedic",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://a",
        "alerts": [one],
    }


def command(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ALERTMEDIC")}
    return subprocess.run(
        [sys.executable, "-m", "agent", "diagnose", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


@pytest.fixture
def case() -> AnyCase:
    return next(c for c in ANY if c.name == "siblings")


def test_an_alert_is_diagnosed_from_a_file(prometheus: Server, any_at: float, case: AnyCase, tmp_path: Path) -> None:
    file = tmp_path / "alert.json"
    file.write_text(json.dumps(payload(case, any_at)))
    at = rfc3339(case.until(any_at)).replace("+00:00", "Z")
    said = command("--alert", str(file), "--prometheus", prometheus.url, "--at", at)
    assert said.returncode == 0, said.stderr
    assert "one instance differs from its siblings (alert.one_instance on " in said.stdout
    assert "instance 10.8.5.0:80" in said.stdout
    assert "no safe remedy:" in said.stdout
    assert "runbook: https://runbooks.example/odd" in said.stdout


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("one_version", "version v2: 2 of 8 series, which make up 100% of the change; the other 6 are as usual"),
        ("one_zone", "zone z1: 3 of 8 series, which make up 100% of the change; the other 5 are as usual"),
        ("shared", "all of its parts: 7 series changed in the same proportion (100%)"),
    ],
)
def test_what_the_drill_down_found_is_said_in_words(
    prometheus: Server, any_at: float, tmp_path: Path, name: str, told: str
) -> None:
    case = next(c for c in ANY if c.name == name)
    file = tmp_path / "alert.json"
    file.write_text(json.dumps(payload(case, any_at)))
    said = command("--alert", str(file), "--prometheus", prometheus.url, "--at", str(case.until(any_at)))
    assert told in said.stdout, said.stdout
    assert "to begin with: how often this is the cause" in said.stdout


def test_an_alert_is_diagnosed_from_standard_input_as_json(prometheus: Server, any_at: float, case: AnyCase) -> None:
    text = json.dumps(payload(case, any_at))
    at = str(case.until(any_at))
    said = command("--alert", "-", "--prometheus", prometheus.url, "--at", at, "--json", stdin=text)
    assert said.returncode == 0, said.stderr
    (answer,) = json.loads(said.stdout)["diagnoses"]
    assert answer["diagnosis"]["hypotheses"][0]["cause"] == "alert.one_instance"
    assert "host.processes" in answer["diagnosis"]["missing"]


def test_what_is_no_alert_or_no_server_is_said(tmp_path: Path) -> None:
    file = tmp_path / "alert.json"
    file.write_text('{"version": "4"}')
    assert command("--alert", str(file), "--prometheus", "http://127.0.0.1:1").returncode != 0
    assert "which Prometheus?" in command("--alert", str(file)).stderr
    assert command().returncode == 2
    assert command("--alert", str(file), "recording").returncode == 2
