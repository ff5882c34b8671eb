"""The compiled scorer and the counted tables against pgmpy, which knows nothing of either."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from agent import learn
from agent.cli import main
from agent.evaluate import find_cases
from agent.packs import load_bare_packs, load_packs, read_model
from rules.bayes import Model
from rules.learn import posterior_mean, pseudo_counts
from rules.packs import STATES, Cause, Likelihood, PackSet, State
from tests.evaluate.test_evaluate_arithmetic import leaking, record


@pytest.fixture(scope="module")
def packs() -> PackSet:
    return load_packs()


def made_up(rng: random.Random, name: str, columns: int) -> Cause:
    """A cause with random tables over random states."""

    def table() -> dict[State, tuple[float, float]]:
        states = rng.sample(STATES, rng.randint(2, len(STATES)))
        sides = []
        for _ in range(2):
            weights = [rng.random() ** 3 + 1e-4 for _ in states]
            sides.append([w / sum(weights) * rng.choice([1.0, 0.9]) for w in weights])
        return {s: (g, o) for s, g, o in zip(states, *sides, strict=True)}

    lines = tuple(Likelihood(group=f"g{i}", states=table()) for i in range(columns))
    return Cause(
        title=name,
        fault="f",
        kinds=("http",),
        prior=rng.uniform(0.001, 0.6),
        evidence=lines,
        needs=("g0",),
        sentence="s",
    )


def differ(causes: Mapping[str, Cause], chosen: Sequence[str], states: Sequence[Mapping[str, State]]) -> float:
    exact = learn.exact([causes[n] for n in chosen], states)
    ours = learn.compiled(Model.compile(causes), chosen, states)
    return max(abs(a - b) for a, b in zip(exact, ours, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_the_compiled_scorer_is_exact_inference_on_random_models(seed: int) -> None:
    rng = random.Random(seed)
    causes = {f"c{i}": made_up(rng, f"c{i}", rng.randint(1, 8)) for i in range(rng.randint(1, 6))}
    chosen = [rng.choice(sorted(causes)) for _ in range(rng.randint(1, 6))]
    states = [
        {line.column: rng.choice(list(line.states)) for line in causes[n].evidence if rng.random() < 0.7}
        for n in chosen
    ]
    assert differ(causes, chosen, states) <= 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_and_on_the_shipped_model(packs: PackSet, seed: int) -> None:
    assert learn.disagreement(packs, sorted(read_model().causes), seed) <= 1e-9


def test_missing_evidence_is_marginalised_exactly(packs: PackSet) -> None:
    """Nothing known: the priors, whatever the tables. One column known: as if the others did not exist."""
    chosen = ["service.adds_latency", "service.cpu_exhausted"]
    assert differ(packs.causes, chosen, [{}, {}]) <= 1e-9
    odds = [packs.causes[n].prior / (1 - packs.causes[n].prior) for n in chosen]
    nothing = learn.compiled(Model.compile(packs.causes), chosen, [{}, {}])
    assert nothing == pytest.approx([o / (1 + sum(odds)) for o in odds], abs=1e-12)
    one: list[dict[str, State]] = [{"own_latency": "strong"}, {}]
    assert differ(packs.causes, chosen, one) <= 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_pgmpy_counts_as_the_closed_form_does(seed: int) -> None:
    rng, bare = random.Random(seed), load_bare_packs()
    cause = bare.causes[rng.choice(sorted(bare.causes))]
    line = rng.choice(cause.evidence)
    seen = {s: (float(rng.randint(0, 30)), float(rng.randint(0, 900))) for s in line.states}
    given, otherwise = pseudo_counts(cause, line, seen)
    ours, theirs = posterior_mean(seen, given, otherwise), learn.estimated(seen, given, otherwise)
    for state in seen:
        assert theirs[state] == pytest.approx(ours[state], abs=1e-9)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "shop" / "1", "orders", "memory", leaking("orders"))
    record(tmp_path / "shop" / "2", "stock", "memory", leaking("stock"))
    record(tmp_path / "calm" / "1", "", None, leaking("nobody"))
    output = tmp_path / "model.json"
    assert main(["learn", str(tmp_path), "--output", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "process.memory_leak" in told["causes"]
    model = read_model(output)
    assert (model.version, model.incidents, model.fault_free) == (told["version"], 3, 1)
    assert model.causes["process.memory_leak"].counts["memory"]["strong"] == (2.0, 0.0)
    assert load_packs(model=output).version.endswith(f"model/{model.version}")
    config = tmp_path / "alertmedic.yaml"
    config.write_text(f"packs: {{model: {output}}}\n")
    assert main(["diagnose", str(tmp_path / "shop" / "1"), "--json", "--config", str(config)]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["diagnoses"]
    assert answer["diagnosis"]["version"].endswith(model.version)
    again = tmp_path / "again.json"
    assert main(["learn", str(tmp_path), "--output", str(again)]) == 0
    assert again.read_bytes() == output.read_bytes()


def test_nothing_to_learn_from_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "calm" / "1", "", None, leaking("nobody"))
    assert main(["learn", str(tmp_path), "--output", str(tmp_path / "m.json")]) == 1
    assert "no recording has a fault" in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()


def test_without_pgmpy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pgmpy.models", None)
    learn._library.cache_clear()
    record(tmp_path / "shop" / "1", "orders", "memory", leaking("orders"))
    with pytest.raises(learn.LearnError, match=r"alertmedic\[learn\]"):
        learn.learn(find_cases([tmp_path]), load_bare_packs(), "1")


def test_the_service_never_imports_it() -> None:
    import subprocess

    code = "import sys, agent.app, agent.packs; agent.packs.load_packs(); print('pgmpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert msgspec.json.encode(read_model())
