"""kill -9 of the agent, of the sandboxed process and of both, at every failpoint, with real processes.

Each run has a state directory, a service and an incident of its own: the service breaks, Alertmanager (the test) posts
the alert until it is acknowledged, something is killed, the agent is started again, and the incident must come to its
end. Then three things are counted over all runs: alerts that were acknowledged and are gone (lost), effects or undos
that happened twice (repeated), and processes, cgroup leaves or working directories that nobody owns (left over).
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from agent_world import Agent, Services, query, until
from crash_names import Kill, dozen, kill_matrix

import sandbox

PARALLEL = 4  # runs at a time: they wait for Prometheus more than they work


@dataclass
class Count:
    """What became of the runs. A fault names its run."""

    runs: int = 0
    agents_killed: int = 0
    processes_killed: int = 0
    effects: int = 0
    undone: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {state}" for state, n in sorted(self.ends.items()))
        return (
            f"{self.runs} runs: {self.agents_killed} agents and {self.processes_killed} sandboxed processes killed; "
            f"{self.effects} effects, {self.undone} undone; {ends}; {len(self.lost)} lost, {len(self.repeated)} "
            f"repeated, {len(self.left_over)} left over, {len(self.broken)} broken"
        )


class Running:
    """One run of the matrix."""

    def __init__(self, kill: Kill, services: Services, prometheus: str, directory: Path, count: Count) -> None:
        self.kill, self.services, self.prometheus, self.count = kill, services, prometheus, count
        self.agent = Agent(
            directory,
            kill.service,
            prometheus,
            services,
            autonomy="approve" if kill.approval else "auto",
            verify_seconds=1.5 if kill.sick else 15.0,
        )
        self.pids: set[int] = set()
        self.body = self.agent.payload("Broken")  # the same bytes each time: a re-send must be known as one

    def go(self) -> None:
        kill, agent = self.kill, self.agent
        for name, wanted in (("linger", kill.linger), ("slow", kill.outside is not None)):
            if wanted:
                (agent.directory / name).touch()
        if kill.process:
            (agent.directory / "kill").write_text(kill.process)
        self.services.broken[kill.service] = 1
        bad = f'min_over_time(probe_broken{{service="{kill.service}"}}[1s]) > 0'
        until(lambda: query(self.prometheus, bad), "the fault shows", 90)
        self.start(kill.agent)
        self.drive()
        if agent.dead:
            self.count.agents_killed += 1
            self.start()
        self.settle()
        agent.stop()
        self.check()

    def start(self, failpoint: str = "") -> None:
        self.agent.start(failpoint)
        assert self.agent.process is not None
        self.pids.add(self.agent.process.pid)

    def post(self) -> None:
        """As Alertmanager: until it is acknowledged."""
        status, _ = self.agent.request("POST", "/webhook", self.body)
        if status == 200 and not self.agent.acknowledged:
            self.agent.acknowledged.append(self.body["alerts"][0]["fingerprint"])

    def drive(self) -> None:
        """Until the agent is dead, or the incident has ended because what was to die was another."""
        if not self.agent.dead:
            self.post()
        if self.kill.outside is not None:
            self.kill_from_outside(*self.kill.outside)
        until(lambda: self.agent.dead or self.ended(), f"a kill or an end: {self.agent.log}", 120)

    def kill_from_outside(self, who: str, seconds: float) -> None:
        seen = until(lambda: list(self.mine("do")), f"the effect's process starts: {self.agent.log}", 120)
        time.sleep(seconds)  # this is the schedule itself, not a wait for something
        if who in ("process", "both"):
            for process in seen:
                try:
                    process.kill()
                    self.count.processes_killed += 1
                except psutil.NoSuchProcess:
                    continue
        if who in ("agent", "both"):
            assert self.agent.process is not None
            self.agent.process.kill()
            self.agent.process.wait()

    def settle(self) -> None:
        if not self.agent.acknowledged:
            self.post()
        until(self.ended, f"the incident ends: {self.agent.log}", 120)

    def ended(self) -> bool:
        if self.agent.dead:
            return False
        incidents = self.agent.incidents()
        for incident in incidents:
            if incident["state"] == "awaiting_approval":
                self.agent.command("approve", incident["id"])
        return bool(incidents) and all(i["state"] in ("resolved", "escalated") for i in incidents)

    def mine(self, *words: str) -> Iterable[psutil.Process]:
        """Processes of this run's effect; `words` must be in the command line."""
        wanted = {str(self.agent.directory), *words}
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if wanted <= set(line) and "serve" not in line:
                yield process

    def check(self) -> None:
        count, agent, name = self.count, self.agent, self.kill.name
        incidents = agent.incidents()
        shown = {alert["fingerprint"] for incident in incidents for alert in incident["alerts"]}
        count.lost += [f"{name}: {f}" for f in agent.acknowledged if f not in shown] or []
        if not agent.acknowledged or len(incidents) != 1:
            count.lost.append(f"{name}: {len(incidents)} incidents, acknowledged {agent.acknowledged}")
        effects, undone = Counter(agent.lines("effects")), Counter(agent.lines("undone"))
        count.repeated += [f"{name}: {what}" for what in (effects, undone) if max(what.values(), default=0) > 1]
        count.processes_killed += len(agent.lines("killed"))
        count.effects += effects.total()
        count.undone += undone.total()
        count.ends.update(i["state"] for i in incidents)
        count.left_over += [f"{name}: {what}" for what in self.left_over()]
        verified = agent.command("journal", "verify")
        if verified.returncode != 0:
            count.broken.append(f"{name}: {verified.stdout}{verified.stderr}")
        count.runs += 1

    def left_over(self) -> list[str]:
        found = [f"process {p.pid} {p.info['cmdline']}" for p in self.mine()]
        root = sandbox.current().root
        places = [Path(tempfile.gettempdir()), *([root] if root is not None else [])]
        for pid in self.pids:
            found += [str(p) for place in places for p in place.glob(f"*run-*-{pid}-*")]
        return found


def run_all(kills: list[Kill], services: Services, prometheus: str, directory: Path) -> Count:
    count, lock = Count(), threading.Lock()

    def one(kill: Kill) -> None:
        mine = Count()
        run = Running(kill, services, prometheus, directory / str(kill.number), mine)
        try:
            run.go()
        except (AssertionError, OSError) as error:
            mine.broken.append(f"{kill.name}: {error}")
        finally:
            services.broken[kill.service] = 0
            run.agent.stop()
            for process in run.mine():
                process.kill()
        with lock:
            for name, value in vars(mine).items():
                setattr(count, name, getattr(count, name) + value)

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(one, kills))
    return count


def assert_nothing_went_wrong(count: Count, kills: list[Kill]) -> None:
    assert not (count.lost + count.repeated + count.left_over + count.broken), count.__dict__
    assert count.runs == len(kills)
    assert count.agents_killed + count.processes_killed >= len(kills)


def test_a_seeded_dozen(
    services: Services, prometheus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = run_all(dozen(), services, prometheus, tmp_path)
    with capsys.disabled():
        print(f"\nkill -9: {count}")
    assert_nothing_went_wrong(count, dozen())


@pytest.mark.full
def test_the_whole_matrix(
    services: Services, prometheus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = kill_matrix()
    assert len(kills) >= 200
    count = run_all(kills, services, prometheus, tmp_path)
    with capsys.disabled():
        print(f"\nkill -9: {count}")
    assert_nothing_went_wrong(count, kills)
