"""`alertmedic record`: what is written, diagnosed offline, ranks as the live incident did."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml
from whole_world import Whole

from agent import cli, golden
from agent.sources.recorded import read_recording
from rules.diagnose import diagnose

Make = Callable[..., Awaitable[Whole]]


async def command(*arguments: str | Path) -> int:
    return await asyncio.to_thread(cli.main, [*map(str, arguments)])


def config_file(directory: Path, whole: Whole) -> Path:
    config = whole.config
    file = directory / "alertmedic.yaml"
    edges = {k: list(v) for k, v in config.topology.edges.items()}
    content = {
        "state_dir": str(config.state_dir),
        "prometheus": {"url": config.prometheus.url, "step_seconds": config.prometheus.step_seconds},
        "topology": {"edges": edges, "kinds": dict(config.topology.kinds)},
    }
    file.write_text(yaml.safe_dump(content))
    return file


async def test_a_recorded_incident_ranks_as_it_did_live(whole: Make, tmp_path: Path, capsys: Any) -> None:
    live = await whole()
    incident = await live.diagnosed(await live.alert())
    assert incident.diagnosis is not None
    best = incident.diagnosis.hypotheses[0]
    assert (best.cause, best.service) == ("process.memory_leak", "orders")
    await live.close()
    config, out = config_file(tmp_path, live), tmp_path / "golden" / "mine"
    expect = "process.memory_leak@orders"
    capsys.readouterr()
    code = await command("record", incident.id[:9], "--out", out, "--config", config, "--expect", expect, "--json")
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["same_ranking"] is True
    assert told["missing"]["host.processes"] == "the host only knows its present, and the incident is past"
    assert set(told["missing"]) <= {"host.processes", "alert.expression"}
    again = diagnose(read_recording(out), live.packs)
    assert again.hypotheses == incident.diagnosis.hypotheses  # to the last bit, with every contribution
    assert (again.verdict, again.clear) == (incident.diagnosis.verdict, incident.diagnosis.clear)
    (outcome,) = golden.judge_all([out.parent], live.packs)
    assert outcome.fault == ""
    assert await command("diagnose", out) == 0
    assert "orders" in capsys.readouterr().out
    assert await command("record", incident.id, "--out", out, "--config", config) == 1
    assert "holds a recording already" in capsys.readouterr().err


async def test_what_cannot_be_recorded_is_said(whole: Make, tmp_path: Path, capsys: Any) -> None:
    live = await whole()
    id = await live.alert()
    await live.close()
    config = config_file(tmp_path, live)
    assert await command("record", "inc-none", "--config", config) == 1
    assert "no incident" in capsys.readouterr().err
    assert await command("record", id, "--config", config, "--expect", "leak") == 2
    nowhere = tmp_path / "nowhere.yaml"
    nowhere.write_text(config.read_text().replace(live.config.prometheus.url, "http://127.0.0.1:1"))
    out = tmp_path / "blind"
    assert await command("record", id, "--config", nowhere, "--out", out) == 0
    assert "connection refused" in capsys.readouterr().out
    missing = read_recording(out).missing()
    assert len(missing) > 20
    assert all("refused" in reason for name, reason in missing.items() if name != "host.processes"), missing
    nowhere.write_text(config.read_text().replace(live.config.prometheus.url, "''"))
    assert await command("record", id, "--config", nowhere) == 1
    assert "no Prometheus is configured" in capsys.readouterr().err
