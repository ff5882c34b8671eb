"""Alerts that no pack knows, by their expressions alone, on a real Prometheus; and servers that do not answer well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import promql_parser
import pytest
from aiohttp import web
from anyalert_world import ANY, STEP, AnyCase, Server, alert_of, packs, rules
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Config
from agent.config import Prometheus as Section
from agent.expressions import Expressions, expression_in, rules_of
from agent.situation import Situations
from agent.sources.prometheus import Prometheus, PrometheusSource
from agent.sources.promql import render
from rules.anyalert import about, questions
from rules.diagnose import diagnose
from rules.expression import ExpressionError, read, rendered
from rules.model import Alert, Situation, Topology

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def around(url: str, alert: Alert, until: float, seconds: float = 60.0) -> Situation:
    config = Config(prometheus=Section(url=url, step_seconds=float(STEP), timeout_seconds=seconds))
    async with PrometheusSource(
        Prometheus(url=url, rate=f"{4 * STEP}s", timeout_seconds=seconds, concurrency=64)
    ) as source:
        listed = Expressions(rules_of(source))
        made = Situations(config, packs(), [source], Topology(), None, clock=lambda: until, expressions=listed)
        return await made.around((alert,))


@pytest.mark.parametrize("case", ANY, ids=lambda case: case.name)
async def test_an_unknown_alert_is_explained_by_its_expression(
    prometheus: Server, any_at: float, case: AnyCase
) -> None:
    situation = await around(prometheus.url, case.alert(any_at), case.until(any_at))
    diagnosis = diagnose(situation, packs())
    said = f"{diagnosis.verdict}: {[(h.cause, round(h.posterior, 2)) for h in diagnosis.hypotheses]}"
    expected = {*case.missing, "host.processes"}  # this process has no view of any host
    assert {n: r for n, r in diagnosis.missing.items() if n not in expected} == {}, said
    if not case.cause:
        assert diagnosis.verdict == "insufficient_evidence", said
        assert diagnosis.sentence.startswith("Insufficient evidence")
        return
    assert (diagnosis.verdict, diagnosis.hypotheses[0].cause) == ("ranked", case.cause), said
    assert case.says in diagnosis.hypotheses[0].sentence
    assert diagnosis.hypotheses[0].no_remedy
    assert set(case.missing) <= set(diagnosis.missing)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


SOME = [
    rule for rule in rules() if rule.name in ("KubePodCrashLooping", "NodeCPUHighUsage", "TargetDown", "KubeAPIDown")
]


async def test_a_dead_prometheus_is_said_and_nothing_fails() -> None:
    for rule in SOME:
        situation = await around("http://127.0.0.1:1", alert_of(rule, "dead", 1e9), 1e9 + 600)
        diagnosis = diagnose(situation, packs())
        assert diagnosis.verdict == "insufficient_evidence"
        assert len(diagnosis.missing) >= 5
        assert "Missing:" in diagnosis.sentence
        asked = {e.name for e in situation.evidence} - {"alert.expression", "alert.drilldown"}
        assert asked <= set(diagnosis.missing)


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"status":"success","data":{"resultType":"matrix","result":[7]}}']
)
async def test_garbage_is_said_and_nothing_fails(body: bytes) -> None:
    async def garbage(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    async with serving(garbage) as url:
        for rule in SOME:
            situation = await around(url, alert_of(rule, "garbage", 1e9), 1e9 + 600)
            diagnosis = diagnose(situation, packs())
            assert diagnosis.verdict == "insufficient_evidence"
            assert len(diagnosis.missing) >= 5


async def test_what_times_out_is_said_and_the_rest_is_used(prometheus: Server, any_at: float) -> None:
    """Every other query hangs until the deadline; the others go to the real server."""
    import aiohttp

    case = next(c for c in ANY if c.cause == "alert.restarted")
    hung = 0
    over = asyncio.Event()

    async with aiohttp.ClientSession() as session:

        async def half(request: web.Request) -> web.StreamResponse:
            nonlocal hung
            form = await request.post()
            query = str(form.get("query", ""))
            if "scrape_duration" in query or "build_info" in query or "node_" in query or "up{" in query:
                hung += 1
                await over.wait()
            async with session.request(request.method, f"{prometheus.url}{request.path_qs}", data=dict(form)) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")

        async with serving(half) as url:
            situation = await around(url, case.alert(any_at), case.until(any_at), seconds=4.0)
            over.set()
    diagnosis = diagnose(situation, packs())
    assert hung >= 4
    late = {name for name, reason in diagnosis.missing.items() if "timeout" in reason}
    assert {"alert_up", "alert_versions", "alert_host_cpu"} <= late
    assert "Missing:" in diagnosis.sentence
    assert diagnosis.hypotheses[0].cause == "alert.restarted"


# -- pure

TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@given(
    st.sampled_from(rules()),
    st.dictionaries(st.sampled_from(["job", "instance", "pod", "a b", "__x"]), TEXT),
)
def test_what_is_asked_is_promql_whatever_the_labels(rule: object, labels: dict[str, str]) -> None:
    asked = questions(labels, read(rule.expression), ())  # type: ignore[attr-defined]
    for query in asked:
        promql_parser.parse(render(query.query, "service", (), "1m", [labels]))
    assert len({q.name for q in asked}) == len(asked) <= 24


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("a > 5", True),
        ("a > 5 or vector(0)", True),
        ("sum(a) > 5 and b > 1", True),
        ("(a > 5) or (b / c > 0.1)", False),
        ("max by (x) ((a > 5) or b > 1)", False),
    ],
)
def test_of_alternatives_no_threshold_is_asked(text: str, one: bool) -> None:
    """That one of two comparisons is far from its threshold says nothing of why the other one holds."""
    asked = {q.name for q in questions({}, read(text), ())}
    assert ("alert_used_high" in asked) is one


@given(st.text(max_size=60) | st.sampled_from(["sum(", "a{b=~`", "((((", "a[5m", 'x{y="$scope"} > 1', "up > $x"]))
def test_any_text_is_an_expression_or_a_reason(text: str) -> None:
    try:
        expression = read(text)
    except ExpressionError:
        return
    again = read(rendered(expression.tree))
    assert again.metrics == expression.metrics


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.id)
def test_what_is_written_back_is_what_was_read(rule: object) -> None:
    expression = read(rule.expression)  # type: ignore[attr-defined]
    once = rendered(expression.tree)
    assert rendered(read(once).tree) == once
    assert "$" not in rendered(expression.tree)


def test_deep_and_long_expressions_are_refused() -> None:
    for text in ("(" * 500 + "1" + ")" * 500, "a" * 20_000):
        with pytest.raises(ExpressionError):
            read(text)


@pytest.mark.parametrize(
    ("url", "expression"),
    [
        ("http://p:9090/graph?g0.expr=up+%3D%3D+0&g0.tab=1", "up == 0"),
        ("http://v:8880/vmalert/alert?group_id=1&alert_id=2", ""),
        ("https://g/alerting/grafana/x/view?expr=a%3E1", "a>1"),
        ("http://[", ""),
        ("", ""),
        ("http://p/graph?g0.expr=" + "a" * 100_000, ""),
    ],
)
def test_a_generator_url_is_taken_apart(url: str, expression: str) -> None:
    assert expression_in(url) == expression


def test_labels_tell_what_they_are_about() -> None:
    said = {"instance": "instance", "host_name": "instance", "availability_zone": "zone", "rack": "zone"}
    said |= {"image_tag": "version", "device_model": "hardware", "code": "part", "handler": "part"}
    assert {name: about([name]) for name in said} == said
