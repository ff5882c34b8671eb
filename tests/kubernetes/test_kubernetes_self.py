"""The alerts about the agent itself: each is known to a pack, which tells its causes apart by their series."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from chart import CHART

from agent.packs import load_packs
from rules.diagnose import diagnose
from rules.model import Alert, Evidence, Frame, SeriesId, Situation
from rules.subjects import subject_of

RULES = [r for g in yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"] for r in g["rules"]]
BY_INTENT = {"AlertMedicPaused", "AlertMedicLimitsNotEnforced"}  # a person's decision, a property of the node
PACKS = load_packs()
ONSET, STEP = 10_000.0, 30.0
KNOWN = [(r["alert"], cause) for r in RULES if r["alert"] not in BY_INTENT for cause in PACKS.alerts[r["alert"]].causes]


def series(name: str, raised: bool) -> Evidence:
    """An hour at rest, then ten minutes at trouble or at rest still."""
    times = np.arange(ONSET - 3600.0, ONSET + 600.0, STEP)
    high = 20.0 if PACKS.signals[name].kind in ("rate", "count") else 1.0
    rest, trouble = (1.0, 0.0) if name.endswith("_up") else (0.0, high)
    values = np.where((times >= ONSET) & raised, trouble, rest)[None, :]
    identity = SeriesId.of(name, {"namespace": "ops", "pod": "alertmedic-0"})
    return Evidence(name, "prometheus", frame=Frame(times, (identity,), values))


@pytest.mark.parametrize(("name", "cause"), KNOWN)
def test_a_cause_is_told_by_its_series(name: str, cause: str) -> None:
    labels = {"alertname": name, "namespace": "ops", "pod": "alertmedic-0"}
    alert = Alert(tenant="default", fingerprint="f", status="firing", labels=labels, starts_at=ONSET + 300, digest="d")
    signals = [n for n in PACKS.signals if n.startswith("medic_")]
    needed = set(PACKS.causes[cause].needs)
    evidence = tuple(series(n, raised=PACKS.signals[n].group in needed) for n in signals)
    entry = subject_of(labels, PACKS.alerts[name].subject)
    found = diagnose(Situation((alert,), entry, ONSET, ONSET + 600.0, evidence), PACKS)
    assert found.hypotheses, found
    assert found.hypotheses[0].cause == cause, [h.cause for h in found.hypotheses]
    assert not found.hypotheses[0].proposals, "the agent never acts on itself"


def test_every_alert_of_the_chart_is_known() -> None:
    assert {r["alert"] for r in RULES} == {n for n in PACKS.alerts if n.startswith("AlertMedic")} | BY_INTENT


def test_what_packs_propose_are_actions_with_their_parameters() -> None:
    """Proposals to Kubernetes: the action exists, and every parameter that it needs is given."""
    from actions.catalog import load_catalog

    catalog = load_catalog()
    for name, cause in PACKS.causes.items():
        for proposal in cause.proposals:
            definition = catalog.get(proposal.action)
            if definition is None or not proposal.action.startswith("kubernetes."):
                continue
            own = {p.source_key: p for p in definition.parameters.values() if p.origin == "proposal"}
            assert set(proposal.params) <= set(own), f"{name}: {proposal.action} has no such parameter"
            needed = {key for key, p in own.items() if p.required and p.default is None}
            assert needed <= set(proposal.params), f"{name}: {proposal.action} lacks {needed - set(proposal.params)}"
