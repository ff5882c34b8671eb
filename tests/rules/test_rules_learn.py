"""Counting likelihoods: what is counted, what the priors say, and what is refused of a learned model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.packs import load_bare_packs, load_packs, read_model
from rules.diagnose import observe
from rules.learn import (
    IMAGINED_GIVEN,
    IMAGINED_OTHERWISE,
    Counts,
    ModelError,
    applied,
    count,
    learned,
    parse_model,
    role_of,
    shown,
)
from rules.model import Evidence, Frame, SeriesId, Situation, Topology
from rules.packs import PackError, PackSet

ONSET = 1_700_000_000.0
TIMES = ONSET + 60.0 * np.arange(-60, 6)
CAUSE = "service.cpu_exhausted"


@pytest.fixture(scope="module")
def bare() -> PackSet:
    return load_bare_packs()


def busy(service: str, *calm: str) -> Situation:
    """The CPU of one service goes to its limit, that of the others stays."""
    rows = [[10.0] * 60 + [98.0 if s == service else 10.0] * 6 for s in (service, *calm)]
    ids = tuple(SeriesId.of("cpu_usage_percent", {"service": s}) for s in (service, *calm))
    evidence = (Evidence("cpu_usage_percent", "recorded", Frame(TIMES, ids, np.array(rows))),)
    edges = tuple(("front", s) for s in (service, *calm))
    return Situation((), "front", ONSET, float(TIMES[-1]), evidence, Topology(edges))


def test_counts_are_of_the_cause_at_the_true_service_and_of_all_others(bare: PackSet) -> None:
    counts = count(observe(busy("a", "b", "c"), bare), "a", "cpu")
    assert counts[CAUSE, "cpu_use", "strong", True] == 1
    assert counts[CAUSE, "cpu_use", "absent", False] == 2
    assert counts["service.memory_growth", "cpu_use", "strong", False] == 1  # another fault at the same place
    assert shown(counts) == {CAUSE, "process.cpu_saturation"} - {
        n for n in ("process.cpu_saturation",) if not any(k[0] == n and k[3] for k in counts)
    }
    calm = count(observe(busy("a", "b"), bare), None, "none")
    assert not any(of_cause for _, _, _, of_cause in calm)


def test_tables_are_frequencies_with_imagined_observations(bare: PackSet) -> None:
    counts: Counts = Counts()
    counts[CAUSE, "cpu_use", "strong", True] = 7
    counts[CAUSE, "cpu_use", "absent", False] = 70
    table = learned(bare, counts, {CAUSE}).causes[CAUSE].tables["cpu_use"]
    assert table["strong"][0] == pytest.approx((7 + 0.8 * IMAGINED_GIVEN) / (7 + IMAGINED_GIVEN))
    assert table["strong"][1] == pytest.approx(0.005 * IMAGINED_OTHERWISE / (70 + IMAGINED_OTHERWISE))


def test_the_prior_knows_roles_and_no_figures(bare: PackSet) -> None:
    """With nothing counted the tables do not depend on the packs' figures, only on their order."""
    cause = bare.causes[CAUSE]
    blurred = msgspec.structs.replace(
        cause,
        evidence=tuple(
            msgspec.structs.replace(line, states={s: (g**0.5 / 2, o**0.5 / 2) for s, (g, o) in line.states.items()})
            for line in cause.evidence
        ),
    )
    other = PackSet.of(
        msgspec.structs.replace(p, causes={n: blurred if n == CAUSE else c for n, c in p.causes.items()})
        for p in bare.packs
    )
    assert [role_of(cause, a) for a in cause.evidence] == [role_of(blurred, b) for b in blurred.evidence]
    assert learned(bare, Counts(), {CAUSE}) == learned(other, Counts(), {CAUSE})


def test_causes_defined_by_the_same_columns_share_what_these_show(bare: PackSet) -> None:
    one, two = "service.returns_early", "service.throws"
    counts: Counts = Counts()
    counts[one, "log_flow", "strong", True] = 5
    counts[two, "log_flow", "strong", False] = 5  # the same incidents, seen from the other cause
    counts[one, "log_error", "strong", True] = 5
    tables = learned(bare, counts, {one, two}).causes
    assert tables[one].tables["log_flow"] == tables[two].tables["log_flow"]
    assert tables[one].tables["log_error"] != tables[two].tables["log_error"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_table_is_a_distribution_in_which_stronger_is_never_weaker(bare: PackSet, data: st.DataObject) -> None:
    counts: Counts = Counts()
    name = data.draw(st.sampled_from(sorted(n for n in bare.causes if n.startswith("service."))))
    for line in bare.causes[name].evidence:
        for state in line.states:
            for of_cause in (True, False):
                counts[name, line.column, state, of_cause] = data.draw(st.integers(0, 300))
    model = learned(bare, counts, {name})
    parse_model(msgspec.json.encode(model), "m")  # accepts what it wrote
    for table in model.causes[name].tables.values():
        ratio = {s: g / o for s, (g, o) in table.items()}
        for side in (0, 1):
            assert math.fsum(pair[side] for pair in table.values()) == pytest.approx(1.0)
        order = [ratio[s] for s in ("absent", "weak", "strong") if s in ratio]
        rising = all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(order))
        falling = all(a * (1 + 1e-9) >= b for a, b in itertools.pairwise(order))
        assert rising or falling
    assert applied(bare, model).causes[name].title == bare.causes[name].title


class TestShipped:
    def test_its_tables_follow_from_its_counts(self, bare: PackSet) -> None:
        """The file was counted, not written by hand: the closed form gives the same from the counts in it."""
        model = read_model()
        counts: Counts = Counts()
        for name, cause in model.causes.items():
            for column, seen in cause.counts.items():
                for state, (of_cause, elsewhere) in seen.items():
                    counts[name, column, state, True] = int(of_cause)
                    counts[name, column, state, False] = int(elsewhere)
        alone = {n: learned(bare, counts, {n}).causes[n] for n in model.causes}
        for name, cause in model.causes.items():
            for column, table in cause.tables.items():
                for state, pair in table.items():
                    assert alone[name].tables[column][state] == pytest.approx(pair, abs=1e-9), (name, column)

    def test_it_stands_in_the_place_of_the_packs_own(self, bare: PackSet) -> None:
        model, packs = read_model(), load_packs()
        assert packs.version.endswith(f" model/{model.version}")
        assert set(packs.causes) == set(bare.causes)
        for name, cause in packs.causes.items():
            for line in cause.evidence:
                if name in model.causes:
                    assert line.states == model.causes[name].tables[line.column]
            if name not in model.causes:
                assert cause == bare.causes[name]

    def test_a_pack_that_is_off_takes_its_part_along(self) -> None:
        assert "service.throws" not in load_packs(disable=["service"]).causes


def broken(change: str, value: Any = None) -> bytes:
    found = json.loads(msgspec.json.encode(read_model()))
    table = found["causes"][CAUSE]["tables"]["cpu_use"]
    if change == "format":
        found["format"] = 99
    elif change == "unknown key":
        found["colour"] = "red"
    elif change == "probability":
        table["strong"][0] = value
    elif change == "sum":
        table["absent"][1] = table["absent"][1] / 2
    elif change == "column":
        found["causes"][CAUSE]["tables"]["no_such_column"] = table
    elif change == "state":
        del table["weak"]
        table["strong"] = [1 - table["absent"][0], 1 - table["absent"][1]]
    elif change == "missing":
        del found["causes"]
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (broken("format"), "format: 99"),
        (broken("unknown key"), "colour"),
        (broken("missing"), "causes"),
        (broken("probability", 0.0), f"causes.{CAUSE}.tables.cpu_use: probabilities lie between"),
        (broken("probability", 1.5), "probabilities lie between"),
        (broken("probability", "much"), "Expected `float`"),
        (broken("sum"), "given something else do not sum to 1"),
        (broken("column"), "no_such_column: the cause has no such evidence"),
        (broken("state"), "cpu_use: not the states of its pack"),
        (broken("probability", 1e999), "JSON is malformed"),
    ],
)
def test_a_broken_model_is_refused_with_file_and_reason(body: bytes, said: str, tmp_path: Path, bare: PackSet) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(body)
    with pytest.raises(PackError) as caught:
        load_packs(model=path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    with pytest.raises((ModelError, ValueError)):
        applied(bare, parse_model(body, "m"))


def test_a_model_that_is_not_there_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_packs(model=tmp_path / "nowhere.json")
