"""The evaluator's arithmetic, on a tiny synthetic set whose figures can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from agent import evaluate
from agent.cli import main
from agent.evaluate import Case, Ranking, Scored, Truth, accuracy, calibration, find_cases, report, score
from agent.packs import load_packs
from agent.sources.recorded import RecordingError, write_recording
from rules.model import Alert, Contribution, Diagnosis, Evidence, Frame, Hypothesis, SeriesId, Situation, Topology

ONSET = 1_700_000_000.0


def hypothesis(service: str, fault: str, posterior: float, *series: str) -> Hypothesis:
    contributions = (
        Contribution(evidence="g", state="strong", log_odds=2.0, text="", series=series),
        Contribution(evidence="h", state="absent", log_odds=-1.0, text="", series=("against",)),
    )
    return Hypothesis(
        cause=f"c.{fault}",
        service=service,
        fault=fault,
        title="",
        posterior=posterior,
        confidence=posterior,
        contributions=contributions,
    )


def ranking(*hypotheses: Hypothesis, ranked: bool = True) -> Ranking:
    return Ranking.of(Diagnosis(verdict="ranked" if ranked else "insufficient_evidence", hypotheses=tuple(hypotheses)))


def scored(set_name: str, truth: Truth, *hypotheses: Hypothesis, ranked: bool = True, seconds: float = 0.5) -> Scored:
    return score(Case(Path(set_name), set_name), ranking(*hypotheses, ranked=ranked), truth, seconds)


A, B, C = (hypothesis(s, "cpu", p, f"m{{s={s}}}") for s, p in (("a", 0.6), ("b", 0.2), ("c", 0.1)))
A_MEMORY = hypothesis("a", "memory", 0.05, "memory{s=a}")


def test_rankings_hold_each_service_pair_and_series_once() -> None:
    found = ranking(A, A_MEMORY, B)
    assert found.services == ("a", "b")
    assert found.pairs == (("a", "cpu"), ("a", "memory"), ("b", "cpu"))
    assert found.metrics == ("m{s=a}", "memory{s=a}", "m{s=b}")  # what speaks against counts nowhere
    assert found.probability == pytest.approx(0.65)


def test_accuracy_by_hand() -> None:
    found = accuracy([1, 2, 4, None])
    assert found == {"cases": 4, "ac1": 0.25, "ac3": 0.5, "ac5": 0.75, "avg5": (0.25 + 0.5 + 0.5 + 0.75 + 0.75) / 5}
    assert accuracy([]) == {"cases": 0, "ac1": None, "ac3": None, "ac5": None, "avg5": None}


def test_insufficient_evidence_on_a_fault_is_a_miss_at_every_k() -> None:
    found = scored("s", Truth("a", "cpu", ("m{s=a}",)), A, B, ranked=False)
    assert (found.service, found.pair, found.metric) == (None, None, None)


def test_the_report_counts_by_set_and_keeps_fault_free_cases_apart() -> None:
    calm = Truth(None, "none", (), {"source": "one"})
    found = report(
        [
            scored("one", Truth("a", "cpu", ("m{s=a}",)), A, B, C, seconds=1.0),
            scored("one", Truth("b", "memory"), A, B, C, seconds=3.0),
            scored("two", Truth("a", "memory"), A, A_MEMORY),
            scored("calm", calm, A, ranked=False),
            scored("calm", calm, A),
            scored("two", Truth(None, "none")),
        ]
    )
    one = found["sets"]["one"]
    assert (one["cases"], one["service"]["ac1"], one["service"]["ac3"], one["seconds_per_case"]) == (2, 0.5, 1.0, 2.0)
    assert (one["pair"]["ac1"], one["pair"]["ac5"]) == (0.5, 0.5)  # b was named, but for its CPU
    assert (one["metric"]["cases"], one["metric"]["ac1"]) == (1, 1.0)  # the other case names no metric
    assert found["sets"]["two"]["pair"] == {"cases": 1, "ac1": 0.0, "ac3": 1.0, "ac5": 1.0, "avg5": 0.8}
    assert found["sets"]["nofault"]["by_source"] == {"one": 0.5, "two": 0.0}
    assert found["sets"]["nofault"]["specificity"] == pytest.approx(1 / 3)


def test_calibration_by_hand() -> None:
    truth = Truth("a", "cpu")
    found = calibration(
        [
            scored("s", truth, A),
            scored("s", Truth("z", "cpu"), B),
            scored("s", truth),
            scored("s", Truth(None, "none"), C),
        ]
    )
    # Three answers have a probability: .6 right, .2 wrong, .1 wrong; with ten bins each stands alone.
    assert found["cases"] == 3
    assert found["brier"] == pytest.approx((0.4**2 + 0.2**2 + 0.1**2) / 3)
    assert found["ece"] == pytest.approx((0.4 + 0.2 + 0.1) / 3)


def test_calibration_compares_means_within_bins_of_equal_mass() -> None:
    half = hypothesis("a", "cpu", 0.5)
    cases = [scored("s", Truth("a" if i % 2 else "b", "cpu"), half) for i in range(40)]
    found = calibration(cases)
    assert found["brier"] == pytest.approx(0.25)
    assert found["ece"] == pytest.approx(0.5)  # equal probabilities are sorted by outcome: the worst case
    assert calibration([]) == {"cases": 0, "brier": None, "ece": None}


def record(directory: Path, service: str, fault: str | None, series: Sequence[tuple[str, Sequence[float]]]) -> None:
    """A case of two services and an entry; 40 normal rows and 10 abnormal ones, a minute apart."""
    times = ONSET + 60.0 * np.arange(-40, 10)
    rows = np.array([values for _, values in series])
    frame = Frame(
        times, tuple(SeriesId.of(n.partition("@")[0], {"service": n.partition("@")[2]}) for n, _ in series), rows
    )
    evidence = tuple(
        Evidence(s.metric, "recorded", Frame(times, (s,), rows[i : i + 1])) for i, s in enumerate(frame.ids)
    )
    alert = Alert(
        tenant="default",
        fingerprint="0123456789abcdef",
        status="firing",
        labels={"alertname": "Slow", "service": "front"},
        starts_at=ONSET,
        digest="d",
    )
    edges = (("front", "orders"), ("front", "stock"))
    write_recording(directory, Situation((alert,), "front", ONSET, float(times[-1]), evidence, Topology(edges)))
    truth = {"service": service or None, "fault": fault or "none", "metrics": [], "extra": {}}
    (directory / "truth.json").write_text(json.dumps(truth))


def leaking(service: str) -> list[tuple[str, list[float]]]:
    """Memory used of its limit and errors of both services; those of `service` jump."""
    found = []
    for name in ("orders", "stock"):
        used, failed = (0.97, 0.4) if name == service else (0.2, 0.0)
        found.append((f"process_memory_used_ratio@{name}", [0.2 + 0.001 * (i % 3) for i in range(40)] + [used] * 10))
        found.append((f"http_error_ratio@{name}", [0.0] * 40 + [failed] * 10))
    return found


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    record(tmp_path / "shop" / "1", "orders", "memory", leaking("orders"))
    record(tmp_path / "shop" / "2", "stock", "memory", leaking("orders"))  # the truth is elsewhere
    record(tmp_path / "calm" / "1", "", None, leaking("nobody"))
    return tmp_path


def test_whole_sets_through_the_code_of_live_incidents(recordings: Path) -> None:
    seen: list[Case] = []
    found = report(evaluate.evaluate(find_cases([recordings]), load_packs(), seen.append))
    assert [case.set for case in seen] == ["calm", "shop", "shop"]
    shop = found["sets"]["shop"]
    assert (shop["cases"], shop["service"]["ac1"], shop["pair"]["ac1"]) == (2, 0.5, 0.5)
    assert found["sets"]["nofault"] == {
        "cases": 1,
        "specificity": 1.0,
        "by_source": {"calm": 1.0},
        "seconds_per_case": pytest.approx(found["sets"]["nofault"]["seconds_per_case"]),
    }


def test_the_truth_changes_no_answer(recordings: Path) -> None:
    before = [s.ranking for s in evaluate.evaluate(find_cases([recordings]), load_packs())]
    for path in recordings.glob("*/*/truth.json"):
        path.write_text(json.dumps({"service": "front", "fault": "cpu"}))
    assert [s.ranking for s in evaluate.evaluate(find_cases([recordings]), load_packs())] == before


def test_the_commands(recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(recordings), "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert set(sets) == {"shop", "nofault"}
    assert main(["evaluate", str(recordings), "--json", "--cross", "--unlicensed", "shop"]) == 0
    crossed = json.loads(capsys.readouterr().out)["cross"]
    assert crossed["system"]["sets"]["shop"]["cases"] == 2
    assert main(["evaluate", str(recordings / "shop"), "--misses"]) == 0
    shown = capsys.readouterr()
    assert "AC@1" in shown.out
    assert "stock memory" in shown.out
    assert shown.err == ""  # no progress bar where nobody watches
    assert main(["diagnose", str(recordings / "shop" / "1"), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["diagnoses"]
    assert answer["diagnosis"]["hypotheses"][0]["service"] == "orders"
    assert main(["diagnose", str(recordings / "shop" / "1"), "--limit", "1"]) == 0
    assert "memory leak (process.memory_leak on orders)" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["evaluate", "diagnose"])
def test_what_cannot_be_read_is_said(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([what, str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_truth_that_cannot_be_read_is_named(recordings: Path) -> None:
    path = recordings / "shop" / "1" / "truth.json"
    path.write_text('{"service": 5}')
    with pytest.raises(RecordingError, match=r"truth\.json"):
        evaluate.evaluate(find_cases([recordings / "shop"]), load_packs())
    path.unlink()
    with pytest.raises(RecordingError, match=r"truth\.json: No such file"):
        evaluate.evaluate(find_cases([recordings / "shop"]), load_packs())
