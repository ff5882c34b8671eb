"""The breaker against a reference that remembers everything, and its single probe."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actions import breaker as breakers
from actions.breaker import Breaker, BreakerPolicy, Ticket
from actions.model import BreakerMoved, BreakerState

POLICY = BreakerPolicy(
    failures=3,
    window_seconds=100.0,
    min_calls=5,
    failure_ratio=0.5,
    slow_ratio=0.6,
    slow_seconds=10.0,
    open_seconds=20.0,
    max_open_seconds=75.0,
    backoff=2.0,
    probe_seconds=30.0,
)


class Reference:
    """The rules of the breaker, written down as naively as possible: the whole past is kept, nothing is folded."""

    def __init__(self) -> None:
        self.state = "closed"
        self.calls: list[tuple[float, bool, bool]] = []  # since it was last closed
        self.openings = 0
        self.until = 0.0
        self.probe: float | None = None

    def permits(self, now: float) -> bool:
        if self.state == "open":
            return now >= self.until
        if self.state == "half_open":
            return self.probe is None or now - self.probe >= POLICY.probe_seconds
        return True

    def begin(self, now: float) -> float | None:
        if self.state == "closed":
            return None
        self.state, self.probe = "half_open", now
        return now

    def end(self, now: float, probe: float | None, ok: bool, slow: bool) -> None:
        if self.state == "closed":
            self.calls.append((now, ok, slow))
            window = [c for c in self.calls if now - c[0] < POLICY.window_seconds or c[0] == now]
            row = 0
            for _, good, _ in reversed(self.calls):
                if good:
                    break
                row += 1
            many = len(window) >= POLICY.min_calls
            bad = sum(not good for _, good, _ in window) / len(window) >= POLICY.failure_ratio
            lame = sum(s for _, _, s in window) / len(window) >= POLICY.slow_ratio
            if row >= POLICY.failures or (many and (bad or lame)):
                self._open(now)
        elif self.state == "half_open" and probe is not None and probe == self.probe:
            if ok and not slow:
                self.__init__()  # type: ignore[misc]
            else:
                self._open(now)

    def _open(self, now: float) -> None:
        wait = min(POLICY.open_seconds * POLICY.backoff**self.openings, POLICY.max_open_seconds)
        self.state, self.until, self.probe, self.calls = "open", now + wait, None, []
        self.openings += 1


class BreakerMachine(RuleBasedStateMachine):
    """Random calls, some of them at once, with random times; after every event the records must give the state back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.breaker, self.reference = Breaker(key="a"), Reference()
        self.calls: list[tuple[Ticket, float | None]] = []
        self.moves: list[BreakerMoved] = []

    def take(self, breaker: Breaker, move: BreakerMoved | None) -> None:
        if move is None:
            assert breaker == self.breaker
        else:
            assert (move.before, move.after) == (self.breaker.state, breaker.state)
            self.moves.append(msgspec.json.decode(msgspec.json.encode(move), type=BreakerMoved))
        self.breaker = breaker

    @rule(seconds=st.sampled_from([0.5, 1.0, 7.0, 20.0, 40.0, 120.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def call_begins(self) -> None:
        allowed = breakers.permits(self.breaker, POLICY, self.now)
        assert allowed == self.reference.permits(self.now)
        if not allowed:
            with pytest.raises(PermissionError):
                breakers.begin(self.breaker, POLICY, self.now)
            return
        after, ticket, move = breakers.begin(self.breaker, POLICY, self.now)
        self.take(after, move)
        self.calls.append((ticket, self.reference.begin(self.now)))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), ok=st.booleans(), slow=st.booleans())
    def call_ends(self, data: st.DataObject, ok: bool, slow: bool) -> None:
        ticket, probe = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        seconds = 11.0 if slow else 1.0
        self.take(*breakers.end(self.breaker, POLICY, self.now, ticket, ok=ok, seconds=seconds))
        self.reference.end(self.now, probe, ok, slow)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def call_is_abandoned(self, data: st.DataObject) -> None:
        ticket, probe = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        self.take(*breakers.abandon(self.breaker, self.now, ticket))
        if self.reference.state == "half_open" and probe is not None and probe == self.reference.probe:
            self.reference.probe = None

    @rule()
    def a_person_resets_it(self) -> None:
        self.take(*breakers.reset(self.breaker, self.now))
        self.reference = Reference()

    @rule()
    def the_agent_restarts(self) -> None:
        self.breaker = breakers.fold(self.moves).get("a", Breaker(key="a"))

    @invariant()
    def they_agree(self) -> None:
        assert self.breaker.state == self.reference.state
        if self.reference.state == "open":
            assert self.breaker.open_until == pytest.approx(self.reference.until)
        assert breakers.fold(self.moves).get("a", Breaker(key="a")) == self.breaker


BreakerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBreakerMachine = BreakerMachine.TestCase


def opened(policy: BreakerPolicy = POLICY, now: float = 1000.0) -> Breaker:
    breaker = Breaker(key="a")
    for _ in range(policy.failures):
        breaker, _move = breakers.end(breaker, policy, now, Ticket("a"), ok=False, seconds=1.0)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_exactly_one_of_many_callers_gets_the_probe() -> None:
    breaker, granted = opened(), 0
    for _ in range(10):
        if breakers.permits(breaker, POLICY, 1020.0):
            breaker, _ticket, _move = breakers.begin(breaker, POLICY, 1020.0)
            granted += 1
    assert granted == 1


def test_a_probe_that_never_ends_is_given_up() -> None:
    breaker, old, _ = breakers.begin(opened(), POLICY, 1020.0)
    assert not breakers.permits(breaker, POLICY, 1049.0)
    breaker, new, _ = breakers.begin(breaker, POLICY, 1050.0)
    late, move = breakers.end(breaker, POLICY, 1051.0, old, ok=True, seconds=1.0)
    assert (late, move) == (breaker, None)  # the old probe no longer counts
    closed, _ = breakers.end(breaker, POLICY, 1052.0, new, ok=True, seconds=1.0)
    assert closed.state is BreakerState.CLOSED


def test_waiting_doubles_up_to_the_cap() -> None:
    breaker, now, waits = opened(), 1000.0, []
    for _ in range(5):
        waits.append(breaker.open_until - now)
        now = breaker.open_until
        breaker, ticket, _ = breakers.begin(breaker, POLICY, now)
        breaker, _ = breakers.end(breaker, POLICY, now, ticket, ok=False, seconds=1.0)
    assert waits == [20.0, 40.0, 75.0, 75.0, 75.0]


def test_thousands_of_openings_do_not_overflow() -> None:
    breaker = msgspec.structs.replace(opened(), opened_count=100_000)
    breaker, ticket, _ = breakers.begin(breaker, POLICY, breaker.open_until)
    breaker, _ = breakers.end(breaker, POLICY, 5000.0, ticket, ok=False, seconds=1.0)
    assert breaker.open_until == 5075.0


def test_half_of_ten_failures_open_it_without_three_in_a_row() -> None:
    policy, breaker = BreakerPolicy(), Breaker(key="a")
    for i in range(10):
        assert breaker.state is BreakerState.CLOSED
        breaker, _ = breakers.end(breaker, policy, 1000.0 + i, Ticket("a"), ok=i % 2 == 0, seconds=1.0)
    assert breaker.state is BreakerState.OPEN


def test_a_duration_that_is_no_number_counts_as_slow() -> None:
    breaker, _ = breakers.end(Breaker(key="a"), POLICY, 1000.0, Ticket("a"), ok=True, seconds=float("nan"))
    assert breaker.calls[0].slow


def test_the_closed_one_that_was_used_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "MAX_BREAKERS", 2)
    known: dict[str, Breaker] = {}
    for breaker in (Breaker(key="open", state=BreakerState.OPEN), Breaker(key="old"), Breaker(key="new")):
        breakers.keep(known, breaker)
    assert list(known) == ["open", "new"]
    breakers.keep(known, Breaker(key="open", opened_count=1, state=BreakerState.OPEN))
    breakers.keep(known, Breaker(key="newest"))
    assert list(known) == ["open", "newest"]
    breakers.keep(known, Breaker(key="open too", state=BreakerState.OPEN))
    breakers.keep(known, Breaker(key="and open", state=BreakerState.OPEN))
    assert list(known) == ["open", "open too", "and open"]
